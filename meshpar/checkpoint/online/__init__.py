"""Saving and loading from running ranks."""
