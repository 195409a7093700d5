"""Products beside their own collectives, in pieces: what each rank has of a sequence is multiplied while the next rank's part travels.

    y = linear(s_to_r(x, 1, ...), w)          y, = gathered(x, (w,), (None,), 1, ...)

        network   x of rank - 1 ...   x of rank - 2 ...
        rank      own rows of y       those of rank - 1      those of rank - 2

    z = p_to_s(linear(a, v), 1, ...)          z = scattered(a, v, 1, ...)

        network                       rows of rank + 1 ...   rows of rank + 2 ...
        rank      rows of rank + 1    rows of rank + 2       own rows, and the sum

    y = p_to_i(linear(a, v), ...)             y = reduced(a, v, ...)

        network                       sum of the first rows .   sum of the next ....
        rank      first rows of y     next rows                 ...

As many bytes are sent as by the collectives, in size - 1 parts, each to one rank, or (sums) in `PIECES`; the part of a rank is one message,
or, where it is large and ranks are few, several, of which one is multiplied while the next travels. `gathered` keeps the part of x that the
rank has, and gathers it again in backward while the gradients of x are computed: one all-gather more, and 1/size of the memory (as Megatron
does), also where products are computed `at_once`. The gradient sum of `gathered` runs beside the weight gradients, its own and those that
others leave (see `ops.products`); the gather in the backward of `scattered` is in pieces, too. Rows are multiplied in groups, and parts
summed from the own one backward: rounding differs from that of whole products. Only sequences that all ranks have equal parts of, of one
stretch each, travel in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from meshpar.ops import collectives, products
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import STARTS, Finish, all_gather, all_reduce_in_place, reduce_scatter, start_shift
from meshpar.ops.products import Beside

PIECES = 4
"""Of a sum: all but the last of them travel beside products."""
PARTS, LEAST = 8, 2**18
"""In how many parts a product is computed at most, where ranks are fewer, and the bytes that a message then has at least."""
Matrices = tuple[Tensor, ...]
Biases = tuple[Tensor | None, ...]


def gathered(
    x: Tensor,
    weights: Matrices,
    biases: Biases,
    dim: int,
    repeat: int,
    segments: Segments,
    later: Beside | None = None,
    others: Matrices = (),
    *,
    whole: bool = False,
    at_once: bool = False,
    group: str,
    size: int,
    rank: int,
) -> tuple[Tensor, ...]:
    """The products of `s_to_r(x)` with `weights`: `x` [..., n, i] cut along `dim`, `weights` [o, i] -> one [..., n * size, o] each.

    In backward the gradients of `others`, which are left in `later`, are computed while that of `x` is summed. `whole`: the last result is
    `s_to_r(x)` itself, for those who read it and do not keep it; then the products are not in pieces. Nor are they where ranks have
    unequal parts, or parts of several stretches, or if all is to be computed `at_once`.
    """
    layout, axis = (dim, repeat, segments), (group, size, rank)
    if not _travels(size, rank):
        y = (
            collectives.s_to_r(x, *layout, group=group, size=size, rank=rank)
            if later is None
            else products.convert(x, later, others, "s_to_r", *layout, group=group, size=size, rank=rank)
        )
        return _of_whole(y, weights, biases, whole)
    form = (whole, at_once or not is_one_stretch(repeat, segments, size))
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *weights)):
        return _forward(x, weights, biases, layout, axis, form)
    return _Gathered.apply(x, later, layout, axis, form, len(weights), *weights, *biases, *others)


def _of_whole(y: Tensor, weights: Matrices, biases: Biases, whole: bool) -> tuple[Tensor, ...]:
    found = tuple(linear(y, w, b) for w, b in zip(weights, biases, strict=True))
    return (*found, y) if whole else found


def _forward(x: Tensor, weights: Matrices, biases: Biases, layout: Any, axis: Any, form: tuple[bool, bool]) -> tuple[Tensor, ...]:
    whole, at_once = form
    if whole or at_once:
        return _of_whole(all_gather(x, layout, axis), weights, biases, whole)
    return tuple(_products(x, weights, biases, layout[0], axis))


def is_one_stretch(repeat: int, segments: Segments, size: int) -> bool:
    """Whether ranks have equal parts of one stretch each, which can travel by themselves."""
    return repeat == 1 and len(segments) == 1 and segments[0][0] > 0 and segments[0][0] % size == 0


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, later: Beside | None, layout: Any, axis: Any, form: tuple[bool, bool], count: int, *rest: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, others = rest[:count], rest[count : 2 * count], rest[2 * count :]
        if later is not None:
            later.is_open = x.requires_grad
        ctx.save_for_backward(x, *weights)
        ctx.later, ctx.layout, ctx.axis, ctx.count, ctx.others = later, layout, axis, count, len(others)
        ctx.set_materialize_grads(False)
        found = _forward(x, weights, biases, layout, axis, form)
        ctx.shape = (*found[0].shape[:-1], x.shape[-1])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (x, *weights), needed, count = ctx.saved_tensors, ctx.needs_input_grad, ctx.count
        of_whole, grads = grads[count:], grads[:count]
        wanted = [grad is not None and need for grad, need in zip(grads, needed[6 : 6 + count], strict=True)]
        again = STARTS[all_gather](x, ctx.layout, ctx.axis) if any(wanted) else None
        rows = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for_x = _for_x(rows, weights, ctx.shape) if needed[0] else None
        if needed[0] and of_whole and of_whole[0] is not None:
            for_x = of_whole[0] if for_x is None else for_x.add_(of_whole[0])
        flying = None if for_x is None else STARTS[reduce_scatter](for_x, ctx.layout, ctx.axis)
        for_weights: list[Tensor | None] = [None] * count
        if again is not None:
            columns = again().reshape(-1, x.shape[-1])
            for_weights = [
                products.outer(columns, r, w.t()).t() if want and r is not None else None
                for r, w, want in zip(rows, weights, wanted, strict=True)
            ]
        needs = needed[6 + count : 6 + 2 * count]
        for_biases = [r.sum(0) if need and r is not None else None for r, need in zip(rows, needs, strict=True)]
        for_others = ctx.later.run(ctx.others) if ctx.later is not None else []
        return None if flying is None else flying(), None, None, None, None, None, *for_weights, *for_biases, *for_others


def _for_x(rows: list[Tensor | None], weights: list[Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """The gradient of what was multiplied, summed as autograd does: the last use first."""
    total: Tensor | None = None
    for r, weight in zip(reversed(rows), reversed(weights), strict=True):
        if r is not None:
            one = r.mm(weight)
            total = one if total is None else total.add_(one)
    return None if total is None else total.view(shape)


def _products(x: Tensor, weights: Matrices, biases: Biases, dim: int, axis: tuple[str, int, int]) -> list[Tensor]:
    """The products, the own rows first, then those of each rank whose part arrives."""
    shape = [*x.shape[:dim], x.shape[dim] * axis[1], *x.shape[dim + 1 : -1]]
    results = [x.new_empty([*shape, w.shape[0]]) for w in weights]
    for part, start in _coming(x, dim, axis):
        for y, w, b in zip(results, weights, biases, strict=True):
            _multiply(part, w, b, y.narrow(dim, start, part.shape[dim]))
    return results


def messages(n: int, nbytes: int, size: int) -> int:
    """How many messages `n` rows of that many bytes are, from one of `size` ranks to another: equal ones."""
    return next((count for count in range(min(PARTS // size, nbytes // LEAST), 1, -1) if n % count == 0), 1)


def _coming(x: Tensor, dim: int, axis: tuple[str, int, int]) -> Iterator[tuple[Tensor, int]]:
    """What all ranks have, and where it begins in the whole: the own part at once, the others as they arrive."""
    _, size, rank = axis
    n = x.shape[dim]
    length = n // messages(n, x.nbytes, size)
    arriving = [(by, at, start_shift(x.narrow(dim, at, length), by, axis)) for by in range(1, size) for at in range(0, n, length)]
    yield x, rank * n
    for by, at, arrive in arriving:
        yield arrive(), (rank - by) % size * n + at


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A product into a part of a tensor."""
    if not out.is_contiguous():
        out.copy_(linear(x, weight, bias))
        return
    columns, rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(columns, weight.t(), out=rows)
    else:
        torch.addmm(bias, columns, weight.t(), out=rows)


