"""What experts make of rows, step by step: of all rows at once, or of some at a time.

    (("meshpar.grouped_mm.default", ("%0", "%2", "%1"), ()), ("aten.silu.default", ("%3",), ()))        silu(grouped_mm(rows, w, ends))

Every step treats rows one by one, by their expert alone, so pieces give what all rows give. The gradient of a matrix is one product of the
rows of all pieces, which the last one in backward hands on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshpar.ops import again, experts
from meshpar.ops.again import CheapStep
from meshpar.ops.collectives import refuse_second_derivative

PRODUCT, ITEM, JOINED = "meshpar.grouped_mm.default", "_operator.getitem", "meshpar.ops.again.computed"
"""Names of steps: a product, one of several results, and cheap operators joined by `again.computed`, whose steps are its first argument."""


def run(steps: tuple[CheapStep, ...], known: list[Any], product: Callable[..., Tensor] = experts.grouped_mm) -> Tensor:
    """The result of the last step. A step is the name of an operator, its arguments and keyword arguments, as of `again.computed`.

    "%0" among them are the rows and "%1" their ends, by expert, then come other operands and the results of steps. `known`: all but these.
    """
    for name, args, kwargs in steps:
        if name == JOINED:
            known.append(again.computed(args[0], *again.values(args[1:], known)))
            continue
        given = again.values(args, known)
        if name == ITEM:
            known.append(given[0][given[1]])
        elif name == PRODUCT:
            known.append(product(*given))
        else:
            known.append(again.operator(name)(*given, **{key: again.values(arg, known) for key, arg in kwargs}))
    found: Tensor = known[-1]
    return found


class Pieces:
    """The same steps on some rows at a time, each of which gives its share of the gradients of matrices."""

    def __init__(self, steps: tuple[CheapStep, ...]) -> None:
        self._steps = steps
        self._sums = [_MatrixGradient() for name, *_ in steps if name == PRODUCT]

    def run(self, known: list[Any], *, last: bool = False) -> Tensor:
        """`run`, of one piece. `last`: in backward, of the first one that is called."""
        left = iter(self._sums)
        return run(self._steps, known, lambda *args: _ProductOfAPiece.apply(*args, next(left), last))


class _MatrixGradient:
    """The gradient of a matrix of every expert, of the rows of several pieces: one product of all of them, when the last one is here.

    (A sum of a product for each piece reads and writes the whole gradient every time.)
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, grad: Tensor, ends: Tensor) -> None:
        """More rows: `x` [n, i], `grad` [n, o], `ends` [E]."""
        self._pieces.append((x, grad, ends))

    def taken(self) -> Tensor:
        """The gradient, which begins anew: [E, i, o]."""
        pieces, self._pieces = self._pieces, []
        x, grad, ends = pieces[0]
        found = x.new_zeros(ends.shape[0], x.shape[1], grad.shape[1])
        of_expert: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for x, grad, ends in pieces:
            for expert, rows in experts.groups(ends):
                of_expert.setdefault(expert, []).append((x[rows], grad[rows]))
        for expert, parts in of_expert.items():
            rows_of_x, rows_of_grad = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*parts, strict=True))
            torch.mm(rows_of_x.t(), rows_of_grad, out=found[expert])
        return found


class _ProductOfAPiece(torch.autograd.Function):
    """`grouped_mm` of one piece. `last`: the last one in backward, which has the gradient of the matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, sums: _MatrixGradient, last: bool) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.sums, ctx.last = sums, last
        return experts.grouped_mm(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        for_x = experts.grouped_mm(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            ctx.sums.add(x, grad, ends)
            for_weight = ctx.sums.taken() if ctx.last else None
        return for_x, for_weight, None, None, None
