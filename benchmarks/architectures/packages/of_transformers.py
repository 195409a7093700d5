"""Every architecture of transformers (`benchmarks.architectures.small`); its models return their loss."""

from __future__ import annotations

import transformers

from benchmarks.architectures import small

from .case import Made

transformers.logging.set_verbosity_error()
TASKS = tuple(small.TASKS)
kinds = small.kinds


def made(task: str, kind: str) -> Made:
    """A tiny model of a kind for a task."""
    return Made(*small.made(task, kind))
