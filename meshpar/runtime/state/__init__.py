"""Which program holds for the state of this step."""
