"""One case of a sweep, and the loss of models that have none: a fixed projection of what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Made:
    """A small model with random values, a batch of four samples, and its loss (None: the model returns one)."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn | None = None


def projected(output: Any, batch: Any) -> Tensor:
    """A loss of every floating tensor of an output: each sample projected on a fixed vector; the mean of a square, so that values count."""
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    total = found[0].new_zeros(())
    for tensor in found:
        rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
        places = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
        total = total + ((rows * torch.cos(1.7 * places)).sum(1) / rows.shape[1] ** 0.5 - 0.5).square().mean()
    return total


def made(model: nn.Module, *args: Any, loss_fn: LossFn | None = projected, **kwargs: Any) -> Made:
    """A case called with these arguments, all of one kind."""
    return Made(model, kwargs or args, loss_fn)
