"""Attention of queries with some of the keys, on one rank: by a kernel of torch's where it is plain, in tiles where it is not.

                      keys 0 to 3    4 to 7    8 to 11
    queries 4 to 7    all            causal    none          two calls of a kernel, if nothing is added to scores

As operators: one call each for whoever counts, or has no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from meshpar.ops.fused_attention import FusedAttention, fused_attention_for, in_rows
from meshpar.ops.pairings import Pairing, Sight, Stretch
from meshpar.ops.tiles import Scoring, attend, attend_backward, join

LEAST = 64
"""The fewest queries, and the fewest keys, for which a kernel is called."""


class SeenBlock(NamedTuple):
    """Queries held in a row that see every one of some keys held in a row, or those up to their own position."""

    rows: tuple[int, int]
    """Where the first is held, and how many there are."""
    columns: tuple[int, int]
    causal: bool

    def queries(self, x: Tensor) -> Tensor:
        """Those of `[b, h, s, ...]`."""
        return x.narrow(2, *self.rows)

    def keys(self, x: Tensor) -> Tensor:
        """Those of `[b, k, t, ...]`."""
        return x.narrow(2, *self.columns)


@lru_cache(maxsize=512)
def apart(pairing: Pairing, sight: Sight) -> tuple[list[SeenBlock], Pairing | None]:
    """What a kernel computes in whole calls, and the rest.

    >>> keys = Stretch(0, 0, 64), Stretch(64, 256, 64), Stretch(128, 512, 64), Stretch(192, 1024, 64)
    >>> whole, rest = apart(Pairing((Stretch(0, 512, 64), Stretch(64, 544, 16)), keys), Sight(causal=True))
    >>> whole
    [SeenBlock(rows=(0, 64), columns=(0, 128), causal=False), SeenBlock(rows=(0, 64), columns=(128, 64), causal=True)]
    >>> rest.queries
    (Stretch(held=64, at=544, size=16),)
    """
    whole, others = list[SeenBlock](), list[Stretch]()
    for rows in pairing.queries:
        blocks = _blocks(rows, pairing.keys, sight)
        if blocks is None:
            others.append(rows)
        else:
            whole += blocks
    return whole, Pairing(tuple(others), pairing.keys) if others else None


def _blocks(rows: Stretch, keys: Sequence[Stretch], sight: Sight) -> list[SeenBlock] | None:
    """What these queries see, if it is of whole blocks that are worth a call."""
    every, own = list[tuple[int, int]](), list[tuple[int, int]]()
    for held, at, size in keys:
        columns = Stretch(held, at, size)
        if sight.none(rows, columns):
            continue
        if sight.all(rows, columns):
            joins = bool(every) and sum(every[-1]) == held
            every[-1:] = [(every[-1][0], every[-1][1] + size)] if joins else [*every[-1:], (held, size)]
        elif (rows.at, rows.size) == (at, size) and (sight.window is None or sight.window >= size):
            own.append((held, size))
        else:
            return None
    found = [SeenBlock((rows.held, rows.size), columns, columns in own) for columns in (*every, *own)]
    return found if all(min(rows.size, one.columns[1]) >= LEAST for one in found) else None


def _work(
    query: Tensor, key: Tensor, value: Tensor, pairings: Sequence[int], scoring: Scoring
) -> tuple[list[tuple[FusedAttention, float, SeenBlock]], list[Pairing]]:
    """What a kernel computes, at which scale, and what is left for tiles."""
    every, scale = Pairing.read(pairings), scoring.factor
    if scale is None:
        return [], every
    parts = [apart(one, scoring.sight) for one in every]
    whole = [block for blocks, _ in parts for block in blocks]
    kernel = fused_attention_for(query, key, value) if whole else None
    if kernel is None:
        return [], every
    return [(kernel, scale, block) for block in whole], [rest for _, rest in parts if rest is not None]


@torch.library.custom_op("meshpar::attend_", mutates_args=("out", "norm"))
def attend_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    pairings: Sequence[int],
    scoring: str,
    out: Tensor,
    norm: Tensor,
) -> None:
    """`attend` of `ops/tiles.py`, of pairings that are written one after the other."""
    how = Scoring.read(scoring)
    blocks, rest = _work(query, key, value, pairings, how)
    for kernel, scale, block in blocks:
        found, total = kernel.forward(block.queries(query), block.keys(key), block.keys(value), block.causal, scale)
        own, sums = block.queries(out), block.queries(norm)
        joined = join(own, sums, found.to(out.dtype), total.to(norm.dtype), norm.new_zeros(()))
        own.copy_(joined[0])
        sums.copy_(joined[1])
    attend(query, key, value, operands, rest, how, out, norm)


@torch.library.custom_op("meshpar::attend_backward_", mutates_args=("of_query", "of_key", "of_value", "of_operands"))
def attend_backward_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    pairings: Sequence[int],
    scoring: str,
    grad: Tensor,
    found: Tensor,
    norm: Tensor,
    delta: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_operands: Sequence[Tensor],
) -> None:
    """`attend_backward`, likewise. `found` `[b, h, s, f]`: the results, of all keys."""
    how = Scoring.read(scoring)
    blocks, rest = _work(query, key, value, pairings, how)
    for kernel, scale, block in blocks:
        own = block.queries(query), block.keys(key), block.keys(value), in_rows(block.queries(found)), block.queries(norm).sum(-1)
        more = kernel.backward(in_rows(block.queries(grad).to(query.dtype)), *own, block.causal, scale)
        for whole, part in zip((block.queries(of_query), block.keys(of_key), block.keys(of_value)), more, strict=True):
            whole += part
    gradients = of_query, of_key, of_value, of_operands
    attend_backward(query, key, value, operands, rest, how, grad, norm, delta, *gradients)


@attend_.register_fake
@attend_backward_.register_fake
def _(*operands: object) -> None:
    return None
