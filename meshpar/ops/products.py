"""Products with parameters whose weight gradients are computed while a gradient sum is on its way.

    before                                 after
      x_r = i_to_r(x, ...)                   beside = products.beside()
      q   = linear(x_r, wq)                  x_r = products.i_to_r(x, beside, (wq, wk), ...)
      k   = linear(x_r, wk)                  q   = products.linear(x_r, wq, None, beside, 0)
                                             k   = products.linear(x_r, wk, None, beside, 1)

    backward, before      k: x, w       q: x, w       sum of x's gradient .........
    backward, after       k: x          q: x          sum of x's gradient .........
                                                      k: w       q: w

A product's backward returns the gradient of its input and leaves that of its weight in `beside`; the conversion, whose backward comes after
those of all products that read it, starts its collective, computes what lies there, and then waits. The weights are operands of the
conversion so that autograd gets their gradients from it: leaves, casts and hooks see one gradient, as ever. The same arithmetic in the same
order: the same bits. (A product's weight gradient needs its input and the gradient of its result, which are kept a little longer.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshpar.ops import collectives, expert_all_to_all
from meshpar.ops.collectives import PRIMITIVES, refuse_second_derivative
from meshpar.ops.experts import grouped_mm as _grouped_mm
from meshpar.ops.experts import grouped_outer
from meshpar.ops.primitives import STARTS, all_reduce_in_place

WeightGradient = Callable[[], Tensor]


class Beside:
    """Weight gradients to compute while a collective runs, by the number of the weight. `is_open`: whether something will compute them."""

    __slots__ = ("is_open", "work")

    def __init__(self) -> None:
        self.is_open = False
        self.work: dict[int, WeightGradient] = {}

    def put(self, number: int, gradient: WeightGradient) -> None:
        """Leave the gradient of a weight."""
        self.work[number] = gradient

    def run(self, count: int) -> list[Tensor | None]:
        """The gradients of `count` weights; None for one of which nothing was left."""
        work, self.work = self.work, {}
        return [work[number]() if number in work else None for number in range(count)]


def beside() -> Beside:
    """What a conversion and the products before its gradient share: new for each run of a graph."""
    return Beside()


def i_to_r(x: Tensor, later: Beside, weights: tuple[Tensor, ...], *, group: str, size: int, rank: int, reuse: bool = False) -> Tensor:
    """`ops.collectives.i_to_r`, in whose backward the gradients of `weights` are computed."""
    if not _flies(x, size):
        return collectives.i_to_r(x, group=group, size=size, rank=rank, reuse=reuse)
    return _Hiding.apply(x, later, "i_to_r", (), (group, size, rank), reuse, *weights)


def convert(x: Tensor, later: Beside, weights: tuple[Tensor, ...], name: str, *layout: Any, group: str, size: int, rank: int) -> Tensor:
    """Any other conversion of `ops.collectives` by its `name`, in whose backward the gradients of `weights` are computed."""
    if not _flies(x, size):
        return getattr(collectives, name)(x, *layout, group=group, size=size, rank=rank)
    return _Hiding.apply(x, later, name, layout, (group, size, rank), False, *weights)


def _flies(x: Tensor, size: int) -> bool:
    """Whether backward will send something (compilers order what they run themselves)."""
    return size > 1 and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Hiding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, later: Beside, name: str, layout: Any, axis: Any, reuse: bool, *weights: Tensor) -> Tensor:
        forward, backward = PRIMITIVES[name]
        later.is_open = True
        ctx.later, ctx.axis, ctx.count = later, axis, len(weights)
        ctx.conjugate = all_reduce_in_place if reuse else backward
        ctx.layout = (*layout[3:], *layout[:3])  # (of two shards the other one first)
        return forward(x, layout, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        finish = STARTS[ctx.conjugate](grad, ctx.layout, ctx.axis)
        gradients = ctx.later.run(ctx.count)
        return finish(), None, None, None, None, None, *gradients


def send_rows(
    x: Tensor,
    offsets: Tensor,
    later: Beside,
    weights: tuple[Tensor, ...],
    *,
    dropping: bool = False,
    group: str,
    size: int,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`expert_all_to_all.send_rows`, in whose backward the gradients of `weights` are computed."""
    if not _flies(x, size):
        return expert_all_to_all.send_rows(x, offsets, dropping=dropping, group=group, size=size, rank=rank)
    return _Sent.apply(x, offsets, later, (dropping, group, size, rank), *weights)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, later: Beside, how: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        dropping, group, size, rank = how
        rows, *route = expert_all_to_all.send_rows(x, offsets, dropping=dropping, group=group, size=size, rank=rank)
        later.is_open = True
        ctx.later, ctx.how, ctx.count = later, how, len(weights)
        ctx.save_for_backward(*route[1:])
        ctx.mark_non_differentiable(*route)
        return rows, *route

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dropping, *axis = ctx.how
        finish = expert_all_to_all.start_return_rows(grad, *ctx.saved_tensors, dropping=dropping, axis=tuple(axis))
        gradients = ctx.later.run(ctx.count)
        return finish(), None, None, None, *gradients


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, later: Beside, number: int) -> Tensor:
    """`torch.nn.functional.linear`: `x` [..., i], `weight` [o, i], `bias` [o] -> [..., o]."""
    if not _waits(x, weight, later):
        return torch.nn.functional.linear(x, weight, bias)
    product: Tensor = _Product.apply(x, weight, bias, later, number, False)
    return product


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, later: Beside, number: int) -> Tensor:
    """`x @ weight + bias`: `x` [..., i] (with a bias: [n, i]), `weight` [i, o], `bias` [o] -> [..., o]."""
    if not _waits(x, weight, later):
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    product: Tensor = _Product.apply(x, weight, bias, later, number, True)
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Beside, number: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.number, ctx.transposed = later, number, transposed
        if bias is None and x.dim() > 2:  # torch folds rows where a weight needs a gradient, which it does not see in here
            return x.reshape(-1, x.shape[-1]).mm(weight if transposed else weight.t()).view(*x.shape[:-1], -1)
        if transposed:
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        matrix = weight if ctx.transposed else weight.t()
        ctx.later.put(ctx.number, lambda: outer(columns, rows, matrix) if ctx.transposed else outer(columns, rows, matrix).t())
        for_x = (rows @ matrix.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return for_x, None, for_bias, None, None, None


def outer(x: Tensor, grad: Tensor, matrix: Tensor) -> Tensor:
    """The gradient of the `matrix` of a product, in the order of its memory, as torch has it."""
    if matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]:
        return grad.t().mm(x).t()
    return x.t().mm(grad)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, later: Beside, number: int) -> Tensor:
    """`ops.experts.grouped_mm`: `x` [n, i], `weight` [E, i, o], `offsets` [E] -> [n, o]."""
    if not _waits(x, weight, later):
        return _grouped_mm(x, weight, offsets)
    product: Tensor = _Grouped.apply(x, weight, offsets, later, number)
    return product


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, later: Beside, number: int) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.later, ctx.number = later, number
        return _grouped_mm(x, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        ctx.later.put(ctx.number, lambda: grouped_outer(x, grad, offsets))
        for_x = _grouped_mm(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
        return for_x, None, None, None, None


def _waits(x: Tensor, weight: Tensor, later: Beside) -> bool:
    """Whether there is a gradient of the weight, and a conversion that will compute it."""
    return later.is_open and weight.requires_grad and x.requires_grad and torch.is_grad_enabled()
