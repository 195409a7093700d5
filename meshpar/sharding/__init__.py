"""The types of values on mesh axes, what operators allow, and the choice."""
