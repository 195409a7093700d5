"""Models that share parameters, each parallelized, and an optimizer over both kinds: said, or refused."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import meshpar as mp


class Net(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)).square().mean()


class Around(nn.Module):
    """With a head that is tied to the model inside of it."""

    def __init__(self, body: Net, mesh: torch.distributed.DeviceMesh) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.head.weight = body.head.weight
        self.body = mp.parallelize(body, mesh, example=(torch.ones(2, 4),))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.head(x).square().mean()


def test_a_trunk_of_two_models() -> None:
    """Said where a second model shares parameters with one that lives; the same model again, or one whose first is gone, is its own."""
    x, trunk = torch.ones(2, 4), nn.Linear(4, 4)
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        first = mp.parallelize(Net(trunk), mesh, example=(x,))
        actor = Net(trunk)
        with pytest.warns(UserWarning, match="Net shares trunk.weight, trunk.bias with Net, which was parallelized before") as told:
            second = mp.parallelize(actor, mesh, example=(x,))
        assert [one.filename for one in told] == [__file__]
        del first
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = mp.parallelize(actor, mesh, example=(x,))
            mp.parallelize(Net(nn.Linear(4, 4)), mesh, example=(x,))
        for one in (second, again):
            one.train_step(x)


def test_an_optimizer_of_both() -> None:
    x = torch.ones(2, 4)
    with mp.simulate(2):
        model = Around(Net(nn.Linear(4, 4)), mp.make_mesh("tp=2"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).backward()
        with pytest.raises(mp.ConfigError, match="this SGD holds parameters of the parallel model, and head.weight of the Net"):
            optimizer.step()
        one = torch.optim.SGD(model.body.parameters(), lr=0.1)
        one.step()
        one.add_param_group({"params": [model.head.weight]})
        with pytest.raises(mp.ConfigError, match=r"head\.weight"):
            one.step()


def test_a_parallel_model_may_die_while_an_optimizer_walks_through_its_hooks() -> None:
    x, held = torch.ones(2, 4), list[nn.Module]()
    other = nn.Linear(4, 4)
    other(x).sum().backward()

    def last_breath(*_: object) -> None:
        held.clear()
        gc.collect()

    handle = register_optimizer_step_pre_hook(last_breath)  # (before, so that hooks are left to walk through)
    try:
        with mp.simulate(2):
            held.append(mp.parallelize(Net(nn.Linear(4, 4)), mp.make_mesh("tp=2"), example=(x,)))
        seen = weakref.ref(held[0])
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    finally:
        handle.remove()
    assert seen() is None
