"""Embedding and cross entropy on a vocabulary that is sharded over a mesh axis: no rank ever holds the whole table or the whole logits.

    ids ──> embedding (masked look-up) ──> partial hidden states ... hidden ──> head ──> local logits ──> cross_entropy ──> loss
            rows of this rank                                                columns of this rank        3 numbers per token reduced

Layout and axis arguments as in `ops.collectives`; both functions work for every layout, uneven and empty shards included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meshpar._torch import functional
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import call, on_rank
from meshpar.sharding.types import Shard


class Traffic(NamedTuple):
    """One collective: what it is, when it runs ("forward" or "backward"), and the bytes each device sends."""

    kind: str
    phase: str
    nbytes: int


def embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Look `ids` up in the rows of a table that this rank holds: a partial value, zero where the row is another rank's. No communication.

    `weight` is `[local rows, c]`, sharded on `dim` 0; ids and `padding_idx` (None or -1: there is none) are global. The gradient is dense,
    `[local rows, c]`; the padding row's is zero. An id outside the whole table raises `IndexError`, as in one process.
    """
    assert dim == 0
    padding = -1 if padding_idx is None else padding_idx
    if size == 1:
        return torch.embedding(weight, ids, padding)
    return _Embedding.apply(ids, weight, padding, (repeat, segments), (group, size, rank))


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """`F.cross_entropy` of logits whose class dim is sharded; the loss is the same on every rank of the axis.

    `logits`: `[v_local]`, `[n, v_local]` or `[n, v_local, d1, ...]`, sharded on `dim`, the class dim. `target`: global class indices.
    `weight`: the full vector of class weights (every rank the same). `reduction`: "sum" or "none".
    Two all-reduces of 1 and 2 (with label smoothing 3) numbers per token, in float32 or wider; none in backward. For backward it keeps one
    tensor of the size of the local logits. Source: Megatron-LM (arXiv 1909.08053, section 3).
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"cross_entropy: reduction {reduction!r}; 'sum' or 'none' (a mean is the sum over its own denominator).")
    if size == 1:
        return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    how = Loss(dim, (repeat, segments), reduction, ignore_index, label_smoothing, (group, size, rank))
    return _CrossEntropy.apply(logits, target, weight, how)


def cross_entropy_traffic(tokens: int, dtype: torch.dtype, size: int, *, label_smoothing: float = 0.0) -> list[Traffic]:
    """The collectives of `cross_entropy` on `tokens` targets, as `collectives.traffic` counts them."""
    if size == 1:
        return []
    width = _accumulated_in(dtype).itemsize
    sums = 3 if label_smoothing else 2
    return [Traffic("all_reduce", "forward", 2 * (size - 1) * -(-n * tokens // size) * width) for n in (1, sums)]


# ------------------------------------------------------------------------------------------------------------------- embedding


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int, layout: Any, axis: Any) -> Tensor:
        out, rows, skipped = on_rank(lambda rank, ids, weight: _look_up(ids, weight, padding, layout, axis[1], rank), axis, ids, weight)
        ctx.layout, ctx.axis = layout, axis
        ctx.save_for_backward(rows, skipped)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        shard, size = Shard(0, *ctx.layout), ctx.axis[1]
        rows, skipped = ctx.saved_tensors
        table = on_rank(
            lambda rank, grad, rows, skipped: _add_rows(grad, rows, skipped, shard.local_length(size, rank)), ctx.axis, grad, rows, skipped
        )
        return None, table, None, None, None


def _look_up(ids: Tensor, weight: Tensor, padding: int, layout: Any, size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their local indices, and where no gradient goes."""
    rows, absent = _localize(ids, layout, size, rank)
    if weight.shape[0] == 0:
        weight = weight.new_zeros(1, weight.shape[1])  # something to look up, and to mask
    out = torch.embedding(weight, rows).masked_fill_(absent.unsqueeze(-1), 0)
    return out, rows, absent if padding < 0 else absent | (ids == padding)


def _add_rows(grad: Tensor, rows: Tensor, skipped: Tensor, length: int) -> Tensor:
    """The gradient of a table of `length` rows."""
    if length == 0:
        return grad.new_zeros(0, grad.shape[-1])
    return torch.ops.aten.embedding_dense_backward(grad.masked_fill(skipped.unsqueeze(-1), 0), rows, length, -1, False)


