"""Operators that only rearrange: where the parts of a tensor are in the result, by arithmetic on strides and on flat order.

transpose, permute, select, expand, ...     a dim of the result with the stride of a dim of the operand is that dim
view, reshape, flatten, ...                 the flat order stays: a part of it is cut out of whatever dims it lies in now
split, slice, cat                           segments of a dim are taken apart and put together
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from meshpar.graph.op import Op
from meshpar.proof.static.layout import CutLayout, between, joined, layout_of, normal, of_layout, reshaped
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.sharding.types import I, P, Partial, Ragged, Shard, Type

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """A call on one axis: how many ranks, and the shapes of operands and results, whole on this axis and cut on earlier ones."""

    ranks: int
    before: tuple[Shape, ...]
    after: tuple[Shape, ...]


def is_move(name: str) -> bool:
    """Whether an operator only rearranges."""
    return name in _MOVES


def moved(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    """The types of the results, on one axis. Raises Contradiction where parts do not stay parts."""
    count = len(op.outs)
    if all(t == I for t in types):
        return (I,) * count
    if any(isinstance(t, Partial) for t in types):
        if not all(isinstance(t, Partial) for t in types):
            raise Contradiction("pending sums are put together with values that are none")
        return (P,) * count
    return _MOVES[op.name](op, types, level)


def _first(types: Sequence[Type]) -> Shard:
    if not isinstance(types[0], Shard):
        raise Unproved("rows of experts are rearranged")
    return types[0]


def _reshaped(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    if isinstance(types[0], Ragged):
        before, after = op.shapes[0], op.out.shape
        if before and after and before[0] == after[0]:
            return (types[0],)
        raise Unproved("rows of experts are reshaped")
    found = reshaped(_first(types), level.before[0], level.after[0], level.ranks)
    if not found or op.infos[0].dtype != op.out.dtype:
        raise Contradiction(f"what a rank has of {list(level.before[0])} is no part of {list(level.after[0])}")
    return (found[0],)


def _strided(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    """By the strides of the results on a tensor whose strides are all different."""
    if isinstance(types[0], Ragged):
        cut, layout = 0, None
    else:
        shard = _first(types)
        cut, layout = shard.dim, layout_of(shard, level.ranks)
    size, stride = op.shapes[0][cut], _STRIDES[cut]
    found: list[Type] = []
    for result in _on_meta(op):
        places = [i for i, (n, s) in enumerate(zip(result.shape, result.stride(), strict=True)) if s == stride and n == size]
        if len(places) != 1:
            raise Contradiction(f"dim {cut}, of which each rank has a part, is taken apart")
        found.append(Ragged() if layout is None and places == [0] else of_layout(places[0], layout or (0, ())))
    return tuple(found)


_STRIDES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149)


def _on_meta(op: Op) -> list[torch.Tensor]:
    shape = op.shapes[0]
    example = torch.empty_strided(shape, _STRIDES[: len(shape)], dtype=op.infos[0].dtype, device="meta")
    args, kwargs = fx.map_arg((op.node.args, dict(op.node.kwargs)), lambda _: example)
    found = op.node.target(*args, **kwargs)  # type: ignore[operator]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _parted(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    """split, chunk: the results are stretches of a dim, one after the other."""
    shard, dim = types[0], op.dim()
    if not isinstance(shard, Shard) or shard.dim != dim:
        return (shard,) * len(op.outs)
    found, at = [], 0
    for shape in level.after:
        found.append(_stretch(shard, at, at + shape[dim], level))
        at += shape[dim]
    return tuple(found)


def _sliced(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    shard, dim = types[0], op.dim()
    if not isinstance(shard, Shard) or shard.dim != dim:
        return (shard,)
    size = op.shapes[0][dim]
    start, stop, step = slice(op.arguments.get("start"), op.arguments.get("end"), op.arguments.get("step", 1)).indices(size)
    if (start, stop, step) == (0, size, 1):
        return (shard,)
    if step != 1 or level.before[0][dim] != size:
        raise Unproved("a dim that several axes cut, or with a step, is sliced")
    return (_stretch(shard, start, stop, level),)


def _stretch(shard: Shard, start: int, stop: int, level: Level) -> Shard:
    found = between(layout_of(shard, level.ranks), start, stop)
    if found is None:
        raise Contradiction(f"the elements {start} to {stop} of dim {shard.dim} are not dealt out to the ranks evenly")
    return of_layout(shard.dim, normal(found, level.ranks))


def _catted(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    dim = int(op.arguments.get("dim", 0)) % max(1, len(op.out.shape))
    if any(isinstance(t, Ragged) for t in types):
        if all(isinstance(t, Ragged) for t in types) and dim:
            return (Ragged(),)
        raise Unproved("rows of experts are put together with others")
    kept = [(i, t) for i, t in enumerate(types) if op.shapes[i] != (0,)]
    if not all(isinstance(t, Shard) for _, t in kept):
        raise Contradiction("parts are put together with values that are the same on all ranks")
    shards = [t for _, t in kept if isinstance(t, Shard)]
    layouts: list[CutLayout] = [layout_of(t, level.ranks) for t in shards]
    if len({t.dim for t in shards}) > 1 or (shards[0].dim != dim and len(set(layouts)) > 1):
        raise Contradiction("parts of different kinds are put together")
    return (of_layout(shards[0].dim, layouts[0] if shards[0].dim != dim else normal(joined(layouts), level.ranks)),)


def _stacked(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    dim = int(op.arguments.get("dim", 0)) % len(op.out.shape)
    if any(t != types[0] for t in types):
        raise Contradiction("values of different types are stacked")
    if isinstance(types[0], Ragged):
        if dim:
            return (Ragged(),)
        raise Unproved("rows of experts are stacked")
    shard = _first(types)
    return (of_layout(shard.dim + (dim <= shard.dim), layout_of(shard, level.ranks)),)


def _repeated(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    shard, shift = _first(types), len(op.out.shape) - len(op.shapes[0])
    times = level.after[0][shard.dim + shift] // max(1, level.before[0][shard.dim])
    repeat, segments = layout_of(shard, level.ranks)
    return (of_layout(shard.dim + shift, normal((repeat * times, segments), level.ranks)),)


def _interleaved(op: Op, types: Sequence[Type], level: Level) -> tuple[Type, ...]:
    if "self" not in op.arguments or op.arguments.get("dim") is None or not isinstance(op.arguments.get("repeats"), int):
        raise Unproved("it is called in a way that is not followed")
    shard, times = _first(types), int(op.arguments["repeats"])
    repeat, segments = layout_of(shard, level.ranks)
    if shard.dim == op.dim():
        segments = tuple((units, size * times) for units, size in segments)
    return (of_layout(shard.dim, normal((repeat, segments), level.ranks)),)


_MOVES: Mapping[str, Callable[[Op, Sequence[Type], Level], tuple[Type, ...]]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshaped),
    **dict.fromkeys(
        "transpose swapaxes swapdims mT adjoint mH t numpy_T permute movedim unsqueeze squeeze expand broadcast_to expand_as select unbind "
        "unbind_copy diagonal unfold".split(),
        _strided,
    ),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy"), _parted),
    "slice": _sliced,
    **dict.fromkeys(("cat", "concat", "concatenate"), _catted),
    "stack": _stacked,
    "repeat": _repeated,
    "repeat_interleave": _interleaved,
}


def says_sizes(name: str) -> bool:
    """Whether the arguments of an operator are sizes, so that those of a part differ: the shape of its result tells if they are right."""
    return name in _SIZED


_SIZED = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze expand broadcast_to expand_as split split_with_sizes chunk repeat zeros ones full "
    "empty rand randn new_zeros new_ones new_full new_empty".split()
)


def bounds(arguments: Mapping[str, Any], size: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice of a dim of this size."""
    start, stop, step = slice(arguments.get("start"), arguments.get("end"), arguments.get("step", 1)).indices(size)
    return start, max(start, stop), step
