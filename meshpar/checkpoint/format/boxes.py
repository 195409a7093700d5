"""Boxes: which part of a tensor lies where, as nested chunks, runs, and a proof that nothing is missing or double.

A mesh axis cuts one dim at a time, in the order the axes were applied. What a rank holds of a dim is then a row of *runs* `[start, stop)`,
and what it holds of the tensor is the product of the runs of its dims: a list of *boxes*.

    dim of 12 rows, cut by tp=2 and then by dp=2          fused q|k rows (8 + 4), cut by tp=2
      tp 0: 0..6   -> dp 0: 0..3, dp 1: 3..6                tp 0: 0..4, 8..10
      tp 1: 6..12  -> dp 0: 6..9, dp 1: 9..12               tp 1: 4..8, 10..12
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.sharding.types import Shard, plain

Run = tuple[int, int]
Runs = tuple[tuple[Run, ...], ...]


class Box(NamedTuple):
    """A rectangle of a tensor: where it starts and how large it is, per dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offset, self.size, strict=True)) + "]"


class Cut(NamedTuple):
    """One mesh axis cutting one dim."""

    axis: str
    shard: Shard


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why boxes do not tile a tensor: `kind` is "gap", "overlap" or "outside"."""

    kind: str
    box: Box


def whole(shape: Sequence[int]) -> Box:
    """The box of all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None.

    >>> intersect(Box((0, 2), (4, 4)), Box((2, 0), (4, 3)))
    Box(offset=(2, 2), size=(2, 1))
    """
    offset = tuple(map(max, a.offset, b.offset))
    size = tuple(min(ao + an, bo + bn) - o for ao, an, bo, bn, o in zip(*a, *b, offset, strict=True))
    return Box(offset, size) if all(n > 0 for n in size) else None


def inside(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in an array that holds another box around it."""
    return tuple(slice(o - base, o - base + n) for o, n, base in zip(inner.offset, inner.size, outer.offset, strict=True))


