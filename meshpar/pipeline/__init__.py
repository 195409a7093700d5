"""Pipelines: schedules as data, stages and how a rank runs them; `split` makes stages for torch's own runtime."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshpar.pipeline.stages import Stage, loss, split, sum_shared_gradients

__all__ = ["Stage", "loss", "split", "sum_shared_gradients"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".stages", __name__), name)
