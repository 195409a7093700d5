"""Attention whose scores are changed before the softmax, as the model wrote it: capped, biased by distance, masked in several ways.

    scores = steps(scale * query @ key^T)            steps: see `ops/tiles.py`; the numbers and operands are the model's own
    result = softmax(scores) @ value

It is computed in tiles: no table of all pairs of positions is made but what the operands are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from meshpar.ops.blockwise import attend_, attend_backward_
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.halo import before_each
from meshpar.ops.layouts import Segments
from meshpar.ops.near import fetched
from meshpar.ops.pairings import Pairing, Stretch, held
from meshpar.ops.tiles import (
    ScoreStep,
    Scoring,
    add_of_sink,
    nothing_yet,
    of_four_dims,
    sums_of,
    told,
    wide,
)
from meshpar.sharding.types import Shard
from meshpar.simulate import axis_rank, per_rank


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Sequence[Tensor] = (),
    *,
    steps: Sequence[ScoreStep] = (),
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of a sequence that is whole.

    `query`: `[b, h, s, e]`, `key`: `[b, k, t, e]`, `value`: `[b, k, t, f]`, h a multiple of k; `added`: the operands of the steps, each
    broadcast to `[b, h, s, t]`. `window`: of the keys before it, a query sees that many of the last. Returns `[b, h, s, f]`.
    """
    whole = Pairing(*((Stretch(0, 0, x.shape[-2]),) for x in (query, key))).numbers
    how = _Local(told(query, scale, steps, causal=is_causal, window=window), lambda rank: whole)
    found: Tensor = _Scored.apply(query, key, value, how, *of_four_dims(added))
    return found


def scored_attention_of_a_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Sequence[Tensor],
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    steps: Sequence[ScoreStep] = (),
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """The same of the queries that this rank holds, in the layout (dim, repeat, segments) of a `Shard`, with all keys and values.

    `added`: of this rank's queries and all keys. No communication.
    """
    cut, keys = Shard(dim, repeat, tuple(segments)), key.shape[-2]

    def pairings(rank: int) -> list[int]:
        return Pairing(held(cut.ranges(size, rank)), (Stretch(0, 0, keys),)).numbers

    how = _Local(told(query, scale, steps, causal=causal, window=window), pairings, group, rank)
    found: Tensor = _Scored.apply(query, key, value, how, *of_four_dims(added))
    return found


def scored_halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Sequence[Tensor],
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    steps: Sequence[ScoreStep] = (),
    window: int,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """The same in a sliding window, of queries, keys and values of which this rank holds the same positions: it fetches the few before.

    `added`: of this rank's queries, one number for all keys.
    """
    cut = Shard(dim, repeat, tuple(segments))
    rows = torch.cat([rearrange(x, "b k s e -> s (b k e)") for x in (key, value)], -1)
    near = fetched(rows, before_each(cut, window, size), (group, size, rank))
    b, heads, count = key.shape[0], key.shape[1], key.shape[0] * key.shape[1] * key.shape[3]
    keys, values = (rearrange(x, "s (b k e) -> b k s e", b=b, k=heads) for x in (near[:, :count], near[:, count:]))

    def pairings(rank: int) -> list[int]:
        found, before = list[int](), 0
        for own in held(cut.pieces(size, rank)):
            first = max(0, own.at - window + 1)
            near = Stretch(before + first - (own.at - window + 1), first, own.at + own.size - first)
            found += Pairing((own,), (near,)).numbers
            before += own.size + window - 1
        return found

    how = _Local(told(query, scale, steps, causal=True, window=window), pairings, group, rank)
    found: Tensor = _Scored.apply(query, keys, values, how, *of_four_dims(added))
    return found


@dataclass(frozen=True)
class _Local:
    """What meets on each rank of an axis, and how it scores."""

    scoring: Scoring
    pairings: Callable[[int], list[int]]
    group: str = ""
    rank: int = 0

    def told(self, world_rank: int) -> tuple[list[int], str]:
        """The same for the operators of tiles, of one rank that this process runs."""
        rank = self.rank if self.rank >= 0 else axis_rank(self.group, world_rank)
        return self.pairings(rank), self.scoring.written


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _Local, *added: Tensor) -> Tensor:
        def run(rank: int, q: Tensor, k: Tensor, v: Tensor, *added: Tensor) -> tuple[Tensor, Tensor]:
            out, norm = nothing_yet(q, v.shape[-1], how.scoring.sink_of(added))
            attend_(q, k, v, added, *how.told(rank), out, norm)
            return out.to(q.dtype), norm

        found, norm = per_rank(run, query, key, value, *added)
        ctx.save_for_backward(query, key, value, found, norm, *added)
        ctx.how = how
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        how, needed = ctx.how, ctx.needs_input_grad[4:]

        def run(
            rank: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Tensor, norm: Tensor, *added: Tensor
        ) -> tuple[Tensor, ...]:
            gradients, sums = [wide(x.new_zeros(x.shape)) for x in (q, k, v)], sums_of(added, needed)
            delta = (wide(found) * wide(grad)).sum(-1)
            attend_backward_(q, k, v, added, *how.told(rank), grad, found, norm, delta, *gradients, sums)
            if (sink := how.scoring.sink_of(added)) is not None:
                add_of_sink(sink, how.scoring.sink_of(sums), norm, delta)
            return tuple(x.to(like.dtype) for x, like in zip((*gradients, *sums), (q, k, v, *added), strict=True))

        of_query, of_key, of_value, *of_added = per_rank(run, grad, *ctx.saved_tensors)
        return of_query, of_key, of_value, None, *(x if need else None for x, need in zip(of_added, needed, strict=True))
