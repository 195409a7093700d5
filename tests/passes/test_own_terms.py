"""Backwards of their own over microbatches: terms that they add are averaged, what would come out otherwise is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from meshpar.compile.denominators import split_denominators
from meshpar.errors import PlanError
from meshpar.graph.run import run
from tests.own_functions import AddsLoss, Calls, Routed, by_batch, clipped, function, normalised, shifted
from tests.sharding.models import captured_of

PARTS = [torch.randn(2, 6, 8, dtype=torch.double, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def step(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The gradients of a step of three microbatches, and what is said of it."""
    split = split_denominators(captured_of(model, {"x": PARTS[0]}), len(PARTS))
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss: Tensor = sum(run(split.captured, state, {"x": x})[split.captured.loss or 0] for x in PARTS)  # type: ignore[assignment, misc]
    return dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True)), split.averaged, split.within


def close(found: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_an_added_term_is_averaged_and_named() -> None:
    """Against the same term in the loss, which is the mean of the microbatches' terms."""
    torch.manual_seed(0)
    model = Routed(balance=True).double()
    found, averaged, within = step(model)
    for x in PARTS:
        (model(x)["loss"] / len(PARTS)).backward()  # adds the whole term each time
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    AddsLoss.backward, backward = staticmethod(lambda ctx, g: (g, torch.zeros(()))), AddsLoss.backward  # type: ignore[assignment, method-assign]
    try:
        for x in PARTS:
            (model(x)["loss"] / len(PARTS)).backward()
    finally:
        AddsLoss.backward = staticmethod(backward)  # type: ignore[method-assign]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        term = wanted[name] - parameter.grad
        torch.testing.assert_close(found[name], parameter.grad + term / len(PARTS), msg=lambda text, name=name: f"{name}: {text}")
        assert "gate" not in name or term.abs().max() > 1e-4
    assert {"layers.0", "layers.1"} == set(averaged) and within == ()


@pytest.mark.parametrize("call", [clipped.apply, shifted.apply], ids=["clipped", "shifted"])
def test_what_treats_samples_by_themselves_stays_as_it_is(call: Callable[[Tensor], Tensor]) -> None:
    model = Calls(call).double()
    found, _, within = step(model)
    model(torch.cat(PARTS))["loss"].backward()
    close(found, model)
    assert within == ()


def test_statistics_of_a_microbatch_are_named() -> None:
    centred = function(lambda ctx, x: x - x.mean(0), lambda ctx, g: g)
    _, _, (where,) = step(Calls(centred.apply).double())
    assert where.startswith("own_")


PENALTY = function(lambda ctx, x, w: x.clone(), lambda ctx, g: (g, torch.ones_like(g[0, 0])))


class OfParameters(Calls):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weight = clipped.apply(self.a.weight)
        return {"loss": self.b(x @ weight.T).square().mean()}


REFUSED = {
    "norm": (Calls(normalised.apply), "the backward of Own in the model .* is not linear in the gradient .*Use microbatches=1"),
    "over the number of samples": (Calls(by_batch.apply), "does not treat samples by themselves, as its forward does"),
    "a row for all samples": (Calls(lambda x: PENALTY.apply(x, x.mean((0, 1)))), "adds a term of its own to gradients"),
    "parameters": (OfParameters(torch.relu), "is not linear"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_give_something_else_is_refused(kind: str) -> None:
    model, message = REFUSED[kind]
    with pytest.raises(PlanError, match=f"microbatches=3: .*{message}"):
        step(model.double())
