"""Copies of models: closures read the copy, and what no copy can have is refused when it is read."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from meshpar.api import parallelize
from meshpar.capture.copies import copied
from meshpar.errors import CaptureError
from meshpar.mesh import make_mesh
from meshpar.proof.verify import verify
from meshpar.runtime.parameters.specs import full_grad
from meshpar.simulate import simulate


class Scaled(nn.Module):
    """`how(self)` makes the activation, which reads a parameter of the module in some way."""

    def __init__(self, how: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 1)
        self.act = how(self)

    def times(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x)).square().mean()


def by_hook(module: Any) -> Any:
    module.a.register_forward_hook(lambda _m, _i, output: output * module.scale)
    return torch.tanh


def nested(module: Any) -> Any:
    def outer(x: Tensor) -> Tensor:
        return inner(x)

    def inner(x: Tensor) -> Tensor:
        return x * module.scale

    return outer


READS = {
    "closure": lambda m: lambda x: x * m.scale,
    "default": lambda m: lambda x, scale=m.scale: x * scale,
    "method": lambda m: m.times,
    "partial": lambda m: partial(torch.mul, m.scale),
    "partial of a closure": lambda m: partial(lambda k, x: x * k * m.scale, 2.0),
    "functions": nested,
    "hook": by_hook,
}


@pytest.mark.parametrize("how", READS)
def test_functions_read_the_copy(how: str) -> None:
    model = Scaled(READS[how])
    new = copied(model)
    assert isinstance(new, Scaled)
    new(torch.randn(4, 8)).backward()
    assert new.scale is not model.scale and new.scale.grad is not None
    assert model.scale.grad is None


def test_the_gradient_behind_a_closure_is_there() -> None:
    torch.manual_seed(0)
    model, x = Scaled(READS["closure"]).double(), torch.randn(4, 8).double()
    model(x).backward()
    with simulate(2):
        pm = parallelize(model, make_mesh("tp=2"), example={"x": x})
        pm.train_step(x=x)
        found, wanted = full_grad(dict(pm.named_parameters())["scale"]), model.scale.grad
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted)


def test_a_function_that_reads_nothing_of_the_model_is_shared() -> None:
    def relu(x: Tensor) -> Tensor:
        return x.relu()

    assert copied(Scaled(lambda m: relu)).act is relu


GLOBAL: Any = None


def test_a_global_variable() -> None:
    global GLOBAL
    GLOBAL = Scaled(lambda m: lambda x: x * GLOBAL.scale)
    with pytest.raises(CaptureError, match=r"test_copies.py:\d+\) reads GLOBAL of the model as a global variable"):
        copied(GLOBAL)


class Global(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * GLOBAL.scale).square().mean()


def test_a_forward_that_reads_a_global_variable() -> None:
    global GLOBAL
    GLOBAL = Global()
    with simulate(2), pytest.raises(CaptureError, match="scale of the model itself is read at test_copies.py"):
        parallelize(GLOBAL, make_mesh("tp=2"), example={"x": torch.randn(4, 8)})


class Last(nn.Module):
    """Keeps a tensor of its forward, the usual way to look at activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.seen = [self.last]
        return self.last.square().mean()


class Once(nn.Module):
    """Computed a tensor from its parameters when it was built."""

    def __init__(self, *, inside: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.turned = {"w": self.a.weight.T * 2}["w"] if not inside else [self.a.weight.T * 2]

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) @ (self.turned[0] if isinstance(self.turned, list) else self.turned)).square().mean()


def old_weight_norm() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.weight_norm(nn.Linear(8, 8))  # type: ignore[deprecated]

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).square().mean()

    return Net()


class Handles(Last):
    """Things without a copy, some of which the forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.more = threading.RLock(), {"locks": [threading.Lock()], "unused": (i for i in range(3))}
        self.math = __import__("math")

    def forward(self, x: Tensor) -> Tensor:
        with self.lock, self.more["locks"][0]:
            return super().forward(x) * self.math.pi


class Unwilling(Last):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies of me")


def holding_unwilling() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.b = Unwilling(), nn.Linear(8, 8)
            self.parts = [self.part]

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](self.b(x))

    return Net()


def parametrized() -> nn.Module:
    norms = (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)
    layers = [norm(nn.Linear(8, 8)) for norm in norms]  # type: ignore[operator]

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    return Net(*layers, nn.Tanh(), Handles().a)


@pytest.mark.sweep(5)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", [Last, old_weight_norm, Handles, Unwilling, holding_unwilling, parametrized])
def test_models_that_deepcopy_refuses_are_exact(make: Callable[[], nn.Module], warm: bool) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 8)
    if warm:
        model(x)
    assert verify(model, "tp=2", {"x": x}).raise_if_failed()["gradients"].largest < 1e-12


@pytest.mark.parametrize("inside", [False, True])
def test_a_tensor_made_of_parameters_is_refused_where_it_is_read(inside: bool) -> None:
    with simulate(2), pytest.raises(CaptureError, match="(?s)'turned.*an attribute of the model .Once..*Compute it in forward"):
        parallelize(Once(inside=inside), make_mesh("tp=2"), example={"x": torch.randn(4, 8)})
    with pytest.raises(CaptureError, match="'turned.*computed from parameters before"):
        verify(Once(inside=inside), "tp=2", {"x": torch.randn(4, 8)})


def test_what_cannot_be_copied_is_refused_where_it_is_used() -> None:
    class Counted(Last):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = (i for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(self.numbers)

    net = nn.Sequential(Counted())
    with pytest.raises(CaptureError, match="(?s)'numbers', an attribute of 0 .Counted., is a generator.*__deepcopy__"):
        verify(net, "tp=2", (torch.randn(4, 8),))
    assert next(net[0].numbers) == 0  # the model's own was left alone


def test_stand_ins_can_be_asked_what_they_look_like_and_sent() -> None:
    new: Any = copied(Once())
    for stand_in in (new.turned, copy.deepcopy(new).turned, pickle.loads(pickle.dumps(new.turned))):
        assert stand_in.shape == (8, 8) and stand_in.dtype == torch.float32 and "turned" in repr(stand_in)
        with pytest.raises(CaptureError, match="turned"):
            torch.ones(8, 8) @ stand_in
