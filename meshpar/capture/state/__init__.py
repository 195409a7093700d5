"""State of Python and of torch that a program is captured with."""
