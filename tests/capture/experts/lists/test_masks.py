"""Experts that masks choose, experts without parameters, dropout and hooks among experts: lifted exactly, or left as they are."""

from __future__ import annotations

from queue import SimpleQueue

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.errors import BatchError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, infos_of
from meshpar.graph.run import run
from tests.capture.models import assert_same, perturbed
from tests.capture.moe import H, Model, SwiGLU, tokens

E = 4


def names(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes]


class Named(nn.ModuleDict):
    """Experts by name, beside a module that is none, called with a mask [T, 1, E] that may mark none."""

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": SwiGLU() for e in range(E)})
        self.quiet = nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = mask.permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            current = self[f"expert_{e[0]}"](x[None, token].reshape(-1, H)) * weights[token, slot, None]
            out.index_add_(0, token, self.quiet(current))
        return out


class Capacity(nn.Module):
    """One expert per token, as long as it has room: within a sample, or within the whole batch."""

    def __init__(self, within: str) -> None:
        super().__init__()
        self.within, self.gate, self.experts = within, nn.Linear(H, E, bias=False), Named()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.gate(hidden), -1)
        mask = F.one_hot(scores.argmax(-1), E)
        if self.within == "batch":
            mask = mask.flatten(0, 1)
        mask = mask * (mask.cumsum(-2) <= 1)
        out = self.experts(hidden.reshape(-1, H), mask.view(-1, 1, E), scores.max(-1).values.view(-1, 1))
        return out.view_as(hidden), scores.square().mean()


class Marked(nn.Module):
    """Dense weights and a mask over the experts, in the owner's own loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate, self.experts = kind, nn.Linear(H, E), nn.ModuleList(SwiGLU() for _ in range(E))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, H)
        scores = F.softmax(self.gate(x), -1)
        if self.kind == "two":
            mask = F.one_hot(scores.topk(2).indices, E).sum(1).bool()
        else:
            mask = scores >= scores.max(-1, keepdim=True).values * (1 - 1e-9)  # one, but for ties
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = mask[:, e].nonzero()[:, 0]
            out[rows] += expert(x[rows]) * scores[rows, e, None]
        return out.view_as(hidden), scores.square().mean()


@pytest.mark.parametrize("layer", [Capacity("sample"), Capacity("batch"), Marked("two"), Marked("one")])
def test_masks(layer: nn.Module) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(layer)), (), tokens(3, 5))
    assert names(captured).count("meshpar.dispatch.default") == 1
    assert names(captured).count("meshpar.grouped_mm.default") == 3
    rows = next(infos_of(node)[0].shape[0] for node in captured.graph.nodes if str(node.target) == "meshpar.dispatch.default")
    assert rows == 3 * 5 * (2 if getattr(layer, "kind", "") == "two" else 1)
    assert not [name for name in names(captured) if "nonzero" in name]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("within", "mesh"), [("sample", "dp=2,ep=2"), ("batch", "dp=2,ep=2"), ("batch", "dp=2,tp=2")])
def test_room_is_counted_as_on_one_device(within: str, mesh: str) -> None:
    torch.manual_seed(0)
    report = mp.verify(Model(Capacity(within)), mesh, tokens(4, 5))
    assert report.ok, str(report)


def test_a_mask_that_marks_more_is_told() -> None:
    """What no trial run saw is found when it happens: here all scores are equal."""
    torch.manual_seed(0)
    model, batch = perturbed(Model(Marked("one"))), tokens(3, 5)
    captured = capture(model, (), batch)
    run(captured, dict(model.named_parameters()) | dict(model.named_buffers()), batch)
    with torch.no_grad():
        model.layers[0].gate.weight.zero_()  # type: ignore[union-attr, operator]
        model.layers[0].gate.bias.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(BatchError, match="whether a token has at most 1 of the experts that a mask marks"):
        run(captured, dict(model.named_parameters()) | dict(model.named_buffers()), batch)


class Passing(nn.Module):
    """Stacked experts 0 to 3; 4 and 5 have no parameters, though one stack has rows for them. Only runs with two choices or more."""

    def __init__(self, beyond: str = "pass") -> None:
        super().__init__()
        self.beyond = beyond
        self.up, self.down = nn.Parameter(torch.randn(E + 2, 6, H)), nn.Parameter(torch.randn(E, H, 6))
        self.bias = nn.Parameter(torch.randn(E, H))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(index, E + 2).permute(2, 1, 0)
        for one in (mask.sum((-1, -2)) > 0).nonzero():
            e = int(one.item())
            slot, token = torch.where(mask[e].squeeze(0))
            y = x[token]
            if e < E:
                y = F.linear(F.silu(F.linear(y, self.up[e])), self.down[e], self.bias[e])
            elif self.beyond == "each":
                y = y * e
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Routed(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.inside = nn.Linear(H, E + 2), experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, H)
        scores, index = F.softmax(self.gate(x), -1).topk(2, -1)
        return self.inside(x, index, scores).view_as(hidden), scores.square().mean()


def test_experts_without_parameters() -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(Routed(Passing()))), (), tokens(3, 5))
    assert names(captured).count("meshpar.dispatch.default") == 1
    assert captured.experts == {"layers.0.inside": "stack"}


def test_experts_without_parameters_on_a_mesh() -> None:
    torch.manual_seed(0)
    report = mp.verify(Model(Routed(Passing())), "ep=2,tp=2", tokens(4, 5))
    assert report.ok, str(report)


def test_experts_without_parameters_that_differ() -> None:
    with pytest.raises(mp.CaptureError, match="inside: lifted from one expert, it gave other values"):
        capture(Model(Routed(Passing("each"))), (), tokens(3, 5))


class Dropping(nn.Module):
    """Drops inside its experts, on each expert's rows in the loop, or on the sum."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.gate, self.drop = where, nn.Linear(H, E), nn.Dropout(0.5)
        inside: list[nn.Module] = [nn.Dropout(0.25)] if where == "expert" else []
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 6), nn.ReLU(), *inside, nn.Linear(6, H)) for _ in range(E))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, H)
        weights, index = F.softmax(self.gate(x), -1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            y = expert(x[token])
            out.index_add_(0, token, (self.drop(y) if self.where == "loop" else y) * weights[token, slot, None])
        out = out * 1.0
        return (self.drop(out) if self.where == "sum" else out).view_as(hidden), weights.mean()


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("where", "lifted", "drops"), [("expert", True, [0.25]), ("loop", False, [0.5] * E), ("sum", True, [0.5])])
def test_dropout_is_kept(where: str, lifted: bool, drops: list[float]) -> None:
    captured = capture(Model(Dropping(where)), (), tokens(3, 5))
    assert ("meshpar.dispatch.default" in names(captured)) is lifted
    assert [node.args[1] for node in captured.graph.nodes if "dropout" in str(node.target)] == drops


