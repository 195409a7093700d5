"""What a plan says, in words and numbers."""
