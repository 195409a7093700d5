"""Attention of a part of the queries: what a rank of an axis that cuts the sequence computes.

    position    0 1 2 3 | 4 5 6 7          rank 1 of 2 has the queries 4 to 7: it needs all keys, and sees the causal pattern's lower half
    query 4     x x x x | x . . .
    query 5     x x x x | x x . .

A causal mask says "not what comes after me" of global positions. A local call with `is_causal` would take the first local query for the
first position. Here every contiguous range of queries meets the keys up to its end, aligned at the lower right corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meshpar.ops.each_rank import each_rank
from meshpar.ops.layouts import Segments
from meshpar.sharding.types import Shard

TABLE = 2**24
"""The most pairs of queries and keys of which a table is made at a time."""


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
    found = []
    for block in blocks(ranges, key.shape[-2], window):
        bias = mask_of(block, window, query)
        keys, values = (x.narrow(-2, block.first, block.last - block.first) for x in (key, value))
        part = query.narrow(-2, block.start, block.length)
        found.append(scored(part, keys, values, bias, causal=bias is None, scale=scale, enable_gqa=enable_gqa))
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
) -> Tensor:
    """Attention of `[b, h, s, e]` with `[b, k, t, e]` and `[b, k, t, f]`, each head of which serves h / k of the queries', under a mask."""
    return scored(query, key, value, attn_mask, causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def scored(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """torch's attention. Where kernels with a mask know no grouped heads, these are repeated."""
    if enable_gqa and bias is not None and repeats_heads(query):
        key, value, enable_gqa = repeated(key, query), repeated(value, query), False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=enable_gqa)


def repeats_heads(query: Tensor) -> bool:
    """Whether kernels with a mask know no grouped heads (without one they do): elsewhere than on a CPU."""
    return query.device.type != "cpu"


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


class QueryBlock(NamedTuple):
    """Queries that attend together, and the keys that any of them sees."""

    start: int
    """Where they are held."""
    length: int
    low: int
    """The position of the first one."""
    first: int
    last: int
    """The keys from `first` to `last - 1`."""


def blocks(ranges: Sequence[tuple[int, int]], keys: int, window: int | None = None) -> list[QueryBlock]:
    """The queries at `ranges`, so many at a time that what each sees of the keys is no large table (see `attention_at`)."""
    found, start = [], 0
    for begin, end in ranges:
        rows = end - begin if begin == 0 and window is None else max(1, TABLE // max(1, min(end, keys)))
        for low in range(begin, end, max(1, rows)):
            high = min(low + rows, end)
            first = 0 if window is None else max(0, low - window + 1)
            found.append(QueryBlock(start + low - begin, high - low, low, first, min(high, keys)))
        start += end - begin
    return found


def mask_of(block: QueryBlock, window: int | None, like: Tensor) -> Tensor | None:
    """What is added to the scores of a block's queries: `[queries, keys]` in the dtype of `like`; None where `is_causal` says it.

    (Numbers: of a mask of booleans the kernels make, and keep for backward, numbers of their own.)
    """
    high = block.low + block.length
    if block.low == 0 and (window is None or window >= high):
        return None
    behind = block.low - block.first
    seen = torch.ones(block.length, block.last - block.first, dtype=torch.bool, device=like.device).tril(behind)
    seen = seen if window is None else seen.triu(behind - window + 1)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
