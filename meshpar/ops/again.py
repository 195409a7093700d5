"""Cheap operators one after the other, of which backward keeps the operands alone and computes the rest again.

    y = again.computed((("aten.silu.default", ("%0",), ()), ("aten.mul.Tensor", ("%2", "%1"), ())), gate, up)      mul(silu(gate), up)

    autograd keeps      gate, silu(gate), up
    here                gate, up

A step is the name of an operator, its arguments and keyword arguments. "%n" among them is the n-th value: operands first, then the results
of steps. The last result is returned. The same operators on the same numbers, forward and backward. (Where several of them read one
operand, its gradients are first summed here, then with those of others: the sum may be rounded in another order.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

CheapStep = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]


def computed(steps: tuple[CheapStep, ...], *operands: Tensor) -> Tensor:
    """The last result of `steps`."""
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    if not needed or torch.compiler.is_compiling():  # (compilers choose themselves)
        return _run(steps, operands)
    found: Tensor = _Again.apply(steps, *operands)
    return found


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: tuple[CheapStep, ...], *operands: Tensor) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(*operands)
        return _run(steps, operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        operands = ctx.saved_tensors
        if not twice:
            operands = [x.detach().requires_grad_() if need else x for x, need in zip(operands, needed, strict=True)]
        with torch.enable_grad():
            result = _run(ctx.steps, operands)
        wanted = [x for x, need in zip(operands, needed, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, grad, create_graph=twice, allow_unused=True))  # (a condition has none)
        return None, *(next(found) if need else None for need in needed)


def _run(steps: tuple[CheapStep, ...], operands: Sequence[Tensor]) -> Tensor:
    known = list(operands)
    for name, args, kwargs in steps:
        known.append(operator(name)(*values(args, known), **{key: values(arg, known) for key, arg in kwargs}))
    return known[-1]


def values(args: Any, known: Sequence[Any]) -> Any:
    """The arguments of a step, those of `known` in their places."""
    if isinstance(args, (list, tuple)):
        return [values(one, known) for one in args]
    return known[int(args[1:])] if isinstance(args, str) and args.startswith("%") else args


@cache
def operator(name: str) -> Any:
    """The operator of that name, "aten.mul.Tensor"."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
