"""autograd.Functions: found from wherever their apply was kept, kept as they are or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache, partial
from types import ClassMethodDescriptorType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import meshpar as mp
from meshpar._torch import function_behind
from meshpar.capture.export import capture
from meshpar.capture.functions.calls import Calls as Seen
from meshpar.errors import CaptureError
from tests.capture.models import assert_same
from tests.own_functions import AddsLoss, Calls, Reversed, Straight, clipped, function, straight

X = torch.randn(4, 6, 8, dtype=torch.double)


class Overriding(Straight):
    """Has an apply of its own."""

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().apply(x)  # type: ignore[no-any-return]


@lru_cache
def cached() -> Callable[[Tensor], Tensor]:
    return Straight.apply


def operators(call: Callable[[Tensor], Tensor]) -> list[str]:
    """The operators that were made of Functions, in a graph that computes what the model does."""
    captured = assert_same(Calls(call).double(), (X,), {}, tolerance=1e-12)
    return [str(node.target) for node in captured.graph.nodes if "meshpar_function" in str(node.target)]


@pytest.mark.parametrize(
    "call",
    [
        straight,
        partial(straight),
        lambda x: cached()(x),
        Overriding.apply,
        lambda x: checkpoint(straight, x, use_reentrant=False),
        SimpleNamespace(op=straight).op,
    ],
    ids=["global", "partial", "cached", "overriding", "checkpoint", "attribute"],
)
def test_an_apply_kept_anywhere(call: Callable[[Tensor], Tensor]) -> None:
    assert len(operators(call)) == 1
    assert "apply" not in vars(Straight.__mro__[2])


class Asking(AddsLoss):
    """Asks its operand whether it needs a gradient, and gives a gradient of another shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.needed = loss.requires_grad
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return grads[0], torch.ones(1, dtype=grads[0].dtype) if ctx.needed else None


class Peeking(Straight):
    """Does something else under autograd."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (2 if isinstance(ctx, torch.autograd.function.FunctionCtx) else 3)


def _unfilled(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    ctx.set_materialize_grads(False)
    return x.round(), x * 3


def _marked(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    results = x.round(), x * 3
    ctx.mark_non_differentiable(results[1])
    return results


class ByNeed(torch.autograd.Function):
    """Asks who needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0] * (2 if ctx.needs_input_grad[1] else 3), None


IN_C = isinstance(vars(torch.autograd.Function).get("apply"), ClassMethodDescriptorType)
"""Whether `apply` is a method in C (from torch 2.14 on), which finds a Function wherever it is called from, and does not say whether
gradients are on there: under `no_grad` too, an operator is made."""
BOXED = function(lambda ctx, x: x.round(), lambda ctx, grads: 2 * grads[0], boxed_grads_call=True).apply
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "one of two results": lambda x: function(lambda ctx, x: (x.round(), x * 3), lambda ctx, g, h: g + 5 * h).apply(x)[0],
    "no zeros": lambda x: function(_unfilled, lambda ctx, g, h: g + (1 if h is None else 5 * h)).apply(x)[0],
    "marked": lambda x: torch.mul(*function(_marked, lambda ctx, g, h: g + 5 * h).apply(x)),
    "one tensor twice": lambda x: function(lambda ctx, x, y: (x + y).round(), lambda ctx, g: (g, g)).apply(x, 2 * x),
    "vjp": type("Vjp", (torch.autograd.Function,), {"forward": lambda ctx, x: x.round(), "vjp": lambda ctx, g: 2 * g}).apply,  # type: ignore[attr-defined]
    "arguments": lambda x: function(lambda ctx, x, *rest: x.round(), lambda ctx, g: (2 * g, None, None, None)).apply(
        x, None, [1, 2], {"a": 1}
    ),
    "by need": lambda x: ByNeed.apply(x, torch.ones(16, dtype=x.dtype)),
    "asking": lambda x: Asking.apply(x, x.square().mean()),
    "without gradient": function(lambda ctx, x: x.clone(), lambda ctx, g: None).apply,
    "a limit seldom reached": function(lambda ctx, x: x.clone(), lambda ctx, g: g.clamp(-1e4, 1e4)).apply,
    **({"boxed": BOXED} if hasattr(torch.autograd.Function, "boxed_grads_call") else {}),  # (from torch 2.13 on)
    "twice": lambda x: clipped.apply(clipped.apply(x) * 2),
    "in no_grad": lambda x: x + torch.no_grad()(straight)(x),
}


@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_the_functions_own(kind: str) -> None:
    assert len(operators(KINDS[kind])) == {"twice": 2, "in no_grad": int(IN_C)}.get(kind, 1)


