"""Attention in a sliding window over a sequence that is cut: a rank fetches the few keys before its own, not all.

    window 3     rank 0: 0 1 2 3     rank 1: 4 5 6 7          rank 1 fetches the keys and values 2 and 3, and sends none of its own

Backward sends the gradients of what was fetched back to where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.context import scored
from meshpar.ops.each_rank import each_rank
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import exchanged, on_rank
from meshpar.sharding.types import Shard

Positions = tuple[int, int]


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Attention in a sliding window of a sequence that is whole: the query at position i sees the keys i - window + 1 to i."""
    behind = torch.arange(query.shape[-2], device=query.device)[:, None] - torch.arange(key.shape[-2], device=query.device)
    mask = (behind >= 0) & (behind < window)
    return scored(query, key, value, mask, causal=False, scale=scale, enable_gqa=enable_gqa)


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    window: int,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Attention of the queries that this rank holds: the one at position i sees the keys i - window + 1 to i.

    `query`: `[b, h, s_local, e]`, `key`: `[b, k, s_local, e]`, `value`: `[b, k, s_local, f]`, all cut along the positions in the layout
    (dim, repeat, segments) of one `Shard`. Returns `[b, h, s_local, f]`. Each range of positions that a rank holds costs `window - 1` keys
    and values forward, and their gradients backward.
    """
    how = _Halo(Shard(dim, repeat, tuple(segments)), window, (group, size, rank))
    rows = torch.cat([rearrange(x, "b k s e -> s (b k e)") for x in (key, value)], -1)
    b, heads, width = key.shape[0], key.shape[1], key.shape[-1]
    near = _Fetch.apply(rows, how)
    keys, values = near[:, : b * heads * width], near[:, b * heads * width :]
    keys, values = (rearrange(x, "s (b k e) -> b k s e", b=b, k=heads) for x in (keys, values))
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if rank >= 0:
        return windows_at(query, keys, values, how.cut.pieces(size, rank), window, **options)  # type: ignore[arg-type]
    calls = [((query, keys, values, how.cut.pieces(size, one), window), options) for one in range(size)]
    found: Tensor = each_rank(windows_at, *calls, group=group)
    return found


def windows_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Sequence[Positions],
    window: int,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of the queries at the global positions `ranges`; `key` and `value` hold `window - 1` positions more before each range."""
    found, start, before = [], 0, 0
    for low, high in ranges:
        length = high - low
        behind = torch.arange(length, device=query.device)[:, None] + window - 1 - torch.arange(length + window - 1, device=query.device)
        there = torch.arange(low - window + 1, high, device=query.device) >= 0
        mask = (behind >= 0) & (behind < window) & there
        keys, values = (x.narrow(-2, before, length + window - 1) for x in (key, value))
        queries = query.narrow(-2, start, length)
        found.append(scored(queries, keys, values, mask, causal=False, scale=scale, enable_gqa=enable_gqa))
        start, before = start + length, before + length + window - 1
    return found[0] if len(found) == 1 else torch.cat(found, -2)


@dataclass(frozen=True)
class _Halo:
    cut: Shard
    window: int
    axis: tuple[str, int, int]

    def way(self, rank: int) -> _Way:
        """What a rank sends, gets, and where that belongs."""
        return _way(self.cut, self.window, self.axis[1], rank)


@dataclass(frozen=True)
class _Way:
    sent: tuple[tuple[int, ...], ...]
    """By rank: the places, among the rows held here, of those that go there."""
    received: tuple[int, ...]
    """By rank: how many rows come from there."""
    places: tuple[int, ...]
    """For every row that attention reads, its place among the own rows, then the received ones, then one of zeros."""


@lru_cache(maxsize=256)
def _way(cut: Shard, window: int, size: int, rank: int) -> _Way:
    held = [_positions(cut.pieces(size, one)) for one in range(size)]
    owner = {position: one for one, own in enumerate(held) for position in own}
    wanted = [
        sorted({p for low, _ in cut.pieces(size, one) for p in range(max(0, low - window + 1), low)} - set(held[one]))
        for one in range(size)
    ]
    mine = {position: place for place, position in enumerate(held[rank])}
    sent = tuple(tuple(mine[p] for p in wanted[one] if owner[p] == rank) for one in range(size))
    arrived = [p for one in range(size) for p in wanted[rank] if owner[p] == one]
    place = mine | {position: len(mine) + at for at, position in enumerate(arrived)}
    nothing = len(mine) + len(arrived)
    near = [p for low, high in cut.pieces(size, rank) for p in range(low - window + 1, high)]
    received = tuple(sum(owner[p] == one for p in wanted[rank]) for one in range(size))
    return _Way(sent, received, tuple(place.get(p, nothing) for p in near))


def _positions(ranges: Sequence[Positions]) -> list[int]:
    return [position for low, high in ranges for position in range(low, high)]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, how: _Halo) -> Tensor:
        ctx.how = how
        ways = [how.way(one) for one in range(how.axis[1])]
        parts = on_rank(lambda rank, x: tuple(x[list(places)] for places in ways[rank].sent), how.axis, rows)
        arrived = exchanged(parts, [way.received for way in ways], how.axis)

        def near(rank: int, x: Tensor, more: Tensor) -> Tensor:
            return torch.cat([x, more, x.new_zeros(1, x.shape[1])]).index_select(0, _places(ways[rank], x))

        found: Tensor = on_rank(near, how.axis, rows, arrived)
        ctx.count = rows.shape[0]
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        how, count = ctx.how, ctx.count
        ways = [how.way(one) for one in range(how.axis[1])]

        def apart(rank: int, g: Tensor) -> tuple[Tensor, ...]:
            way = ways[rank]
            whole = g.new_zeros(count + sum(way.received) + 1, g.shape[1]).index_add(0, _places(way, g), g)
            return (whole[:count], *whole[count:-1].split(list(way.received)))

        own, *fetched = on_rank(apart, how.axis, grad)
        back = exchanged(tuple(fetched), [tuple(len(places) for places in way.sent) for way in ways], how.axis)

        def added(rank: int, x: Tensor, more: Tensor) -> Tensor:
            places = [place for places in ways[rank].sent for place in places]
            return x.index_add(0, torch.tensor(places, dtype=torch.int64, device=x.device), more)

        return on_rank(added, how.axis, own, back), None


def _places(way: _Way, like: Tensor) -> Tensor:
    return torch.tensor(way.places, device=like.device)
