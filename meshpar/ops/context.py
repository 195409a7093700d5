"""Attention of a part of the queries: what a rank of an axis that cuts the sequence computes.

    position    0 1 2 3 | 4 5 6 7          rank 1 of 2 has the queries 4 to 7: it needs all keys, and sees the causal pattern's lower half
    query 4     x x x x | x . . .
    query 5     x x x x | x x . .

A causal mask says "not what comes after me" of global positions. A local call with `is_causal` would take the first local query for the
first position. Here every contiguous range of queries meets the keys up to its end, aligned at the lower right corner.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Causal attention of the queries that this rank holds. No communication.

    `query`: `[b, h, s_local, e]`, cut along `dim`, its positions, in the layout (dim, repeat, segments) of a `Shard`; `key`, `value`:
    `[b, k, t, e]` and `[b, k, t, f]`, all positions. The query at global position i sees the keys 0 to i. Returns `[b, h, s_local, f]`.
    """
    cut = Shard(dim, repeat, tuple(segments))
    how = {"scale": scale, "enable_gqa": enable_gqa}
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
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of the queries at the global positions `ranges` (`[start, stop)`, in the order in which `query` holds them).

    `query`: `[b, h, s_local, e]`; `key`, `value`: `[b, k, t, e]` and `[b, k, t, f]`, all positions. The query at position i sees the keys 0
    to i. Returns `[b, h, s_local, f]`.

    >>> q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    >>> whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> part = attention_at(q[:, :, 4:], k, v, [(4, 8)])
    >>> torch.allclose(part, whole[:, :, 4:], atol=1e-6)
    True
    """
    found, start = [], 0
    for low, high in ranges:
        part, seen = query.narrow(-2, start, high - low), min(high, key.shape[-2])
        mask = None if low == 0 else torch.ones(high - low, seen, dtype=torch.bool, device=query.device).tril(low)
        found.append(
            F.scaled_dot_product_attention(
                part,
                key.narrow(-2, 0, seen),
                value.narrow(-2, 0, seen),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        )
        start += high - low
    return found[0] if len(found) == 1 else torch.cat(found, -2)
