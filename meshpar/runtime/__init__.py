"""What runs programs on this rank."""
