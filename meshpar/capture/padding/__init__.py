"""Padding that counts nothing: what is filled in where, and the proof that a model ignores it."""
