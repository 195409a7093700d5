"""A captured graph and a mesh become a program: decided, lowered, cut into stages."""
