"""The packages whose models are swept: of each a table of cases, small models with a batch and a loss.

made = packages.OF["timm"].made("image", "vit_tiny_patch16_224")          # made.model, made.batch, made.loss_fn
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from .case import Made

NAMES = ("transformers", "torchvision", "timm", "diffusers", "plain")


class Package(Protocol):
    """What a package offers: its tasks, the kinds of models of each, and one of them made."""

    TASKS: tuple[str, ...]

    def kinds(self, task: str) -> list[str]: ...

    def made(self, task: str, kind: str) -> Made: ...


def of(name: str) -> Package:
    """The cases of a package. Raises ImportError where it is not installed."""
    package: Any = import_module(f".of_{name}", __name__)
    return package


__all__ = ["NAMES", "Made", "Package", "of"]
