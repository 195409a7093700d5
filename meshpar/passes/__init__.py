"""One graph -> graph pass each."""