def _localize(ids: Tensor, layout: Any, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Global indices as local ones, and which of them are other ranks' (their local index is 0).

    Those that are no rank's stay out of range, so that the look-up fails as it would on one process.
    """
    shard = Shard(0, *layout)
    elsewhere = (ids >= 0) & (ids < shard.length)
    local, place = ids, 0
    ranges = shard.ranges(size, rank)
    for low, high in ranges:
        inside = (ids >= low) & (ids < high)
        elsewhere = elsewhere & ~inside
        shifted = ids - (low - place) if low != place else ids
        local = shifted if len(ranges) == 1 else torch.where(inside, shifted, local)
        place += high - low
    return local.masked_fill(elsewhere, 0), elsewhere


# --------------------------------------------------------------------------------------------------------------- cross entropy


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of a cross entropy before any tensor is."""

    dim: int
    layout: tuple[int, Segments]
    reduction: str
    ignore_index: int
    smoothing: float
    axis: tuple[str, int, int]

    @property
    def classes(self) -> int:
        return Shard(0, *self.layout).length

    def own(self, weight: Tensor, rank: int) -> Tensor:
        """The class weights of `rank`'s logits."""
        return torch.cat([weight[:0], *(weight[low:high] for low, high in Shard(0, *self.layout).ranges(self.axis[1], rank))])


class _CrossEntropy(torch.autograd.Function):
    """With m the largest logit, E = exp(x - m), s = sum E, w the class weights (else 1) and e the label smoothing over C classes:

    loss = (1 - e) w_t (log s - (x_t - m)) + e/C sum_c w_c (log s - (x_c - m))
    d loss / d x = E/s ((1 - e) w_t + e/C sum_c w_c) - (1 - e) w_t onehot(t) - e/C w
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, how: Loss) -> Tensor:
        group, axis = how.axis[0], how.axis
        weights = () if weight is None else (weight,)
        peak = call(functional.all_reduce.default, on_rank(lambda _, x: peak_of(x.movedim(how.dim, -1)), axis, logits), "max", group)
        exps, sums, index, absent = on_rank(partial(local_sums, how), axis, logits, target, peak, *weights)
        sums = call(functional.all_reduce.default, sums, "sum", group)
        loss, token_weight = on_rank(partial(loss_of, how), axis, sums, target, *weights)
        ctx.how = how
        ctx.save_for_backward(exps, sums, index, absent, token_weight, target, *weights)
        return on_rank(lambda _, x: (x.sum() if how.reduction == "sum" else x).to(logits.dtype), axis, loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return on_rank(partial(gradient_of, ctx.how), ctx.how.axis, grad, *ctx.saved_tensors), None, None, None


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def peak_of(x: Tensor) -> Tensor:
    """The largest logit of each token, of this rank's classes; classes last."""
    x = x if x.shape[-1] else x.new_full((*x.shape[:-1], 1), -torch.inf)
    return x.amax(-1).to(_accumulated_in(x.dtype))


def local_sums(how: Loss, rank: int, x: Tensor, target: Tensor, peak: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """E, this rank's share of (sum of E, target logit[, weighted sum of logits]), the target's local index and where it is elsewhere."""
    index, absent = _localize(target.masked_fill(target == how.ignore_index, 0), how.layout, how.axis[1], rank)
    shifted = x.movedim(how.dim, -1).to(peak.dtype) - peak.unsqueeze(-1)
    picked = shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill_(absent, 0) if x.shape[how.dim] else torch.zeros_like(peak)
    logits = [(shifted * how.own(weights[0], rank) if weights else shifted).sum(-1)] if how.smoothing else []
    exps = shifted.exp_()
    return exps.to(x.dtype), torch.stack([exps.sum(-1), picked, *logits]), index, absent


def loss_of(how: Loss, _: int, sums: Tensor, target: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every token, and its weight (zero where it is ignored)."""
    ignored = target == how.ignore_index
    known = target.masked_fill(ignored, 0)
    token_weight = (weights[0][known].to(sums.dtype) if weights else torch.ones_like(sums[0])).masked_fill_(ignored, 0)
    log_sum = sums[0].log()
    loss = (1 - how.smoothing) * token_weight * (log_sum - sums[1])
    if how.smoothing:
        total = weights[0].sum() if weights else how.classes
        loss = loss + how.smoothing / how.classes * (total * log_sum - sums[2])
    return loss.masked_fill_(ignored, 0), token_weight


def gradient_of(
    how: Loss,
    rank: int,
    grad: Tensor,
    exps: Tensor,
    sums: Tensor,
    index: Tensor,
    absent: Tensor,
    token_weight: Tensor,
    target: Tensor,
    *weights: Tensor,
) -> Tensor:
    hit = grad.to(sums.dtype) * (1 - how.smoothing) * token_weight
    scale = hit
    if how.smoothing:
        spread = (grad.to(sums.dtype) * how.smoothing / how.classes * torch.ones_like(hit)).masked_fill_(target == how.ignore_index, 0)
        scale = hit + spread * (weights[0].sum() if weights else how.classes)
    out = exps * (scale / sums[0]).unsqueeze(-1)
    if exps.shape[-1]:
        out.scatter_add_(-1, index.unsqueeze(-1), -hit.masked_fill(absent, 0).unsqueeze(-1))
    if how.smoothing:
        out -= spread.unsqueeze(-1) * (how.own(weights[0], rank) if weights else 1)
    return out.to(exps.dtype).movedim(-1, how.dim)
