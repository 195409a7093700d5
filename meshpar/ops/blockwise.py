"""Attention of queries with some of the keys, on one rank: by a kernel of torch's where it is plain, in tiles where it is not.

    queries that see all of some keys, or those up to their own position      a call of a kernel, of samples that see alike
    a block that a mask hides in part, biases, caps, few queries              tiles
    a block of which nothing is seen                                          nothing

As operators: one call each for whoever counts, or has no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meshpar.ops.fused_attention import FusedAttention, fused_attention_for, in_rows
from meshpar.ops.pairings import Pairing
from meshpar.ops.seen import Mask, SeenBlock, apart, by_masks, by_position, in_blocks, is_worth
from meshpar.ops.tiles import Scoring, attend, attend_backward, join, shown_by


class _Work(NamedTuple):
    """What a kernel computes of some samples, and what is left for tiles."""

    samples: slice
    blocks: Sequence[tuple[FusedAttention, float, SeenBlock]]
    """With the kernel, and the scale of products."""
    rest: Sequence[Pairing]

    def of(self, x: Tensor) -> Tensor:
        """The part of a tensor, or of an operand that may be the same for all samples."""
        return x[self.samples] if x.shape[0] > 1 else x


def _work(
    query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], pairings: Sequence[int], scoring: Scoring, wanted: Sequence[bool]
) -> list[_Work]:
    """`wanted`: the operands of which gradients are."""
    every, masked = Pairing.read(pairings), scoring.masked
    plain = masked is not None and not any(wanted[place] for place, _ in masked.operands)
    kernel = fused_attention_for(query, key, value) if plain else None
    if masked is None or kernel is None:
        return [_Work(slice(None), (), every)]
    found, masks = list[_Work](), [_mask(operands[place], by) for place, by in masked.operands]
    for pairing in every:
        if not is_worth(pairing):
            found.append(_Work(slice(None), (), [pairing]))
            continue
        looked_at = in_blocks(pairing) if masks else pairing
        table = by_position(looked_at, scoring.sight)
        for samples, seen in by_masks(looked_at, table, masks) if masks else [(slice(None), table)]:
            whole, rest = apart(looked_at, seen)
            found.append(_Work(samples, [(kernel, masked.scale, block) for block in whole], rest))
    return found


def _mask(operand: Tensor, by: str) -> Mask:
    shown = shown_by(operand, by)
    return Mask(shown, operand == 0 if by == "-inf" else shown)


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
    for work in _work(query, key, value, operands, pairings, how, [False] * len(operands)):
        q, k, v, of_out, of_norm = (work.of(x) for x in (query, key, value, out, norm))
        for kernel, scale, block in work.blocks:
            found, total = kernel.forward(block.queries(q), block.keys(k), block.keys(v), block.causal, scale)
            own, sums = block.queries(of_out), block.queries(of_norm)
            joined = join(own, sums, found.to(out.dtype), total.to(norm.dtype), norm.new_zeros(()))
            own.copy_(joined[0])
            sums.copy_(joined[1])
        attend(q, k, v, [work.of(x) for x in operands], work.rest, how, of_out, of_norm)


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
    how, wanted = Scoring.read(scoring), [x.shape == of.shape for x, of in zip(operands, of_operands, strict=True)]
    for work in _work(query, key, value, operands, pairings, how, wanted):
        q, k, v, asked, out, sums, products = (work.of(x) for x in (query, key, value, grad, found, norm, delta))
        gradients = work.of(of_query), work.of(of_key), work.of(of_value)
        for kernel, scale, block in work.blocks:
            own = block.queries(q), block.keys(k), block.keys(v), in_rows(block.queries(out)), block.queries(sums).sum(-1)
            more = kernel.backward(in_rows(block.queries(asked).to(query.dtype)), *own, block.causal, scale)
            for whole, part in zip((block.queries(gradients[0]), *map(block.keys, gradients[1:])), more, strict=True):
                whole += part
        of_masks = [work.of(x) for x in of_operands]
        attend_backward(q, k, v, [work.of(x) for x in operands], work.rest, how, asked, sums, products, *gradients, of_masks)


@attend_.register_fake
@attend_backward_.register_fake
def _(*operands: object) -> None:
    return None
