"""Tensors that want a gradient and are no parameters of the model: refused where it would flow, constants where it would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.simulate import local_tensors

Batch = dict[str, Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


GLOBAL = nn.Parameter(numbers(4))
TENSOR = numbers(4).requires_grad_()
COMPUTED = TENSOR * 2
OUTSIDE = nn.Linear(4, 4).double()
FROZEN = nn.Linear(4, 4).double().requires_grad_(False)


class Net(nn.Module):
    def __init__(self, call: Callable[[Net, Tensor], Tensor] = lambda self, h: h) -> None:
        super().__init__()
        self.up, self.down, self.call = nn.Linear(6, 8), nn.Linear(8, 4), call
        self.plain = [nn.Parameter(torch.ones(4))]
        self.by_name = {"last": nn.Linear(4, 4)}
        self.double()
        self.plain[0].data, self.by_name["last"] = self.plain[0].data.double(), self.by_name["last"].double()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.down(torch.tanh(self.up(x))))


class Learned(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3, dtype=torch.float64), requires_grad=trained)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, output: Tensor, batch: Batch) -> Tensor:
        return output.square().mean() * torch.exp(-self.log) * self.scale + self.log


def no_grad(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.new_tensor(0.0) + OUTSIDE(torch.ones(2, 4, dtype=torch.float64)).sum()


WANTED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a global parameter": lambda net, h: h * GLOBAL,
    "a global tensor": lambda net, h: h + TENSOR,
    "one that was computed": lambda net, h: h - COMPUTED,
    "in a list": lambda net, h: h * net.plain[0],
    "a module in a dict": lambda net, h: net.by_name["last"](h),
    "a module of a global name": lambda net, h: OUTSIDE(h),
    "in a list of tensors": lambda net, h: torch.stack([h, h * 0 + GLOBAL]).sum(0),
    "by its name": lambda net, h: F.linear(h, weight=OUTSIDE.weight),
    "of itself alone": lambda net, h: h + GLOBAL.square().sum(),
}
NOT_WANTED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "detached": lambda net, h: h * GLOBAL.detach(),
    "later detached": lambda net, h: h * (GLOBAL * 2 + 1).detach(),
    "without gradients": lambda net, h: h * no_grad(net, h),
    "frozen": lambda net, h: FROZEN(h),
    "asked for its shape": lambda net, h: h * GLOBAL.shape[0] + torch.zeros_like(GLOBAL),
    "compared": lambda net, h: torch.where(GLOBAL > 0, h, 2 * h),
}


def squares(output: Tensor, batch: Batch) -> Tensor:
    return output.square().mean()


def parallel(model: nn.Module, loss_fn: Callable[[Tensor, Batch], Tensor] = squares) -> mp.ParallelModel:
    return mp.parallelize(model, mp.make_mesh("tp=2"), example={"x": numbers(4, 6)}, loss_fn=loss_fn)


@pytest.mark.parametrize("name", WANTED)
def test_what_would_not_be_trained_is_refused(name: str) -> None:
    model = Net(WANTED[name])
    with mp.simulate(2), pytest.raises(mp.CaptureError, match=r"at test_foreign.py:\d+.*, which wants a gradient(?s:.*)Register it"):
        parallel(model)


@pytest.mark.parametrize(
    "loss_fn", [Learned(), Learned().forward, lambda y, _: OUTSIDE(y).square().mean(), lambda y, _: (y * GLOBAL).mean()]
)
def test_what_a_loss_would_train_is_refused(loss_fn: Callable[[Tensor, Batch], Tensor]) -> None:
    model = Net()
    with mp.simulate(2), pytest.raises(mp.CaptureError, match="a parameter of shape(?s:.*)What a loss_fn trains belongs into the model"):
        parallel(model, loss_fn)


CONSTANT: list[tuple[nn.Module, Callable[[Tensor, Batch], Tensor]]] = [
    *((Net(call), squares) for call in NOT_WANTED.values()),
    (Net(), Learned(trained=False)),
    (Net(), lambda y, _: FROZEN(y).square().mean()),
]


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("model", "loss_fn"), CONSTANT, ids=[*NOT_WANTED, "a loss that is a module", "a module of a loss"])
def test_what_is_constant_is_exact(model: nn.Module, loss_fn: Callable[[Tensor, Batch], Tensor]) -> None:
    batch = {"x": numbers(4, 6)}
    with mp.simulate(2):
        pm = parallel(model, loss_fn)
        loss = pm.train_step(**batch)
        model.zero_grad()
        right = loss_fn(model(**batch), batch)
        right.backward()
        for part in local_tensors(loss).values():
            torch.testing.assert_close(part, right.detach())
        for name, parameter in pm.named_parameters():
            torch.testing.assert_close(mp.full_grad(parameter), model.get_parameter(name).grad)


def test_what_is_to_be_trained_from_now_on() -> None:
    """A tensor that was frozen when the program was made."""
    later, batch = numbers(4), {"x": numbers(4, 6)}
    model = Net(lambda net, h: h * later)
    with mp.simulate(2):
        pm = parallel(model)
        pm.train_step(**batch)
        later.requires_grad_()
        with pytest.raises(mp.CaptureError, match="wants a gradient"):
            pm.train_step(**batch)
        later.requires_grad_(False)
        pm.train_step(**batch)
