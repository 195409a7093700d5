"""What running a backward on drawn values says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meshpar.capture.functions.proofs import nature_of, sizes
from meshpar.ops.nature import Nature
from meshpar.ops.own_backward import ExampleCall, FunctionForms, Unfit
from tests.own_functions import AddsLoss, Straight, by_batch, clipped, function, normalised, shifted


def looks(*shapes: tuple[int, ...]) -> tuple[ExampleCall, ...]:
    return tuple(ExampleCall(shape, torch.float32, torch.device("cpu"), True) for shape in shapes)


def nature(cls: Any, *shapes: tuple[int, ...]) -> Nature:
    return nature_of(FunctionForms(cls, looks(*(shapes or ((4, 6),)))))


def kept(ctx: Any, x: Tensor, *more: Tensor) -> Tensor:
    ctx.save_for_backward(x, *more)
    return x.clone()


LINEAR = {
    "straight": (Straight, True),
    "reversal": (function(lambda ctx, x: x.view_as(x), lambda ctx, g: -2 * g), True),
    "masked": (function(kept, lambda ctx, g: g * (ctx.saved_tensors[0] > 0)), True),
    "float32": (function(lambda ctx, x: x.clone(), lambda ctx, g: (g.float() / 3).to(g.dtype)), True),
    "mean over samples": (function(lambda ctx, x: x.clone(), lambda ctx, g: g - g.mean(0)), True),
    "clip": (clipped, False),
    "clip that is seldom reached": (function(lambda ctx, x: x.clone(), lambda ctx, g: g.clamp(-1e10, 1e10)), False),
    "drop what is small": (function(lambda ctx, x: x.clone(), lambda ctx, g: g * (g.abs() > 1e-10)), False),
    "positive part": (function(lambda ctx, x: x.clone(), lambda ctx, g: g.clamp(min=0)), False),
    "sign": (function(lambda ctx, x: x.clone(), lambda ctx, g: g.sign()), False),
    "norm": (normalised, False),
    "narrow": (function(lambda ctx, x: x.clone(), lambda ctx, g: g.bfloat16().to(g.dtype)), False),
    "constant beside": (shifted, False),
    "only where x is large": (function(kept, lambda ctx, g: torch.where(ctx.saved_tensors[0].abs() > 15, g.abs(), g)), False),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_in_the_gradient(kind: str) -> None:
    cls, linear = LINEAR[kind]
    assert nature(cls).linear == linear


ALONE = {
    "straight": (Straight, (0, 1), (0, 1)),
    "clip": (clipped, (0, 1), (0, 1)),
    "norm": (normalised, (), (0, 1)),
    "norm of rows": (function(lambda ctx, x: x.clone(), lambda ctx, g: g / g.norm(dim=-1, keepdim=True)), (0,), (0, 1)),
    "over the number of samples": (by_batch, (1,), (0, 1)),
    "mean over samples": (function(lambda ctx, x: x - x.mean(0), lambda ctx, g: g), (1,), (1,)),
    "shifted by one": (function(lambda ctx, x: x.roll(1, 1), lambda ctx, g: g), (0,), (0,)),
}


@pytest.mark.parametrize("kind", ALONE)
def test_dims_whose_indices_are_independent(kind: str) -> None:
    cls, alone, apart = ALONE[kind]
    found = nature(cls)
    assert (found.alone, found.apart, found.elementwise) == (alone, apart, alone == (0, 1))


def test_what_does_not_depend_on_the_gradient() -> None:
    assert nature(AddsLoss, (4, 6), ()) == Nature(True, True, (1,), (1,), (0, 1), (0, 1))
    penalty = function(kept, lambda ctx, g, *_: (g, ctx.saved_tensors[1] * 0.1))
    assert nature(penalty, (4, 6), (3,)) == Nature(True, False, (1,), (1,), (0, 1), (0, 1))
    constant = nature(function(kept, lambda ctx, g: ctx.saved_tensors[0] * 0.1))
    assert constant.linear and constant.shared == constant.adding == (0,)
    weight = function(kept, lambda ctx, g: (g, (g * ctx.saved_tensors[0]).sum(0)))
    assert nature(weight, (4, 6), (6,)) == Nature(True, False, (), (), (0,), (0, 1))


def test_large_operands_are_drawn_smaller_unless_that_does_not_run() -> None:
    small, true = sizes(looks((512, 1024), (1024, 64)))
    assert [e.shape for e in small] == [(12, 16), (16, 8)] and [e.shape for e in true] == [(512, 1024), (1024, 64)]
    fixed = function(lambda ctx, x: x.view(64, 8, 1024).round().view_as(x), lambda ctx, g: g.view(512, 1024) * 2)
    found = nature(fixed, (512, 1024))
    assert found.linear and found.ran and found.alone == ()


def test_nothing_is_claimed_of_what_does_not_run() -> None:
    broken = function(lambda ctx, x: x.view(5, 7), lambda ctx, g: g)
    assert not nature(broken).ran and not nature(broken).linear


def test_other_values_each_time_are_unfit() -> None:
    with pytest.raises(Unfit, match="other values each time"):
        nature(function(lambda ctx, x: x.clone(), lambda ctx, g: g * torch.rand(())))
