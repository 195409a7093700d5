"""The static check: the final program is read back, and proved to compute what the model's graph says, without running anything."""