def test_inside_a_reentrant_checkpoint() -> None:
    mp.verify(Calls(lambda x: checkpoint(straight, x, use_reentrant=True)), "tp=2", {"x": X}).raise_if_failed()


def test_in_the_loss() -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        return straight(output * 3).square().mean()  # type: ignore[no-any-return]

    mp.verify(torch.nn.Linear(8, 8), "tp=2", {"input": X}, loss_fn=loss).raise_if_failed()


def test_nothing_gets_a_gradient_inside_a_reentrant_checkpoint_of_values_without() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (checkpoint(self.a, x, use_reentrant=True) @ self.b.weight.T).square().mean()}

    assert_same(Model(straight).double(), (X,), {})


def test_state_that_the_loop_changes_is_read_in_every_step() -> None:
    (name,) = operators(Reversed.apply)
    assert name.startswith("meshpar_function.Reversed")
    try:
        Reversed.factor = 1.0  # now the derivative of its forward: still no reason to freeze it
        captured = capture(Calls(Reversed.apply), (X.float(),))
        assert any("Reversed" in str(node.target) for node in captured.graph.nodes)
        Reversed.factor = 0.25
        x = torch.ones(2, 6, 16, requires_grad=True)
        getattr(torch.ops.meshpar_function, name.split(".")[1])(x).sum().backward()
        assert x.grad is not None and bool((x.grad == 0.25).all())
    finally:
        Reversed.factor = -0.3


class Counting(Straight):
    """Counts its calls."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counting.calls += 1
        return x.round()


SEEN: list[int] = []


def _raw(x: Tensor) -> Tensor:
    base: Any = vars(torch._C._FunctionBase)["apply"]  # the road past everything that Python sees
    return base.__get__(None, Straight)(x)  # type: ignore[no-any-return]


def _penalised(x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(straight(x * 2).square().sum(), x, create_graph=True)
    return gradient


def _dirty(ctx: Any, x: Tensor) -> Tensor:
    ctx.mark_dirty(x)
    return x.mul_(2)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "counter": (Counting.apply, "Counting .*changes Counting.calls when it runs.*\n  Count and log outside"),
    "log": (function(lambda ctx, x: x.round(), lambda ctx, g: (SEEN.append(1), g)[1]).apply, "changes SEEN when it runs"),
    "draws": (
        function(lambda ctx, x: x.round(), lambda ctx, g: g * torch.rand_like(g)).apply,
        "it draws random numbers.\n  Draw the numbers",
    ),
    "python draws": (function(lambda ctx, x: x.round(), lambda ctx, g: g * random.random()).apply, "it gives other values each time"),
    "overwrites the gradient": (function(lambda ctx, x: x.round(), lambda ctx, g: g.mul_(2)).apply, "it overwrites what it is given"),
    "differentiated twice": (_penalised, "asks for gradients at test_calls.py(?s:.*)torch.func.jvp"),
    "peeking": (Peeking.apply, "run outside of autograd, its backward gives other gradients"),
    "dirty": (lambda x: function(_dirty, lambda ctx, g: 3 * g).apply(x * 1), "it overwrites its operands"),
    **({} if IN_C else {"unseen": (_raw, "Straight .*not called by its apply.*\n  Call Straight.apply")}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_refused(kind: str) -> None:
    call, message = REFUSED[kind]
    with pytest.raises(CaptureError, match=message):
        capture(Calls(call), (X.float(),))


def test_functions_in_cpp_are_noticed() -> None:
    """A node of the autograd graph that a Function in C++ made has but a name."""
    node = SimpleNamespace(name=lambda: "torch::autograd::CppNode<Mine>", next_functions=())
    assert function_behind(node) == "Mine"
    result = torch.ones(2, requires_grad=True) * 1
    seen = Seen(Calls(straight))
    seen.refuse_unseen([result])
    assert function_behind(result.grad_fn) is None and not seen.in_cpp
    seen._look_at(function_behind(node))
    assert list(seen.in_cpp) == ["Mine"]


def test_an_operator_is_made_once_for_each_set_of_constants() -> None:
    scaled = function(lambda ctx, x, factor: setattr(ctx, "factor", factor) or x.round(), lambda ctx, g: (g * ctx.factor, None))
    first, second, third = operators(lambda x: scaled.apply(scaled.apply(scaled.apply(x, 2.0), 3.0), 2.0))
    assert first == third != second
    assert len(operators(lambda x: AddsLoss.apply(x, x.mean()))) == 1
