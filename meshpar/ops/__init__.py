"""What lowered graphs call: conversions between shardings, vocabulary-parallel layers, experts, stateless random numbers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshpar.ops import expert_all_to_all

__all__ = ["expert_all_to_all"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
