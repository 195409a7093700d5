"""Attention whose keys and values go round: no rank ever holds more than its own part of a sequence and one other's.

    step 0     q_r meets k_r, v_r                              own part
    step i     q_r meets k_(r-i), v_(r-i)                      from the neighbour, which passes on what it had
    result     sum of the parts' results, each weighted by exp(its log-sum-exp - that of all)

Backward sends keys and values round once more, and after them the sums of their gradients, which arrive at home after the last step:

    step i     gradients of k_(r-i), v_(r-i) from q_r      beside: k, v of the next step come, sums so far of k_(r-i), v_(r-i) come
               added to what came, passed on               the last time for nothing but to come home

What meets is computed by kernels or in tiles (`ops/blockwise.py`), so that nothing is as large as the queries times the keys of a part.
Source: Liu et al., Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meshpar.ops.blockwise import attend_, attend_backward_
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.layouts import Segments
from meshpar.ops.pairings import Pairing, held
from meshpar.ops.primitives import Finish, on_rank, start_rotated
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


def ring_attention(
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
    """Attention of the queries that this rank holds, with the keys and values of all ranks.

    `query`: `[b, h, s_local, e]`, `key`: `[b, k, s_local, e]`, `value`: `[b, k, s_local, f]`, all cut along the positions in the layout
    (dim, repeat, segments) of one `Shard`; h is a multiple of k. `causal`: the query at position i sees the keys 0 to i, with `window` only
    the last `window` of them. `added`: operands of the `steps` of scores, `[..., s_local, t]`, of this rank's queries and all keys. Returns
    `[b, h, s_local, f]`. Every rank sends its keys and values `size - 1` times forward, and backward again with their gradients.
    """
    scoring = told(query, scale, steps, causal=causal, window=window)
    how = _Ring(Shard(dim, repeat, tuple(segments)), scoring, (group, size, rank))
    found: Tensor = _RingAttention.apply(query, key, value, how, *of_four_dims(added))
    return found


@dataclass(frozen=True)
class _Ring:
    cut: Shard
    scoring: Scoring
    axis: tuple[str, int, int]

    def told(self, rank: int, step: int) -> tuple[list[int], str]:
        """What meets in a step, and how it scores: for the operators of tiles."""
        queries, keys = (held(self.cut.ranges(self.axis[1], one % self.axis[1])) for one in (rank, rank - step))
        return Pairing(queries, keys).numbers, self.scoring.written


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _Ring, *added: Tensor) -> Tensor:
        size, held = how.axis[1], _packed(key, value, how)
        out, norm = on_rank(lambda _, x, *added: nothing_yet(x, value.shape[-1], how.scoring.sink_of(added)), how.axis, query, *added)
        for step in range(size):
            coming = start_rotated(held, how.axis) if step < size - 1 else None
            on_rank(partial(_meet, how, step, key.shape, value.shape), how.axis, query, held, out, norm, *added)
            if coming is not None:
                held = coming()
        found: Tensor = on_rank(_cast, how.axis, out, query)
        ctx.save_for_backward(query, key, value, found, norm, *added)
        ctx.how = how
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        query, key, value, found, norm, *added = ctx.saved_tensors
        how, held, needed = ctx.how, _packed(key, value, ctx.how), ctx.needs_input_grad[4:]
        delta = on_rank(lambda _, x, g: (wide(x) * wide(g)).sum(-1), how.axis, found, grad)
        of_query = on_rank(_zeros, how.axis, query)
        sums = on_rank(lambda _, *x: tuple(sums_of(x, needed)), how.axis, *added) if added else ()
        back: Finish | None = None
        for step in range(how.axis[1]):
            coming = start_rotated(held, how.axis) if step < how.axis[1] - 1 else None
            own = on_rank(_zeros, how.axis, held)
            work = partial(_return, how, step, key.shape, value.shape)
            on_rank(work, how.axis, query, held, grad, found, norm, delta, of_query, own, *added, *sums)
            if back is not None:
                on_rank(_add, how.axis, own, back())
            back = start_rotated(own, how.axis)
            if coming is not None:
                held = coming()
        if how.scoring.sink_of(added) is not None:
            on_rank(partial(_of_sink, how), how.axis, norm, delta, *added, *sums)
        unpack = partial(_unpacked, key.shape, value.shape)
        assert back is not None
        of_key, of_value = on_rank(lambda _, x, like: tuple(part.to(like.dtype) for part in unpack(x)), how.axis, back(), key)
        of_added = [on_rank(_cast, how.axis, x, like) if need else None for x, like, need in zip(sums, added, needed, strict=True)]
        return on_rank(_cast, how.axis, of_query, query), of_key, of_value, None, *of_added


def _of_sink(how: _Ring, rank: int, norm: Tensor, delta: Tensor, *rest: Tensor) -> None:
    """Add the gradient of the scores whose weights are nobody's, once."""
    added, sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    add_of_sink(how.scoring.sink_of(added), how.scoring.sink_of(sums), norm, delta)  # type: ignore[arg-type]


def _packed(key: Tensor, value: Tensor, how: _Ring) -> Tensor:
    """Keys and values as one message."""
    found: Tensor = on_rank(lambda _, k, v: torch.cat([k.reshape(-1), v.reshape(-1)]), how.axis, key, value)
    return found


def _unpacked(key: torch.Size, value: torch.Size, held: Tensor) -> tuple[Tensor, Tensor]:
    count = key.numel()
    return held[:count].view(key), held[count:].view(value)


def _zeros(rank: int, like: Tensor) -> Tensor:
    return wide(like.new_zeros(like.shape))


def _add(rank: int, x: Tensor, more: Tensor) -> None:
    x += more


def _cast(rank: int, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _meet(how: _Ring, step: int, key: torch.Size, value: torch.Size, rank: int, *tensors: Tensor) -> None:
    """Add what arrived in this step to the results."""
    query, held, out, norm, *added = tensors
    attend_(query, *_unpacked(key, value, held), added, *how.told(rank, step), out, norm)


def _return(how: _Ring, step: int, key: torch.Size, value: torch.Size, rank: int, *tensors: Tensor) -> None:
    """Add the gradients with what arrived in this step."""
    query, held, grad, found, norm, delta, of_query, back, *rest = tensors
    added, sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    gradients = of_query, *_unpacked(key, value, back), sums
    attend_backward_(query, *_unpacked(key, value, held), added, *how.told(rank, step), grad, found, norm, delta, *gradients)
