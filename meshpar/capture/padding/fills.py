"""Batches made larger by samples and positions that are to count nothing: which dims grow, and what is filled in.

    input                                     more samples                 more positions
    labels (looked up by the loss alone)      the number it ignores        the number it ignores
    consecutive positions                     as below                     go on
    anything else                             a sample that is there       0 (False in a mask)

Whether a model ignores that is not known here: `proof` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, facts
from meshpar.graph.op import op_name

_LABEL_LOSSES: Mapping[str, int] = {"cross_entropy_loss": 4, "nll_loss": 4, "nll_loss_nd": 4, "nll_loss2d": 4, "nll_loss_forward": 4}
"""Operator that looks labels up -> the place of the label that it ignores, among its arguments."""


@dataclass(frozen=True, slots=True)
class GrowingDims:
    """The dims of one input that grow with the batch."""

    samples: bool
    """Whether dim 0 holds samples."""
    positions: tuple[int, ...] = ()
    """The dims that are as long as the samples are."""
    ignored: int | None = None
    """The number that labels are filled up with."""


@dataclass(frozen=True)
class BatchLayout:
    """How many samples and positions a batch has, and where; `inputs`: for each leaf that is a tensor with dims, else None."""

    samples: int
    length: int | None
    inputs: tuple[GrowingDims | None, ...]


def layout(leaves: Sequence[Any], ignored: Sequence[int | None], *, lengths: bool) -> BatchLayout:
    """Read the leaves of a batch. `ignored`: for each, the label that the loss ignores, if it holds labels; `lengths`: whether there are
    positions.

    The first tensor has a row per sample, and a position per column: whole numbers of two dims, or features of three. (Images have none.)
    """
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        return BatchLayout(0, None, tuple(None for _ in leaves))
    length = first.shape[1] if lengths and first.dim() in (2, 3) else None
    return BatchLayout(first.shape[0], length, tuple(_dims(x, first.shape[0], length, own) for x, own in zip(leaves, ignored, strict=True)))


def _dims(leaf: Any, samples: int, length: int | None, ignored: int | None) -> GrowingDims | None:
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return None
    own = leaf.shape[0] == samples
    places = range(1 if own else 0, leaf.dim())
    if leaf.is_floating_point() and leaf.dim() == 3:  # (features, whose number may be that of positions by chance)
        places = range(1, 2)
    return GrowingDims(own, tuple(d for d in places if length is not None and leaf.shape[d] == length), ignored)


def filled(leaf: Any, dims: GrowingDims | None, more_samples: int, more_positions: int) -> Any:
    """An input with so many more samples and positions."""
    if dims is None or not isinstance(leaf, Tensor):
        return leaf
    for dim in dims.positions if more_positions else ():
        leaf = torch.cat([leaf, _positions(leaf, dim, more_positions, dims)], dim)
    if dims.samples and more_samples:
        shape = (more_samples, *leaf.shape[1:])
        if dims.ignored is not None:
            row = leaf.new_full(shape, dims.ignored)
        else:
            row = leaf[:1].detach().expand(shape) if leaf.shape[0] else leaf.new_ones(shape)
        leaf = torch.cat([leaf, row])
    return leaf


def _positions(leaf: Tensor, dim: int, more: int, dims: GrowingDims) -> Tensor:
    shape = [more if d == dim else n for d, n in enumerate(leaf.shape)]
    if dims.ignored is not None:
        return leaf.new_full(shape, dims.ignored)
    if dims.samples or leaf.is_floating_point() or leaf.dtype == torch.bool or leaf.shape[dim] < 2:
        return leaf.new_zeros(shape)
    last = leaf.narrow(dim, leaf.shape[dim] - 1, 1)  # (the same on all ranks: not of single samples)
    steps = torch.arange(1, more + 1, dtype=leaf.dtype, device=leaf.device).view([more if d == dim else 1 for d in range(leaf.dim())])
    return last + steps if bool((leaf.diff(dim=dim) == 1).all()) else leaf.new_zeros(shape)


def ignored_labels(captured: Captured) -> dict[str, int]:
    """The inputs that a loss looks up as labels -> the label that it ignores."""
    found: dict[str, int] = {}
    for node in captured.graph.nodes:
        place = _LABEL_LOSSES.get(op_name(node.target)) if node.op == "call_function" else None
        if place is not None and isinstance(node.args[1], fx.Node):
            ignored = node.args[place] if len(node.args) > place else node.kwargs.get("ignore_index", -100)
            found |= dict.fromkeys(_sources(node.args[1]), int(ignored))  # type: ignore[arg-type, unused-ignore]
    return found


def _sources(node: fx.Node) -> Iterator[str]:
    """The inputs of whole numbers that a value is made of; not those that only decide which."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        one = todo.pop()
        if one not in seen and _is_whole(one):
            seen.add(one)
            if one.op == "placeholder":
                yield str(one.target)
            todo += one.all_input_nodes


def _is_whole(node: fx.Node) -> bool:
    info = facts(node).info
    return isinstance(info, Info) and not info.dtype.is_floating_point and info.dtype != torch.bool
