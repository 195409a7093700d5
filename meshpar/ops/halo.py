"""Attention in a sliding window over a sequence that is cut: a rank fetches the few keys before its own, not all.

window 3     rank 0: 0 1 2 3     rank 1: 4 5 6 7          rank 1 fetches the keys and values 2 and 3, and sends none of its own
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from meshpar.ops.context import scored
from meshpar.ops.each_rank import each_rank
from meshpar.ops.layouts import Segments
from meshpar.ops.near import Near, Positions, fetched
from meshpar.sharding.types import Shard


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
    cut = Shard(dim, repeat, tuple(segments))
    rows = torch.cat([rearrange(x, "b k s e -> s (b k e)") for x in (key, value)], -1)
    near = fetched(rows, before_each(cut, window, size), (group, size, rank))
    b, heads, width = key.shape[0], key.shape[1], key.shape[-1]
    keys, values = near[:, : b * heads * width], near[:, b * heads * width :]
    keys, values = (rearrange(x, "s (b k e) -> b k s e", b=b, k=heads) for x in (keys, values))
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if rank >= 0:
        return windows_at(query, keys, values, cut.pieces(size, rank), window, **options)  # type: ignore[arg-type]
    calls = [((query, keys, values, cut.pieces(size, one), window), options) for one in range(size)]
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


@lru_cache(maxsize=256)
def before_each(cut: Shard, window: int, size: int) -> Near:
    """Of a sequence cut over `size` ranks: each piece, and the `window - 1` positions before it."""
    return Near(cut, tuple(tuple((low - window + 1, high) for low, high in cut.pieces(size, rank)) for rank in range(size)))