class DroppingStack(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.drop = where, nn.Dropout(0.5)
        self.up, self.down = nn.Parameter(torch.randn(E + 2, H, 6)), nn.Parameter(torch.randn(E + 2, 6, H))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E + 2):
            token, slot = torch.where(index == e)
            y = (x[token] @ self.up[e]).relu()
            y = (self.drop(y) if self.where == "rows" else y) @ self.down[e]
            out.index_add_(0, token, y * weights[token, slot, None])
        return self.drop(out) if self.where == "sum" else out


def test_dropout_in_stacks_is_kept() -> None:
    captured = capture(Model(Routed(DroppingStack("rows"))), (), tokens(3, 5))
    assert captured.experts == {"layers.0.inside": "stack"}
    assert [node.args[1] for node in captured.graph.nodes if "dropout" in str(node.target)] == [0.5]
    captured = capture(Model(Routed(DroppingStack("sum"))), (), tokens(3, 5))
    assert captured.experts == {} and "it drops elements at random" in captured.unrecognised["layers.0.inside"]


def test_hooks_do_not_see_trial_runs() -> None:
    model, seen = Model(Capacity("sample")), SimpleQueue[None]()  # (a list that a forward changes would be refused)
    model.layers[0].gate.register_forward_hook(lambda module, args, output: seen.put(None))
    captured = capture(model, (), tokens(3, 5))
    assert "meshpar.dispatch.default" in names(captured)
    assert seen.qsize() == 1


class Conv(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 1, 3, padding=1), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(x))
        return y


class Fixed(nn.Module):
    """A chain of equal layers that do not run on rows, and share a module: an export then puts proxies in the place of modules."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.chain = nn.ModuleList(Conv(act) for _ in range(3))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        y = hidden.unsqueeze(1)
        for layer in self.chain:
            y = layer(y)
        return y.squeeze(1), y.mean()


def test_a_trial_run_that_fails_inside_a_module() -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(Fixed(), Marked("two"))), (), tokens(3, 5))
    found = {facts(node).module for node in captured.graph.nodes if "conv" in str(node.target)}
    routers = {facts(node).module for node in captured.graph.nodes if node.target is torch.ops.aten.softmax.int}
    assert routers == {"layers.1"}
    assert captured.experts == {"layers.1": "list"}
    assert found == {f"layers.0.chain.{i}.conv" for i in range(3)}
