"""What a batch must look like to run a program, as `jit` has one program per shape."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from meshpar._torch import pytree
from meshpar.compile.state.leaves import describe


@dataclass(frozen=True)
class BatchSignature:
    """What a batch must look like to run a program: structure, shapes and dtypes, and the values of what is not a tensor."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    training: bool
    state: str = ""
    """A fingerprint of what else the program was made for: see `capture.state`; empty for a batch."""

    @cached_property
    def key(self) -> str:
        """A name for the program in the module tree."""
        digest = hashlib.sha256(f"{self.spec} {self.leaves} {self.state}".encode()).hexdigest()[:8]
        return f"{'train' if self.training else 'eval'}_{digest}"

    @property
    def counting(self) -> BatchSignature:
        """That of the program which counts the denominators of such a batch."""
        return replace(self, leaves=(*self.leaves, "counts"))


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> tuple[list[torch.Tensor], BatchSignature]:
    """The tensors of a batch, and its signature; keyword arguments are in the model's order."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors, BatchSignature(spec, tuple(map(describe, leaves)), training)
