"""How the tensors of one naming become those of another."""
