"""Experts kept as a list of modules, and the loops over them."""
