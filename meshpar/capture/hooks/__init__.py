"""Hooks that act in backward."""
