"""Positions near a rank's own, of a sequence that is cut: fetched from the ranks that have them.

    reads 2 more before its own     rank 0: 0 1 2 3     rank 1: 4 5 6 7     rank 1 fetches 2 and 3; before 0 there are two rows of zeros

Backward sends the gradients of what was fetched back to where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.primitives import exchanged, on_rank
from meshpar.sharding.types import Shard

Positions = tuple[int, int]


@dataclass(frozen=True)
class Near:
    """What each rank reads of a sequence."""

    cut: Shard
    """Who has which positions."""
    reads: tuple[tuple[Positions, ...], ...]
    """By rank: the ranges `[start, stop)` that it reads, in order. They may overlap, and reach beyond the ends, where there are zeros."""

    def most_sent(self) -> int:
        """The most positions that any rank sends: to all others together."""
        size = len(self.reads)
        return max(sum(length for part in _way(self, rank).sent for _, length in part) for rank in range(size))


def fetched(rows: Tensor, near: Near, axis: tuple[str, int, int]) -> Tensor:
    """The rows that this rank reads, `[read, c]`, of the rows `[s_local, c]` that it and the others have."""
    found: Tensor = _Fetch.apply(rows, near, axis)
    return found


_Stretch = tuple[int, int]
"""Where it begins among the rows, and its length."""
_OWN, _FETCHED, _ZEROS = range(3)


@dataclass(frozen=True)
class _Way:
    """What a rank sends, gets, and where that belongs."""

    sent: tuple[tuple[_Stretch, ...], ...]
    """By rank: what goes there of the rows held here."""
    received: tuple[int, ...]
    """By rank: how many rows come from there."""
    made_of: tuple[tuple[int, int, int], ...]
    """What is read, one stretch after another: (of the own rows, of the fetched ones, or zeros; where; how many)."""


@lru_cache(maxsize=1024)
def _way(near: Near, rank: int) -> _Way:
    size = len(near.reads)
    held = [_placed(near.cut.pieces(size, one)) for one in range(size)]
    none: tuple[Positions, ...] = ()
    gets = [none if one == rank else _common(near.reads[rank], held[one]) for one in range(size)]
    sent = [none if one == rank else _common(near.reads[one], held[rank]) for one in range(size)]
    own = [(low, high, place, _OWN) for low, high, place in held[rank]]
    arrived = [(low, high, place, _FETCHED) for low, high, place in _placed([range_ for part in gets for range_ in part])]
    sources = sorted([*own, *arrived])
    return _Way(
        tuple(tuple((_place(low, held[rank]), high - low) for low, high in part) for part in sent),
        tuple(sum(high - low for low, high in part) for part in gets),
        tuple(one for read in near.reads[rank] for one in _made_of(read, sources)),
    )


def _placed(ranges: Sequence[Positions]) -> list[tuple[int, int, int]]:
    """The ranges, with the place of the first row of each where they are held one after the other."""
    found, place = [], 0
    for low, high in ranges:
        found.append((low, high, place))
        place += high - low
    return found


def _place(position: int, held: Sequence[tuple[int, int, int]]) -> int:
    return next(place + position - low for low, high, place in held if low <= position < high)


def _common(reads: Sequence[Positions], held: Sequence[tuple[int, int, int]]) -> tuple[Positions, ...]:
    """What several ranges read of what is held: each position once, ascending.

    >>> _common([(-2, 4), (2, 9)], [(0, 3, 0), (6, 8, 3)])
    ((0, 3), (6, 8))
    """
    found: list[Positions] = []
    for low, high in sorted((max(a, low), min(b, high)) for a, b in reads for low, high, _ in held):
        if found and low < found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        elif low < high:
            found.append((low, high))
    return tuple(found)


def _made_of(read: Positions, sources: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    found, at = [], read[0]
    for low, high, place, source in sources:
        start, stop = max(at, low), min(read[1], high)
        if start < stop:
            found += [(_ZEROS, 0, start - at)] * (start > at) + [(source, place + start - low, stop - start)]
            at = stop
    return found + [(_ZEROS, 0, read[1] - at)] * (read[1] > at)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, near: Near, axis: tuple[str, int, int]) -> Tensor:
        ctx.near, ctx.axis, ctx.count = near, axis, rows.shape[0]
        ways = [_way(near, one) for one in range(axis[1])]
        parts = on_rank(lambda rank, x: tuple(_taken(x, part) for part in ways[rank].sent), axis, rows)
        arrived = exchanged(parts, [way.received for way in ways], axis)

        def read(rank: int, x: Tensor, more: Tensor) -> Tensor:
            sources = x, more
            return torch.cat([x[:0], *(
                x.new_zeros(length, x.shape[1]) if source == _ZEROS else sources[source].narrow(0, place, length)
                for source, place, length in ways[rank].made_of
            )])  # fmt: skip

        found: Tensor = on_rank(read, axis, rows, arrived)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        axis, count = ctx.axis, ctx.count
        ways = [_way(ctx.near, one) for one in range(axis[1])]

        def apart(rank: int, g: Tensor) -> tuple[Tensor, ...]:
            way, at = ways[rank], 0
            sums = g.new_zeros(count, g.shape[1]), g.new_zeros(sum(way.received), g.shape[1])
            for source, place, length in way.made_of:
                if source != _ZEROS:
                    sums[source].narrow(0, place, length).add_(g.narrow(0, at, length))
                at += length
            return (sums[0], *sums[1].split(list(way.received)))

        own, *others = on_rank(apart, axis, grad)
        back = exchanged(tuple(others), [tuple(sum(length for _, length in part) for part in way.sent) for way in ways], axis)

        def added(rank: int, x: Tensor, more: Tensor) -> Tensor:
            x, at = x.clone(), 0
            for place, length in (one for part in ways[rank].sent for one in part):
                x.narrow(0, place, length).add_(more.narrow(0, at, length))
                at += length
            return x

        return on_rank(added, axis, own, back), None, None


def _taken(x: Tensor, stretches: Sequence[_Stretch]) -> Tensor:
    return torch.cat([x[:0], *(x.narrow(0, place, length) for place, length in stretches)])