def scattered(
    a: Tensor,
    weight: Tensor,
    dim: int,
    repeat: int,
    segments: Segments,
    later: Beside | None = None,
    number: int = 0,
    helped: Beside | None = None,
    others: Matrices = (),
    *,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """`p_to_s` of a product: `a` [..., n, i], `weight` [o, i] -> [..., n / size, o] of the sum over the axis.

    The gradient of the weight is left in `later`, if that is given, under its `number`. In backward those of `others`, which are left in
    `helped`, are computed while the gradient is gathered.
    """
    layout, axis = (dim, repeat, segments), (group, size, rank)
    if not _travels(size, rank):
        pending = linear(a, weight) if later is None else products.linear(a, weight, None, later, number)
        if helped is not None:
            return products.convert(pending, helped, others, "p_to_s", *layout, group=group, size=size, rank=rank)
        return collectives.p_to_s(pending, *layout, group=group, size=size, rank=rank)
    if not torch.is_grad_enabled() or not (a.requires_grad or weight.requires_grad):
        return _scattered(a, weight, dim, axis)
    waits = later is not None and later.is_open and a.requires_grad and weight.requires_grad
    return _Scattered.apply(a, weight, later if waits else None, number, helped, layout, axis, *others)


def _scattered(a: Tensor, weight: Tensor, dim: int, axis: tuple[str, int, int]) -> Tensor:
    _, size, rank = axis
    n = a.shape[dim] // size
    length = n // messages(n, a.nbytes // (size * a.shape[-1]) * weight.shape[0], size)
    flying: list[tuple[int, Finish]] = []
    for by in range(1, size):
        for at in range(0, n, length):
            flying.append((at, start_shift(linear(a.narrow(dim, (rank + by) % size * n + at, length), weight), by, axis)))
    own = linear(a.narrow(dim, rank * n, n), weight)
    for at, arrive in flying:
        own.narrow(dim, at, length).add_(arrive())
    return own


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, later: Any, number: int, helped: Any, layout: Any, axis: Any, *others: Tensor
    ) -> Tensor:
        if helped is not None:
            helped.is_open = True
        ctx.save_for_backward(a, weight)
        ctx.later, ctx.number, ctx.helped, ctx.others, ctx.dim, ctx.axis = later, number, helped, len(others), layout[0], axis
        return _scattered(a, weight, layout[0], axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        a, weight = ctx.saved_tensors
        grad = grad.contiguous()
        whole = grad.new_empty([*a.shape[:-1], weight.shape[0]])
        for_a = torch.empty_like(a, memory_format=torch.contiguous_format)
        for_others: list[Tensor | None] = []
        for part, start in _coming(grad, ctx.dim, ctx.axis):
            whole.narrow(ctx.dim, start, part.shape[ctx.dim]).copy_(part)
            _multiply(part, weight.t(), None, for_a.narrow(ctx.dim, start, part.shape[ctx.dim]))
            if part is grad and ctx.helped is not None:
                for_others = ctx.helped.run(ctx.others)
        rows, columns = whole.view(-1, weight.shape[0]), a.reshape(-1, a.shape[-1])
        return for_a, _for_weight(ctx, rows, columns), None, None, None, None, None, *for_others


def reduced(a: Tensor, weight: Tensor, later: Beside | None = None, number: int = 0, *, group: str, size: int, rank: int) -> Tensor:
    """`p_to_i` of a product: `a` [..., i], `weight` [o, i] -> [..., o], summed over the axis. `later`, `number`: as of `scattered`."""
    if not _travels(size, rank):
        pending = linear(a, weight) if later is None else products.linear(a, weight, None, later, number)
        return collectives.p_to_i(pending, group=group, size=size, rank=rank)
    axis = (group, size, rank)
    if not torch.is_grad_enabled() or not (a.requires_grad or weight.requires_grad):
        return _reduced(a, weight, axis)
    waits = later is not None and later.is_open and a.requires_grad and weight.requires_grad
    return _Reduced.apply(a, weight, later if waits else None, number, axis)


def _reduced(a: Tensor, weight: Tensor, axis: tuple[str, int, int]) -> Tensor:
    start = STARTS[all_reduce_in_place]
    flying = [start(rows.mm(weight.t()), (), axis) for rows in a.reshape(-1, a.shape[-1]).chunk(PIECES)]
    return torch.cat([arrive() for arrive in flying]).view(*a.shape[:-1], -1)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, later: Beside | None, number: int, axis: Any) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.later, ctx.number = later, number
        return _reduced(a, weight, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        a, weight = ctx.saved_tensors
        rows, columns = grad.reshape(-1, grad.shape[-1]), a.reshape(-1, a.shape[-1])
        for_a = rows.mm(weight).view(a.shape) if ctx.needs_input_grad[0] else None
        return for_a, _for_weight(ctx, rows, columns), None, None, None


def _for_weight(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor | None:
    """The gradient of the weight of a product, unless it is left to somebody else."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.later is None:
        return rows.t().mm(columns)
    ctx.later.put(ctx.number, lambda: rows.t().mm(columns))
    return None


def _travels(size: int, rank: int) -> bool:
    """Whether pieces are sent: not among simulated ranks, and not where a compiler orders what runs."""
    return size > 1 and rank >= 0 and not torch.compiler.is_compiling()
