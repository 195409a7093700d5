"""State that only the stand-ins of recognised expert layers read: what changes there between steps acts, or is refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshpar as mp
from meshpar.capture.experts.seam import REGISTERED
from meshpar.capture.export import capture
from meshpar.capture.state import taken as state
from meshpar.compile.state.held import Held
from meshpar.ops.experts import combine, dispatch, grouped_mm
from meshpar.simulate import local_tensors

E, H, K, T = 4, 8, 2, 12
FACTOR = 1.0
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "tanh": torch.tanh}


class Expert(nn.Module):
    bias_ = 0.0

    def __init__(self, table: dict[str, float], settings: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 6), nn.Linear(6, H)
        self.scale, self.act, self.flag = 1.0, "gelu", False
        self.table, self.settings = table, settings

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(ACTIVATIONS[self.act](self.up(x)) * self.scale)
        return (y + self.bias_) * (2 if self.flag else 1) * self.table["w"] * self.settings.alpha * FACTOR


class Listed(nn.Module):
    """A loop over a list."""

    def __init__(self) -> None:
        super().__init__()
        shared: Any = {"w": 1.0}, types.SimpleNamespace(alpha=1.0)
        self.experts = nn.ModuleList(Expert(*shared) for _ in range(E))

    @property
    def parts(self) -> list[Any]:
        return list(self.experts)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return out


class Masked(Listed):
    """A loop over a list that multiplies with masks."""

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * ((index == i) * weights).sum(-1, keepdim=True)
        return out


class Stacked(nn.Module):
    """Parameters of all experts in one."""

    bias_ = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, H, 6) * 0.3), nn.Parameter(torch.randn(E, 6, H) * 0.3)
        self.scale, self.act, self.flag = 1.0, "gelu", False
        self.table, self.settings = {"w": 1.0}, types.SimpleNamespace(alpha=1.0)

    @property
    def parts(self) -> list[Any]:
        return [self]

    def after(self, y: Tensor) -> Tensor:
        return (y + self.bias_) * (2 if self.flag else 1) * self.table["w"] * self.settings.alpha * FACTOR

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(E):
            rows, slot = torch.where(index == i)
            y = ACTIVATIONS[self.act](x[rows] @ self.up[i]) * self.scale
            out.index_add_(0, rows, self.after(y @ self.down[i]) * weights[rows, slot, None])
        return out


class Registered(Stacked):
    """The same, told how."""

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return super().forward(x, weights, index)


def told(module: Any, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    rows, offsets, perm = dispatch(x, index, E)
    y = ACTIVATIONS[module.act](grouped_mm(rows, module.up, offsets)) * module.scale
    y = (grouped_mm(y, module.down, offsets) + module.bias_) * (2 if module.flag else 1) * module.table["w"]
    return combine(y * module.settings.alpha * FACTOR, perm, weights)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.inside = nn.Linear(H, E), kind()

    def forward(self, x: Tensor) -> Tensor:
        weights, index = F.softmax(self.gate(x), -1).topk(K, -1)
        return self.inside(x, weights, index).square().mean()


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda part: setattr(part, name, value)


CHANGES: dict[str, Callable[[Any], None]] = {
    "a scale": _set("scale", 3.0),
    "an activation": _set("act", "tanh"),
    "a flag": _set("flag", True),
    "a default of the class": _set("bias_", 0.5),
    "a table": lambda part: part.table.update(w=2.0),
    "settings": lambda part: setattr(part.settings, "alpha", 2.0),
    "a global": lambda part: globals().update(FACTOR=2.0),
}
X = torch.linspace(-2, 2, T * H, dtype=torch.double).view(T, H)
KINDS = [Listed, Masked, Stacked, Registered]


@pytest.fixture(autouse=True)
def _told() -> Any:
    REGISTERED[Registered] = told
    yield
    del REGISTERED[Registered]
    globals().update(FACTOR=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_holds_for_what_experts_hold(kind: type[nn.Module]) -> None:
    model: Any = Net(kind).double()
    captured = capture(model, (X,))
    assert list(captured.experts) == ["inside"]
    for name, change in CHANGES.items():
        held = Held(state.settled(captured.state, model, captured.experts), model, "cpu")
        assert held.holds(), name
        before = model(X).item()
        for part in model.inside.parts:
            change(part)
        assert abs(model(X).item() - before) > 1e-6 and not held.holds(), name


def test_a_change_acts() -> None:
    models: list[Any] = [Net(Listed).double() for _ in range(2)]
    with mp.simulate(2):
        pm = mp.parallelize(models[0], mp.make_mesh("tp=2"), example={"x": X})
        for scale in (1.0, 3.0):
            for part in (*models[0].inside.parts, *models[1].inside.parts):
                part.scale = scale
            right = models[1](X).item()
            assert all(abs(ours.item() - right) < 1e-12 for ours in local_tensors(pm.train_step(x=X)).values())


class Counting(Expert):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Counted(Stacked):
    def after(self, y: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().after(y)


def test_experts_that_count_run_as_written() -> None:
    listed: Any = Net(Listed)
    for part in listed.inside.parts:
        part.__class__ = Counting
    counted: Any = Net(Counted)
    for model, who in ((listed, "one of its members sets"), (counted, "it sets")):
        captured = capture(model.double(), (X,))
        assert captured.experts == {} and captured.unrecognised == {"inside": f"{who} calls in its forward"}
        assert len(captured.state.writes) == len(model.inside.parts), "and what they count is carried on"
