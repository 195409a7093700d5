"""`python -m meshpar.checkpoint`: the checkpoint commands alone."""

from meshpar.checkpoint.commands import app

app(prog_name="meshpar checkpoint")
