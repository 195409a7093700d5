"""See a plan before paying for it."""
