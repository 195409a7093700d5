"""Products with a parameter whose weight gradient can wait: backward returns the input gradient, and the rest is work for later.

    y = linear(x, w, b, later)        later None, or closed:   the gradient of w in backward, as usual
                                      later open:              backward adds (w, how to compute its gradient) to it
    later.run()                                                computes and accumulates what has gathered

Zero-bubble pipeline schedules fill their idle time with this (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241). Everything
that is not such a product, biases and norms among it, gets its gradient in backward: only what is large is worth waiting for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshpar.ops.experts import grouped_mm as _grouped_mm
from meshpar.ops.experts import grouped_outer

Work = tuple[Tensor, Callable[[], Tensor]]


class WeightGradients:
    """Weight gradients that wait: open while an input-gradient pass runs, run later. One per microbatch in flight."""

    def __init__(self) -> None:
        self._open = False
        self._work: list[Work] = []

    @property
    def is_open(self) -> bool:
        """Whether gradients are put off rather than computed."""
        return self._open

    def open(self) -> None:
        """From now on, backward puts weight gradients off."""
        self._open = True

    def close(self) -> None:
        """From now on, backward computes everything."""
        self._open = False

    def add(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Put off the gradient of a leaf."""
        self._work.append((weight, gradient))

    @torch.no_grad()
    def run(self) -> None:
        """Compute and accumulate what was put off, in the order of backward; hooks of the leaves run as after any backward."""
        work, self._work = self._work, []
        for weight, gradient in work:
            torch.autograd.backward(weight, gradient())

    def __len__(self) -> int:
        return len(self._work)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, later: WeightGradients | None = None) -> Tensor:
    """`torch.nn.functional.linear`: `x` [..., i], `weight` [o, i], `bias` [o] -> [..., o]."""
    if later is None or not torch.is_grad_enabled():
        return torch.nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, False, later)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, later: WeightGradients | None = None) -> Tensor:
    """`x @ weight + bias`: `x` [..., i], `weight` [i, o], `bias` [o] -> [..., o]."""
    return linear(x, weight.t(), bias) if later is None or not torch.is_grad_enabled() else _Linear.apply(x, weight, bias, True, later)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, later: WeightGradients | None = None) -> Tensor:
    """`meshpar.ops.experts.grouped_mm`: `x` [n, i], `weight` [E, i, o] ([E, o, i] if `transposed`), `offsets` [E] -> [n, o]."""
    if later is None or not torch.is_grad_enabled():
        return _grouped_mm(x, weight.transpose(1, 2) if transposed else weight, offsets)
    return _GroupedMM.apply(x, weight, offsets, transposed, later)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.transposed, ctx.later = weight, transposed, later  # recompute detaches what is saved: the leaf itself is needed
        return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        rows = grad.reshape(-1, grad.shape[-1])
        for_x = (rows @ (weight.t() if ctx.transposed else weight)).view_as(x) if ctx.needs_input_grad[0] else None
        for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            a, b = (x.reshape(-1, x.shape[-1]), rows) if ctx.transposed else (rows, x.reshape(-1, x.shape[-1]))
            for_weight = _now_or_later(ctx.later, weight, lambda: a.t() @ b)
        return for_x, for_weight, for_bias, None, None


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.weight, ctx.later, ctx.transposed = weight, later, transposed
        return _grouped_mm(x, weight.transpose(1, 2) if transposed else weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x, offsets), weight = ctx.saved_tensors, ctx.weight
        grad = grad.contiguous()
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = _grouped_mm(grad, weight if ctx.transposed else weight.transpose(1, 2), offsets)
        for_weight = None
        if ctx.needs_input_grad[1]:
            a, b = (grad, x) if ctx.transposed else (x, grad)
            for_weight = _now_or_later(ctx.later, weight, lambda: grouped_outer(a, b, offsets))
        return for_x, for_weight, None, None, None


def _now_or_later(later: WeightGradients, weight: Tensor, gradient: Callable[[], Tensor]) -> Tensor | None:
    if not later.is_open:
        return gradient()
    later.add(weight, gradient)
    return None
