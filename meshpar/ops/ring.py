"""Attention whose keys and values go round: no rank ever holds more than its own part of a sequence and one other's.

    step 0     q_r meets k_r, v_r                              own part
    step i     q_r meets k_(r-i), v_(r-i)                      from the neighbour, which passes on what it had
    result     sum of the parts' results, each weighted by exp(its log-sum-exp - that of all)

Backward sends keys and values round once more, with the sums of their gradients, which arrive at home after the last step. Scores are
computed for some queries at a time, in float32 or wider. Source: Liu et al., Ring Attention (arXiv 2310.01889); the formulas are those of
FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import on_rank, rotated
from meshpar.sharding.types import Shard

SCORES = 2**24
"""The most scores that are computed at a time."""

Span = tuple[int, int]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Attention of the queries that this rank holds, with the keys and values of all ranks.

    `query`: `[b, h, s_local, e]`, `key`: `[b, k, s_local, e]`, `value`: `[b, k, s_local, f]`, all cut along the positions in the layout
    (dim, repeat, segments) of one `Shard`; h is a multiple of k. `causal`: the query at position i sees the keys 0 to i, with `window` only
    the last `window` of them. Returns `[b, h, s_local, f]`. Every rank sends its keys and values `size - 1` times forward, and backward
    again with their gradients.
    """
    how = _Ring(
        Shard(dim, repeat, tuple(segments)), causal, window, query.shape[-1] ** -0.5 if scale is None else scale, (group, size, rank)
    )
    found: Tensor = _RingAttention.apply(query, key, value, how)
    return found


@dataclass(frozen=True)
class _Ring:
    cut: Shard
    causal: bool
    window: int | None
    scale: float
    axis: tuple[str, int, int]

    def pairs(self, rank: int, step: int) -> Iterator[tuple[Span, Span, Span, Span]]:
        """What meets in a step: spans of the queries and of the keys, first where they are held, then their positions."""
        size = self.axis[1]
        for queries, here in _spans(self.cut.ranges(size, rank)):
            for keys, there in _spans(self.cut.ranges(size, (rank - step) % size)):
                if not self._is_hidden(here, there):
                    yield queries, keys, here, there

    def _is_hidden(self, queries: Span, keys: Span) -> bool:
        """Whether no query of a span sees any key of another."""
        late = self.causal and keys[0] > queries[1] - 1
        return late or (self.window is not None and keys[1] - 1 <= queries[0] - self.window)

    def hidden(self, queries: Span, keys: Span, device: torch.device) -> Tensor | None:
        """`[queries, keys]`: True where the query does not see the key; None where all see all."""
        seen = not self.causal or keys[1] - 1 <= queries[0]
        if seen and (self.window is None or keys[0] > queries[1] - 1 - self.window):
            return None
        behind = torch.arange(*queries, device=device)[:, None] - torch.arange(*keys, device=device)
        hidden = behind < 0
        return hidden if self.window is None else hidden | (behind >= self.window)


def _spans(ranges: tuple[Span, ...]) -> list[tuple[Span, Span]]:
    """Where each range of positions is held, and the range."""
    found, start = [], 0
    for low, high in ranges:
        found.append(((start, start + high - low), (low, high)))
        start += high - low
    return found


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _Ring) -> Tensor:
        size, held = how.axis[1], _packed(key, value, how)
        out, lse = on_rank(partial(_empty, key.shape, value.shape[-1]), how.axis, query)
        for step in range(size):
            out, lse = on_rank(partial(_meet, how, step, key.shape, value.shape), how.axis, query, held, out, lse)
            if step < size - 1:
                held = rotated(held, how.axis)
        found: Tensor = on_rank(lambda _, x, like: rearrange(x, "b k g s f -> b (k g) s f").to(like.dtype), how.axis, out, query)
        ctx.save_for_backward(query, key, value, found, lse)
        ctx.how = how
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        query, key, value, found, lse = ctx.saved_tensors
        how, held = ctx.how, _packed(key, value, ctx.how)
        delta = on_rank(partial(_delta, key.shape), how.axis, found, grad)
        of_query, back = on_rank(_zeros, how.axis, query, held)
        for step in range(how.axis[1]):
            work = partial(_return, how, step, key.shape, value.shape)
            of_query, back = on_rank(work, how.axis, query, held, grad, lse, delta, of_query, back)
            if step < how.axis[1] - 1:
                held = rotated(held, how.axis)
            back = rotated(back, how.axis)
        unpack = partial(_unpacked, key.shape, value.shape)
        of_key, of_value = on_rank(lambda _, x, like: tuple(part.to(like.dtype) for part in unpack(x)), how.axis, back, key)
        return on_rank(lambda _, x, like: x.to(like.dtype), how.axis, of_query, query), of_key, of_value, None


