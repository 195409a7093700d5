"""Operators of libraries: their backward is kept, and tried before a part of a gradient enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.capture.functions.operators import mark
from meshpar.errors import CaptureError
from meshpar.graph.facts import facts
from meshpar.ops.nature import Nature
from tests.own_functions import Calls

LIBRARY = torch.library.Library("meshpar_tests", "DEF")


def defined(name: str, backward: Callable[..., Any], forward: Callable[..., Tensor] = torch.clone, *, terms: int = 0) -> Any:
    """An operator of one tensor and some numbers that are added to the loss."""
    operands = ["Tensor x", *(f"Tensor loss{i}" for i in range(terms))]
    LIBRARY.define(f"{name}({', '.join(operands)}) -> Tensor", tags=() if terms else (torch.Tag.pointwise,))
    LIBRARY.impl(name, lambda x, *more: forward(x), "CompositeExplicitAutograd")
    torch.library.register_fake(f"meshpar_tests::{name}", lambda x, *more: torch.empty_like(x), lib=LIBRARY)
    torch.library.register_autograd(f"meshpar_tests::{name}", lambda ctx, g: backward(g), lib=LIBRARY)
    return getattr(torch.ops.meshpar_tests, name)


straight = defined("straight", lambda g: g, torch.round)
clipped = defined("clipped", lambda g: g.clamp(-1e-3, 1e-3))
by_count = defined("by_count", lambda g: g / g.numel())
adds_loss = defined("adds_loss", lambda g: (g, torch.ones((), dtype=g.dtype)), terms=1)
noisy = defined("noisy", lambda g: g * torch.rand_like(g))


def adding(x: Tensor) -> Tensor:
    return adds_loss(x, x.softmax(-1).mean((0, 1)).square().sum())  # type: ignore[no-any-return]


CASES = {
    "straight": (straight, Nature(True, True, (), (), (0, 1, 2), (0, 1, 2))),
    "clipped": (clipped, Nature(False, True, (), (), (0, 1, 2), (0, 1, 2))),
    "by count": (by_count, Nature(True, False, (), (), (), (0, 1, 2))),
    "adds a loss": (adding, Nature(True, True, (1,), (1,), (0, 1, 2), (0, 1, 2))),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", CASES)
def test_an_operator_is_tried_and_kept(kind: str) -> None:
    call, nature = CASES[kind]
    x = torch.randn(4, 6, 8)
    captured = capture(Calls(call), (x,))
    assert [known for node in captured.graph.nodes if (known := facts(node).nature) is not None] == [nature]
    mp.verify(Calls(call), "dp=2,tp=2", {"x": x}).raise_if_failed()


def test_a_backward_that_draws_is_refused() -> None:
    with pytest.raises(CaptureError, match="meshpar_tests.noisy.default in .*other values each time.*\n  Draw the numbers outside"):
        capture(Calls(noisy), (torch.randn(4, 6, 8),))


def test_functions_in_cpp_must_belong_to_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = capture(Calls(straight), (torch.randn(4, 8),)).graph
    for graph in (capture(Calls(torch.relu), (torch.randn(4, 8),)).graph, beside):
        with pytest.raises(CaptureError, match="calls Mine, an autograd function in C.. that is no operator"):
            mark(graph, ["Mine"])
    seen: list[Tensor] = []
    monkeypatch.setattr("meshpar.capture.functions.operators.functions_behind", lambda results: [*seen, "Mine", seen.extend(results)])
    mark(beside, ["Mine"])
    assert [tuple(result.shape) for result in seen] == [(4, 16)] and seen[0].requires_grad
    with pytest.raises(CaptureError, match="calls Yours, an autograd function in C"):
        mark(beside, ["Mine", "Yours"])
