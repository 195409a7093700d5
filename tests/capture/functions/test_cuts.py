"""A backward that returns None is none, and not one of zeros: an optimizer passes over a parameter without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from tests.own_functions import function

LIBRARY = torch.library.Library("meshpar_tests_cuts", "DEF")
LIBRARY.define("doubled(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("doubled", lambda x, w: x * 2 + w, "CompositeExplicitAutograd")
torch.library.register_fake("meshpar_tests_cuts::doubled", lambda x, w: torch.empty_like(x), lib=LIBRARY)
torch.library.register_autograd("meshpar_tests_cuts::doubled", lambda ctx, g: (g * 2, None), lib=LIBRARY)

derivative_but_none = function(lambda ctx, x, w: x * 2 + 0 * w.sum(), lambda ctx, g: (g * 2, None))
zeros_but_derivative_none = function(lambda ctx, x, w: x * 2, lambda ctx, g: (g * 2, torch.zeros(8, dtype=g.dtype)))
none_above = function(lambda ctx, x, w: x.round() + w, lambda ctx, g: (None, g.sum(0)))
all_none = function(lambda ctx, x, w: x.round() + w.round(), lambda ctx, g: (None, None))


def _both(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    ctx.set_materialize_grads(False)
    return x.clone(), w * 2


unfilled = function(_both, lambda ctx, g, h: (None if g is None else g * 3, None if h is None else h * 2))

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of a derivative that is zero": derivative_but_none.apply,
    "zeros of what is not used": zeros_but_derivative_none.apply,
    "for all that is above": none_above.apply,
    "for everything": all_none.apply,
    "where a result is not used": lambda x, w: unfilled.apply(x, w)[0],
    "where all results are used": lambda x, w: sum(unfilled.apply(x, w)),  # type: ignore[arg-type, return-value]
    "of a library's operator": torch.ops.meshpar_tests_cuts.doubled,
}


class Net(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.a, self.w, self.b = call, nn.Linear(8, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.call(self.a(x), self.w)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.sweep(5)
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_no_gradient(kind: str) -> None:
    x, one = torch.linspace(-1, 1, 64, dtype=torch.double).view(8, 8), Net(KINDS[kind]).double()
    other = Net(KINDS[kind]).double()
    alone = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.5)
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2", "cpu")
        pm = mp.parallelize(other, mesh, example=mp.local_batch({"x": x}, mesh))
        optimizer = torch.optim.AdamW(pm.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(2):
            one.zero_grad(), pm.zero_grad()
            one(x).backward()
            pm.train_step(**mp.local_batch({"x": x}, mesh))
            assert {n: p.grad is None for n, p in pm.named_parameters()} == {n: p.grad is None for n, p in one.named_parameters()}
            alone.step(), optimizer.step()
        for name, parameter in pm.named_parameters():
            torch.testing.assert_close(mp.full_tensor(parameter), one.get_parameter(name).detach(), rtol=1e-12, atol=1e-12)