def _packed(key: Tensor, value: Tensor, how: _Ring) -> Tensor:
    """Keys and values as one message."""
    found: Tensor = on_rank(lambda _, k, v: torch.cat([k.reshape(-1), v.reshape(-1)]), how.axis, key, value)
    return found


def _unpacked(key: torch.Size, value: torch.Size, held: Tensor) -> tuple[Tensor, Tensor]:
    count = key.numel()
    return held[:count].view(key), held[count:].view(value)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _empty(key: torch.Size, width: int, rank: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """The result of no keys at all, `[b, k, g, s, f]`, and its log-sum-exp."""
    b, h, s, _ = query.shape
    like = _wide(query.new_empty(()))
    return like.new_zeros(b, key[1], h // key[1], s, width), like.new_full((b, key[1], h // key[1], s), -torch.inf)


def _zeros(rank: int, query: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    return _wide(query.new_zeros(query.shape)), _wide(held.new_zeros(held.shape))


def _delta(key: torch.Size, rank: int, found: Tensor, grad: Tensor) -> Tensor:
    return rearrange((_wide(found) * _wide(grad)).sum(-1), "b (k g) s -> b k g s", k=key[1])


def _few(queries: Span, positions: Span, keys: Span, shape: torch.Size) -> Iterator[tuple[slice, Span]]:
    """The queries of a span, so many at a time that their scores are not too many."""
    rows = max(1, SCORES // max(1, shape[0] * shape[1] * (keys[1] - keys[0])))
    for low in range(*queries, rows):
        high, shift = min(low + rows, queries[1]), positions[0] - queries[0]
        yield slice(low, high), (low + shift, high + shift)


def _scores(how: _Ring, query: Tensor, key: Tensor, queries: Span, keys: Span) -> Tensor:
    scores = torch.einsum("bkgse,bkte->bkgst", query, key) * how.scale
    hidden = how.hidden(queries, keys, query.device)
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _meet(
    how: _Ring, step: int, key: torch.Size, value: torch.Size, rank: int, query: Tensor, held: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The result and log-sum-exp with what arrived in this step."""
    k, v = (_wide(part) for part in _unpacked(key, value, held))
    q = rearrange(_wide(query), "b (k g) s e -> b k g s e", k=key[1])
    out, lse = out.clone(), lse.clone()
    for queries, keys, here, there in how.pairs(rank, step):
        for rows, positions in _few(queries, here, keys, query.shape):
            scores = _scores(how, q[..., rows, :], k[..., slice(*keys), :], positions, there)
            own = scores.logsumexp(-1)
            total = torch.logaddexp(lse[..., rows], own)
            safe = total.masked_fill(total == -torch.inf, 0.0)  # a query that has seen nothing yet
            weights = (scores - safe[..., None]).exp()
            kept = (lse[..., rows] - safe).exp()
            out[..., rows, :] = out[..., rows, :] * kept[..., None] + torch.einsum("bkgst,bktf->bkgsf", weights, v[..., slice(*keys), :])
            lse[..., rows] = total
    return out, lse


def _return(
    how: _Ring,
    step: int,
    key: torch.Size,
    value: torch.Size,
    rank: int,
    query: Tensor,
    held: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    of_query: Tensor,
    back: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients with what arrived in this step."""
    k, v = (_wide(part) for part in _unpacked(key, value, held))
    q, g = (rearrange(_wide(x), "b (k g) s e -> b k g s e", k=key[1]) for x in (query, grad))
    of_query, back = of_query.clone(), back.clone()
    dq = rearrange(of_query, "b (k g) s e -> b k g s e", k=key[1])
    dk, dv = _unpacked(key, value, back)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    for queries, keys, here, there in how.pairs(rank, step):
        span = slice(*keys)
        for rows, positions in _few(queries, here, keys, query.shape):
            weights = (_scores(how, q[..., rows, :], k[..., span, :], positions, there) - safe[..., rows, None]).exp()
            dv[..., span, :] += torch.einsum("bkgst,bkgsf->bktf", weights, g[..., rows, :])
            of_weights = torch.einsum("bkgsf,bktf->bkgst", g[..., rows, :], v[..., span, :])
            of_scores = weights * (of_weights - delta[..., rows, None]) * how.scale
            dq[..., rows, :] += torch.einsum("bkgst,bkte->bkgse", of_scores, k[..., span, :])
            dk[..., span, :] += torch.einsum("bkgst,bkgse->bkte", of_scores, q[..., rows, :])
    return of_query, back
