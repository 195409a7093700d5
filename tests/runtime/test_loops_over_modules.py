"""Loops over the modules of a parallel model, as people write them: they find what they would in the model, and what they set acts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.simulate import local_tensors

Loop = Callable[[nn.Module], None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.act = nn.Linear(8, 8), nn.Dropout(0.5), nn.LeakyReLU(0.1)
        self.body = nn.Sequential(nn.Linear(8, 8), self.act, nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Sequential(nn.Identity()))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.norm(self.body(self.drop(self.act(self.up(x))))), y)


def of(kind: type[nn.Module], act: Callable[[Any], object]) -> Loop:
    def loop(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                act(module)

    return loop


def initialised(model: nn.Module) -> None:
    def one(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.02)
            nn.init.zeros_(module.bias)

    model.apply(one)


QUIET = of(nn.Dropout, lambda module: setattr(module, "p", 0.0))
LOOPS: dict[str, Loop] = {
    "no dropout": QUIET,
    "dropout in evaluation": of(nn.Dropout, nn.Module.eval),
    "batch norm frozen": of(nn.BatchNorm1d, nn.Module.eval),
    "momentum": of(nn.modules.batchnorm._BatchNorm, lambda module: setattr(module, "momentum", 0.5)),
    "slopes": of(nn.LeakyReLU, lambda module: setattr(module, "negative_slope", 0.7)),
    "eps": of(nn.LayerNorm, lambda module: setattr(module, "eps", 0.1)),
    "initialised": initialised,
    "frozen": of(nn.Linear, lambda module: module.requires_grad_(False)),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", LOOPS)
def test_what_a_loop_sets_acts(name: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = Net().double(), torch.randn(2, 8, 8, dtype=torch.float64)
    with mp.simulate(2):
        pm = mp.parallelize(copy.deepcopy(model), mp.make_mesh("tp=2"), example={"x": x, "y": y})
        pm.train_step(x=x, y=y)
        pm.load_state_dict(model.state_dict())
        for parameter in pm.parameters():
            parameter.grad = None
        for each in (model, pm):
            if "dropout" not in name:
                QUIET(each)
            LOOPS[name](each)
        right = model(x, y)
        right.backward()
        for part in local_tensors(pm.train_step(x=x, y=y)).values():
            torch.testing.assert_close(part, right.detach())
        for found, parameter in pm.named_parameters():
            wanted = model.get_parameter(found).grad
            if wanted is not None:
                torch.testing.assert_close(mp.full_grad(parameter), wanted)
            assert (parameter.grad is None) == (wanted is None)
        for found, buffer in pm.named_buffers():
            for part in local_tensors(buffer).values():
                torch.testing.assert_close(part, model.get_buffer(found))


def test_its_modules_are_those_of_the_model() -> None:
    """In number, order, names and kind: a list of parameters without decay is the same."""
    model = Net()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example={"x": torch.randn(8, 8), "y": torch.randn(8, 8)})
        assert [path for path, _ in pm.named_modules()] == [path for path, _ in model.named_modules()]
        kinds = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Sequential, nn.BatchNorm1d, nn.LeakyReLU, nn.Identity)
        for path, module in list(model.named_modules())[1:]:
            assert [isinstance(pm.get_submodule(path), kind) for kind in kinds] == [isinstance(module, kind) for kind in kinds]
        assert pm.get_submodule("act") is pm.get_submodule("body.1"), "one module at two places"
        linear = [[(path, m) for path, m in each.named_modules() if isinstance(m, nn.Linear)] for each in (model, pm)]
        decayed = [{f"{path}.{name}" for path, m in found for name, _ in m.named_parameters(recurse=False)} for found in linear]
        assert decayed[0] == decayed[1] == {"up.weight", "up.bias", "body.0.weight", "body.0.bias"}
        assert "LeakyReLU" in repr(pm)


def test_a_module_that_somebody_holds_stays() -> None:
    """Names are taken anew when data parallelism is built again; what a loop has set, and holds, acts all the same."""
    with mp.simulate(2):
        pm = mp.parallelize(Net(), mp.make_mesh("tp=2"), example={"x": torch.randn(8, 8), "y": torch.randn(8, 8)})
        held = {path: module for path, module in pm.named_modules() if path}
        held["drop"].p = 0.25  # type: ignore[assignment]
        pm._take_names()
        assert {path: module for path, module in pm.named_modules() if path} == held
        assert pm.get_submodule("drop").p == 0.25


def test_modules_cannot_be_replaced() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(Net(), mp.make_mesh("tp=2"), example={"x": torch.randn(8, 8), "y": torch.randn(8, 8)})
        body: Any = pm.get_submodule("body")
        for replace in (
            lambda: setattr(pm, "drop", nn.Identity()),
            lambda: setattr(body, "2", nn.Identity()),
            lambda: body.__setitem__(2, nn.Identity()),
            lambda: body.__delitem__(2),
            lambda: delattr(body, "2"),
            lambda: delattr(pm, "drop"),
            lambda: body.add_module("more", nn.Identity()),
            lambda: body.register_module("more", nn.Identity()),
        ):
            with pytest.raises(mp.ConfigError, match="of a parallel model cannot be replaced"):
                replace()
        assert isinstance(body[2], nn.Dropout)


def test_copies_of_modules() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(Net(), mp.make_mesh("tp=2"), example={"x": torch.randn(8, 8), "y": torch.randn(8, 8)})
        found = pm.get_submodule("drop")
        for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert type(other) is type(found) and isinstance(other, nn.Dropout)
        file = io.BytesIO()
        torch.save(found, file)
