"""Attention of a part of the queries: what a rank of an axis that cuts the sequence computes.

    position    0 1 2 3 | 4 5 6 7          rank 1 of 2 has the queries 4 to 7: it needs all keys, and sees the causal pattern's lower half
    query 4     x x x x | x . . .
    query 5     x x x x | x x . .

A causal mask says "not what comes after me" of global positions. A local call with `is_causal` would take the first local query for the
first position. Here every contiguous range of queries meets the keys up to its end, aligned at the lower right corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshpar.ops.each_rank import each_rank
from meshpar.ops.layouts import Segments
from meshpar.sharding.types import Shard


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Causal attention of the queries that this rank holds. No communication.

    `query`: `[b, h, s_local, e]`, cut along `dim`, its positions, in the layout (dim, repeat, segments) of a `Shard`; `key`, `value`:
    `[b, k, t, e]` and `[b, k, t, f]`, all positions. The query at global position i sees the keys 0 to i,
    with `window` only the last `window` of them. Returns `[b, h, s_local, f]`.
    """
    cut = Shard(dim, repeat, tuple(segments))
    how = {"window": window, "scale": scale, "enable_gqa": enable_gqa}
    if rank >= 0:
        return attention_at(query, key, value, cut.ranges(size, rank), **how)  # type: ignore[arg-type]
    calls = [((query, key, value, cut.ranges(size, one)), how) for one in range(size)]
    found: Tensor = each_rank(attention_at, *calls, group=group)
    return found


def attention_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Sequence[tuple[int, int]],
    *,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of the queries at the global positions `ranges` (`[start, stop)`, in the order in which `query` holds them).

    `query`: `[b, h, s_local, e]`; `key`, `value`: `[b, k, t, e]` and `[b, k, t, f]`, all positions. The query at position i sees the keys 0
    to i, with `window` only the last `window` of them. Returns `[b, h, s_local, f]`.

    >>> q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    >>> whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> part = attention_at(q[:, :, 4:], k, v, [(4, 8)])
    >>> torch.allclose(part, whole[:, :, 4:], atol=1e-6)
    True
    """
    found, start = [], 0
    for low, high in ranges:
        first, last = 0 if window is None else max(0, low - window + 1), min(high, key.shape[-2])
        mask = _mask(query, low, high, first, last, window)
        keys, values = (x.narrow(-2, first, last - first) for x in (key, value))
        part = query.narrow(-2, start, high - low)
        how: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": enable_gqa}
        found.append(F.scaled_dot_product_attention(part, keys, values, **how))
        start += high - low
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def _mask(query: Tensor, low: int, high: int, first: int, last: int, window: int | None) -> Tensor | None:
    """What the queries `[low, high)` see of the keys `[first, last)`; None where that is causal from the first key on."""
    if low == 0 and (window is None or window >= high):
        return None
    mask = torch.ones(high - low, last - first, dtype=torch.bool, device=query.device).tril(low - first)
    return mask if window is None else mask.triu(low - first - window + 1)
