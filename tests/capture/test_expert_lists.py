"""Experts in a list and the loop over them: lifted when proven to be the weighted sum that an index chooses, run as written when not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.captured import Captured
from meshpar.capture.export import capture
from tests.capture.models import assert_same, perturbed
from tests.capture.moe import LIFTED, H, Model, MoE, SwiGLU, tokens


def names(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes]


@pytest.mark.parametrize("style", LIFTED)
def test_every_way_to_loop(style: str) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(MoE(style))), (), tokens(2, 4))
    found = names(captured)
    assert found.count("meshpar.dispatch.default") == found.count("meshpar.combine.default") == 1
    assert found.count("meshpar.grouped_mm.default") == 3
    stacks = [node for node in captured.graph.nodes if node.meta.get("expert_stack")]
    assert [[part.target for part in node.args[0]] for node in stacks] == [
        [f"layers.0.experts.{e}.{name}" for e in range(4)] for name in ("w1.weight", "w2.weight", "w3.weight", "w3.bias")
    ]


@pytest.mark.parametrize("style", ["select", "soft", "capped"])
def test_other_sums_are_left_as_they_are(style: str) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(MoE(style))), (), tokens(2, 4))
    assert "meshpar.dispatch.default" not in names(captured)


class Inline(nn.Module):
    """The loop in the forward itself, in the branch for training; experts of another width; a loop variable read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 4)
        self.members = nn.ModuleDict({name: nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.LayerNorm(12)) for name in "abcd"})

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        identity, shape = hidden, hidden.shape
        scores = F.softmax(self.gate(hidden), -1)
        weights, index = scores.topk(2, -1)
        if self.training:
            flat = hidden.reshape(-1, H).repeat_interleave(2, 0)
            y = torch.empty(flat.shape[0], 12, dtype=hidden.dtype)
            for i, expert in enumerate(self.members.values()):
                y[index.flatten() == i] = expert(flat[index.flatten() == i])
            y = (y.view(-1, 2, 12) * weights.view(-1, 2, 1)).sum(1)
            y = y.view(*shape[:-1], 12) * (i - 2)
        else:
            y = torch.cat([identity, hidden[..., :4]], -1)
        return y[..., :H] + y[..., 4:], weights.var()


class Own(nn.ModuleList):
    """A list with a forward of its own, sums on top of what it is given, results by return."""

    def __init__(self) -> None:
        super().__init__(SwiGLU() for _ in range(3))
        self.top = 2

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = x * 0.5
        for i in range(len(self)):
            where = (index == i).nonzero()
            if len(where) == 0:
                continue
            token, slot = where[:, 0], where[:, 1]
            total = total.index_add(0, token, self[i](x[token]) * weights[token, slot, None])
        return total


class WithOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, 3), Own()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, H)
        weights, index = self.gate(x).sigmoid().topk(self.experts.top, -1)
        return self.experts(x, index, weights).view_as(hidden), weights.mean()


@pytest.mark.parametrize("layer", [Inline, WithOwn])
def test_loops_in_the_forward_itself(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(layer())), (), tokens(2, 4))
    assert names(captured).count("meshpar.dispatch.default") == 1
    assert not [name for name in names(captured) if "nonzero" in name]


class Detached(MoE):
    """The same values as a known way, other gradients."""

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return super().mixtral(x, weights.detach(), index)


def test_gradients_are_compared_too() -> None:
    captured = assert_same(perturbed(Model(Detached("mixtral"))), (), tokens(2, 4))
    assert "meshpar.dispatch.default" not in names(captured)


class Unlike(MoE):
    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.experts[1] = nn.Sequential(nn.Linear(H, 6), nn.ReLU(), nn.Linear(6, H))


class Mixing(SwiGLU):
    """An expert whose rows depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True) if x.shape[0] else x)


def test_experts_that_are_not_alike_or_mix_rows() -> None:
    torch.manual_seed(0)
    assert "meshpar.dispatch.default" not in names(assert_same(perturbed(Model(Unlike("mixtral"))), (), tokens(2, 4)))
    layer = MoE("dense")
    layer.experts = nn.ModuleList(Mixing() for _ in range(4))
    assert "meshpar.dispatch.default" not in names(assert_same(perturbed(Model(layer)), (), tokens(2, 4)))


def test_many_experts_cost_no_more_to_capture() -> None:
    captured = capture(Model(MoE("skipping", experts=64, choices=2)), (), tokens(2, 4))
    assert sum(node.op == "call_function" for node in captured.graph.nodes) < 80
