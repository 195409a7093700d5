"""`meshpar` on the command line."""
