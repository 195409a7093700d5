"""Cross entropy of a product, some rows after the other: of the logits, no more than those of some rows are ever there.

    forward     rows of x ──> their logits ──> their losses       kept: x, and three numbers for each row
    backward    rows of x ──> their logits again, their gradient ──> rows of the gradient of x; the gradients of weight and bias grow

A quarter of the head's operations more than all at once, and the same values: sums are taken in another order. Classes may be cut over a
mesh axis, as in `ops.vocab_parallel`: forward reduces two (with label smoothing three) numbers for each row, backward none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from meshpar._torch import functional
from meshpar.ops import again, vocab_parallel
from meshpar.ops.again import CheapStep
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import call

_CAST = "aten._to_copy.default"


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    segments: Segments,
    *,
    steps: tuple[CheapStep, ...] = (),
    repeat: int = 1,
    reduction: str = "sum",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    group: str = "",
    size: int = 1,
    rank: int = 0,
) -> Tensor:
    """`F.cross_entropy(linear(x, weight, bias).to(dtype), target, weights)`, `rows` rows at a time.

    `x` [n, i] after `steps` (slices and reshapes of logits, which leave the classes alone; casts are passed over), `weight` [v_local, i],
    `bias` [v_local], `target` [n] global class indices, `weights` all class weights. `segments` (and `repeat`): which classes this rank
    has, the layout of a `Shard`; the whole where `size` is 1. `reduction`: "sum" or "none". No more than `rows` rows, and those of
    simulated ranks, are taken at once.
    """
    for name, args, _ in steps:
        if name != _CAST:
            x = again.operator(name)(*again.values(args, (x,)))
    if rank < 0 or x.shape[0] <= rows or torch.compiler.is_compiling():  # (simulated ranks may have unequal rows)
        named: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        where: Any = {"group": group, "size": size, "rank": rank}
        logits = linear(x, weight, bias).to(dtype)
        return vocab_parallel.cross_entropy(logits, target, weights, 1, repeat, segments, **named, **where)
    how = vocab_parallel.Loss(1, (repeat, segments), reduction, ignore_index, label_smoothing, (group, size, rank))
    found: Tensor = _InParts.apply(x, weight, bias, target, weights, _Parts(how, rows, dtype))
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    how: vocab_parallel.Loss
    rows: int
    dtype: torch.dtype

    def of(self, *tensors: Tensor) -> Any:
        """The same rows of all tensors, part by part."""
        return zip(*(x.split(self.rows) for x in tensors), strict=True)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias).to(self.dtype)

    def summed(self, x: Tensor, operation: str) -> Tensor:
        """Over the ranks that have the other classes."""
        group, size, _ = self.how.axis
        return x if size == 1 else call(functional.all_reduce.default, x, operation, group)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: Tensor | None, parts: _Parts) -> Tensor:
        how, classes = parts.how, () if weights is None else (weights,)
        found: list[tuple[Tensor, ...]] = []
        for some, labels in parts.of(x, target):
            logits = parts.logits(some, weight, bias)
            peak = parts.summed(vocab_parallel.peak_of(logits), "max")
            _, sums, _, _ = vocab_parallel.local_sums(how, how.axis[2], logits, labels, peak, *classes)
            sums = parts.summed(sums, "sum")
            found.append((*vocab_parallel.loss_of(how, 0, sums, labels, *classes), peak, sums[0]))
            del logits
        losses, token_weight, peaks, sums = (torch.cat(one) for one in zip(*found, strict=True))
        ctx.parts = parts
        ctx.save_for_backward(x, weight, bias, target, weights, token_weight, peaks, sums)
        return (losses.sum() if how.reduction == "sum" else losses).to(parts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, bias, target, weights, *numbers = ctx.saved_tensors
        parts, needed = ctx.parts, ctx.needs_input_grad
        how, classes = parts.how, () if weights is None else (weights,)
        for_x = torch.empty_like(x) if needed[0] else None
        for_weight = _sum_of(weight) if needed[1] else None
        for_bias = _sum_of(bias) if needed[2] else None
        grads, start = grad.expand(x.shape[0]), 0
        for some, labels, one, token_weight, peak, sums in parts.of(x, target, grads, *numbers):
            logits = parts.logits(some, weight, bias)
            exps, own, index, absent = vocab_parallel.local_sums(how, how.axis[2], logits, labels, peak, *classes)
            del logits
            given = (one, exps, sums.expand(own.shape), index, absent, token_weight, labels, *classes)
            turned = vocab_parallel.gradient_of(how, how.axis[2], *given).to(x.dtype)
            del exps
            if for_x is not None:
                torch.mm(turned, weight, out=for_x[start : start + some.shape[0]])
            if for_weight is not None:
                for_weight += turned.t().mm(some)
            if for_bias is not None:
                for_bias += turned.sum(0)
            start += some.shape[0]
        of_weight, of_bias = (None if x is None else x.to(like.dtype) for x, like in ((for_weight, weight), (for_bias, bias)))
        return for_x, of_weight, of_bias, None, None, None


def _sum_of(like: Tensor) -> Tensor:
    """Zeros to add the gradients of all parts to: in float32 or wider, so that they are rounded once."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
