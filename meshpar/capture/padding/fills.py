"""Batches made larger by samples and positions that are to count nothing: which dims grow, and what is filled in.

    input                                     more samples                 more positions
    labels (looked up by the loss alone)      the number it ignores        the number it ignores
    consecutive positions                     as below                     go on
    anything else                             a sample that is there       0 (False in a mask)

Whether a model ignores that is not known here: `proof` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from meshpar._torch import pytree
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, facts
from meshpar.graph.op import op_name

_LABEL_LOSSES: Mapping[str, int] = {"cross_entropy_loss": 4, "nll_loss": 4, "nll_loss_nd": 4, "nll_loss2d": 4, "nll_loss_forward": 4}
"""Operator that looks labels up -> the place of the label that it ignores, among its arguments."""


@dataclass(frozen=True, slots=True)
class Dims:
    """The dims of one input that grow with the batch."""

    samples: bool
    """Whether dim 0 holds samples."""
    positions: tuple[int, ...] = ()
    """The dims that are as long as the samples are."""
    ignored: int | None = None
    """The number that labels are filled up with."""


@dataclass(frozen=True)
class Layout:
    """How many samples and positions a batch has, and where; `inputs`: for each leaf that is a tensor with dims, else None."""

    samples: int
    length: int | None
    inputs: tuple[Dims | None, ...]


def layout(args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Mapping[str, int], *, lengths: bool) -> Layout:
    """Read a batch. `labels`: keyword -> the label that the loss ignores; `lengths`: whether positions are looked for.

    The first tensor has a row per sample, and if it has several dims, a position per column.
    """
    pairs = pytree.tree_flatten_with_path((args, dict(kwargs)))[0]
    first = next((leaf for _, leaf in pairs if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        return Layout(0, None, tuple(None for _ in pairs))
    samples = first.shape[0]
    length = first.shape[1] if lengths and first.dim() > 1 else None
    return Layout(samples, length, tuple(_dims(path, leaf, samples, length, labels) for path, leaf in pairs))


def _dims(path: Any, leaf: Any, samples: int, length: int | None, labels: Mapping[str, int]) -> Dims | None:
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return None
    own = leaf.shape[0] == samples
    places = range(1 if own else 0, leaf.dim())
    if leaf.is_floating_point() and leaf.dim() == 3:  # (features, whose number may be that of positions by chance)
        places = range(1, 2)
    return Dims(own, tuple(d for d in places if length is not None and leaf.shape[d] == length), labels.get(name_of(path)))


def name_of(path: tuple[Any, ...]) -> str:
    """An argument's name or number, and the keys below it."""
    where, *rest = path
    keys = [str(getattr(key, "idx", getattr(key, "key", key))) for key in rest]
    return "_".join([f"input {keys[0]}", *keys[1:]] if where.idx == 0 else keys)


def filled(leaf: Any, dims: Dims | None, more_samples: int, more_positions: int) -> Any:
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


def _positions(leaf: Tensor, dim: int, more: int, dims: Dims) -> Tensor:
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


def names_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[str]:
    """How the leaves of a batch are called."""
    return [name_of(path) for path, _ in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]]
