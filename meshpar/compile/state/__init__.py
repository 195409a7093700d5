"""What a program holds for."""
