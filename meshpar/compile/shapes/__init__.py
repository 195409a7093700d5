"""Programs of new shapes from those of known ones."""
