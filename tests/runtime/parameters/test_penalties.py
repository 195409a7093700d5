"""Terms that a loop computes from parameters, with a backward of their own: they add to what a step put into `.grad`, in either order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.pool import Pool


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()  # type: ignore[no-any-return]


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda w: w.square().sum(),  # on parts
    "orthogonal": lambda w: (w.t() @ w - torch.eye(8, dtype=w.dtype)).square().sum(),  # and on the whole
    "largest singular value": lambda w: torch.linalg.matrix_norm(w, 2),
    "some rows": lambda w: w[3:9].square().sum(),
    "running sums": lambda w: w.cumsum(0).square().mean(),
    "neighbours": lambda w: torch.cat([w[1:] - w[:-1], w[:1]]).abs().sum(),
}
ORDERS = {"after": "sp", "before": "ps", "between": "spsp", "around": "psp"}
"""s: a step, p: the penalty."""


def in_order(order: str, step: Callable[[], Any], weight: Tensor, penalty: Callable[[Tensor], Tensor]) -> None:
    for which in order:
        if which == "s":
            step()
        else:
            penalty(weight).backward()


def together(step: Callable[[], Tensor], weight: Tensor, penalty: Callable[[Tensor], Tensor]) -> None:
    """The same in one backward, twice."""
    for _ in range(2):
        loss, term = step(), penalty(weight)
        torch.autograd.backward([loss, term])


def made() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().double(), torch.randn(4, 8, dtype=torch.float64)


def wanted(order: str, penalty: str, *, hooked: bool = False) -> Tensor:
    model, x = made()
    if hooked:
        model.up.weight.register_hook(lambda grad: 2 * grad)
    in_order(order, lambda: model(x).backward(), model.up.weight, PENALTIES[penalty])
    assert model.up.weight.grad is not None
    return model.up.weight.grad


def check(order: str, penalty: str, mesh: Any, mode: Any, *, hooked: bool = False) -> None:
    model, x = made()
    batch = mp.local_batch({"x": x}, mesh)
    pm = mp.parallelize(copy.deepcopy(model), mesh, example=batch, config=mp.ParallelConfig(data_parallel=mode))
    weight = pm.get_parameter("up.weight")
    if hooked:
        weight.register_hook(lambda grad: 2 * grad)
    in_order(order, lambda: pm.train_step(**batch), weight, PENALTIES[penalty])
    for found in local_tensors(mp.full_grad(weight)).values():
        torch.testing.assert_close(found, wanted(order, penalty, hooked=hooked), rtol=1e-12, atol=1e-12)


def check_together(penalty: str, mesh: Any, mode: Any) -> None:
    model, x = made()
    batch = mp.local_batch({"x": x}, mesh)
    pm = mp.parallelize(copy.deepcopy(model), mesh, example=batch, config=mp.ParallelConfig(data_parallel=mode))
    together(lambda: pm(**batch), pm.get_parameter("up.weight"), PENALTIES[penalty])
    together(lambda: model(x), model.up.weight, PENALTIES[penalty])
    for found in local_tensors(mp.full_grad(pm.get_parameter("up.weight"))).values():
        torch.testing.assert_close(found, model.up.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_on_simulated_ranks(order: str, penalty: str) -> None:
    with mp.simulate(2):
        check(ORDERS[order], penalty, mp.make_mesh("tp=2"), "replicate")


@pytest.mark.parametrize("penalty", ["orthogonal", "squares"])
def test_beside_a_hook(penalty: str) -> None:
    """A parameter with a hook takes another way to its gradient."""
    with mp.simulate(2):
        check("spsp", penalty, mp.make_mesh("tp=2"), "replicate", hooked=True)


def on_a_rank(mesh: str, mode: str) -> None:
    made = mp.make_mesh(mesh)
    for penalty in PENALTIES:
        check("spsp", penalty, made, mode)
    for penalty in ("orthogonal", "squares"):
        check("psp", penalty, made, mode)
        check_together(penalty, made, mode)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["replicate", "zero1", "zero3"])
def test_on_processes(gloo: Pool, mode: str) -> None:
    gloo.run(on_a_rank, "dp=2", mode, world=2)


@pytest.mark.slow
def test_on_two_axes(gloo: Pool) -> None:
    gloo.run(on_a_rank, "dp=2,tp=2", "zero3", world=4)


def test_a_tensor_of_ones_own_is_written() -> None:
    """A plain DTensor, laid out as its placements say, that something computed from a parameter's whole is added to."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model, x = made()
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        pm = mp.parallelize(copy.deepcopy(model), mesh, example={"x": x})
        own = distribute_tensor(torch.ones(12, 8, dtype=torch.float64), mesh, [Shard(0)], src_data_rank=None)
        own += pm.get_parameter("up.weight").detach().cumsum(0)
        for found in local_tensors(own.full_tensor()).values():
            torch.testing.assert_close(found, 1 + model.up.weight.detach().cumsum(0))