def fit(shard: Shard, length: int) -> Shard:
    """The shard on a dim of `length` elements: a contiguous one adapts its number of units, others must fit exactly.

    A second axis cuts what a first one left, so a plain shard recorded for the whole dim meets a shorter one.
    """
    if shard.length == length:
        return shard
    if not shard.segments:
        return plain(shard.dim, length)
    unit = shard.segments[0][1]
    if shard.is_contiguous and length % unit == 0:
        return Shard(shard.dim, 1, ((length // unit, unit),))
    raise ImpossibleError(f"{shard} describes {shard.length} elements of dim {shard.dim}, but there are {length} to cut.")


def runs_of(length: int, cuts: Iterable[tuple[Shard, int, int]]) -> tuple[Run, ...]:
    """The runs that are left of a dim after `(shard, size, rank)` cuts in order.

    >>> runs_of(12, [(plain(0, 12), 2, 1), (plain(0, 6), 2, 0)])
    ((6, 9),)
    """
    runs: tuple[Run, ...] = ((0, length),) if length else ()
    for shard, size, rank in cuts:
        held = sum(stop - start for start, stop in runs)
        runs = _select(runs, fit(shard, held).ranges(size, rank))
    return runs


def runs_held(shape: Sequence[int], cuts: Sequence[Cut], sizes: Mapping[str, int], coords: Mapping[str, int]) -> Runs:
    """Per dim, the runs that the rank at `coords` holds of a tensor of global `shape`."""
    on_dim: list[list[tuple[Shard, int, int]]] = [[] for _ in shape]
    for cut in cuts:
        if not 0 <= cut.shard.dim < len(shape):
            raise ImpossibleError(f"{cut.axis} cuts dim {cut.shard.dim} of a tensor with {len(shape)} dims.")
        on_dim[cut.shard.dim].append((cut.shard, sizes[cut.axis], coords[cut.axis]))
    return tuple(runs_of(n, steps) for n, steps in zip(shape, on_dim, strict=True))


def boxes_of(runs: Sequence[Sequence[Run]]) -> tuple[Box, ...]:
    """The boxes that runs per dim span; none where a dim has no run."""
    return tuple(Box(tuple(a for a, _ in row), tuple(b - a for a, b in row)) for row in product(*runs))


def local_shape(runs: Sequence[Sequence[Run]]) -> tuple[int, ...]:
    """The shape of the local tensor that holds these runs."""
    return tuple(sum(stop - start for start, stop in row) for row in runs)


def find_flaw(shape: Sequence[int], boxes: Sequence[Box]) -> Flaw | None:
    """The first gap, overlap or overhang of boxes that should tile a tensor, or None if they do so exactly.

    >>> find_flaw((4,), [Box((0,), (2,)), Box((3,), (1,))])
    Flaw(kind='gap', box=Box(offset=(2,), size=(1,)))
    """
    for box in boxes:
        if len(box.offset) != len(shape) or len(box.size) != len(shape):
            return Flaw("outside", box)
        if any(o < 0 or n < 0 or o + n > limit for o, n, limit in zip(*box, shape, strict=True)):
            return Flaw("outside", box)
    solid = [box for box in boxes if all(box.size)]
    if not all(shape) or _is_grid(shape, solid):
        return None
    return _sweep(tuple(shape), solid, ())


def _is_grid(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes are all the cells of one grid: the usual case, checked in linear time."""
    if len(boxes) == 1:
        return boxes[0].size == tuple(shape)
    cells = 1
    for dim, limit in enumerate(shape):
        spans = sorted({(box.offset[dim], box.offset[dim] + box.size[dim]) for box in boxes})
        if not spans or spans[0][0] != 0 or spans[-1][1] != limit or any(a[1] != b[0] for a, b in pairwise(spans)):
            return False
        cells *= len(spans)
    return cells == len(boxes) == len(set(boxes))


def _sweep(shape: tuple[int, ...], boxes: Sequence[Box], lead: tuple[Run, ...]) -> Flaw | None:
    """Cut dim by dim at every edge; in each elementary interval the boxes that cover it must tile the remaining dims."""
    dim = len(lead)
    if len(boxes) == 1 and boxes[0].size[dim:] == shape[dim:]:
        return None
    if not boxes or dim == len(shape):
        if len(boxes) == 1:
            return None
        region = lead + tuple((0, n) for n in shape[dim:])
        return Flaw("overlap" if boxes else "gap", Box(tuple(a for a, _ in region), tuple(b - a for a, b in region)))
    edges = sorted({0, shape[dim]} | {b.offset[dim] for b in boxes} | {b.offset[dim] + b.size[dim] for b in boxes})
    waiting = sorted(boxes, key=lambda b: b.offset[dim], reverse=True)
    active: list[Box] = []
    before: list[Box] | None = None
    for start, stop in pairwise(edges):
        active = [b for b in active if b.offset[dim] + b.size[dim] > start]
        while waiting and waiting[-1].offset[dim] == start:
            active.append(waiting.pop())
        if active != before or not active:
            flaw = _sweep(shape, active, (*lead, (start, stop)))
            if flaw:
                return flaw
        before = list(active)
    return None


def _select(runs: Sequence[Run], picks: Sequence[Run]) -> tuple[Run, ...]:
    """Translate ranges that count along `runs` into ranges of the whole dim.

    >>> _select(((0, 4), (8, 10)), ((3, 6),))
    ((3, 4), (8, 10))
    """
    out: list[Run] = []
    for low, high in picks:
        base = 0
        for start, stop in runs:
            a, b = max(low - base, 0), min(high - base, stop - start)
            base += stop - start
            if a >= b:
                continue
            if out and out[-1][1] == start + a:
                out[-1] = (out[-1][0], start + b)
            else:
                out.append((start + a, start + b))
    return tuple(out)


def volume(size: Sequence[int]) -> int:
    """The number of elements of a box of this size."""
    return prod(size)
