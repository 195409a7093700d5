"""Experts of any size: recognising them costs a few seconds and little memory, and what is proven at small sizes holds at the real ones."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture import stand_in
from meshpar.capture.experts import proofs as expert_proofs
from meshpar.capture.experts import record as expert_record
from meshpar.capture.experts.body import Body, NotLifted
from meshpar.capture.experts.lists import doubles as expert_doubles
from meshpar.capture.experts.lists import owners as expert_lists
from meshpar.capture.experts.lists.doubles import Case, Double, Trial
from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from tests.capture.experts.test_stacks import K
from tests.capture.models import assert_same, perturbed
from tests.capture.moe import Model, MoE, SwiGLU, tokens

WIDE, E = 160, 4


class Stack(nn.Module):
    """Stacked parameters and a loop over the experts that were hit; numbers of its sizes in attributes."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.inner, self.experts = inner, experts
        self.up, self.down = nn.Parameter(torch.randn(experts, width, 2 * inner)), nn.Parameter(torch.randn(experts, inner, width))
        self.lead = nn.Parameter(torch.randn(experts, width))

    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, num_classes=self.experts).permute(2, 1, 0)
        for i in mask.sum(dim=(-1, -2)).nonzero():
            slot, row = torch.where(mask[i[0]])
            y = tokens[row] @ self.up[i[0]]
            y = F.silu(y[:, : self.inner]) * y[:, self.inner :]
            out.index_add_(0, row, (y @ self.down[i[0]] + self.lead[i[0]]) * gates[row, slot, None])
        return out


class Stacked(nn.Module):
    def __init__(self, width: int, inner: int, experts: int = E, kind: Callable[..., nn.Module] = Stack) -> None:
        super().__init__()
        self.gate, self.inside = nn.Linear(width, experts), kind(width, inner, experts)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.flatten(0, 1)
        gates, chosen = F.softmax(self.gate(x), -1).topk(K, -1)
        return self.inside(x, gates=gates, chosen=chosen).view_as(hidden), gates.mean()


def mixtral() -> nn.Module:
    return MoE("mixtral", experts=8, width=4096, inner=14336)


def stacked() -> nn.Module:
    return Stacked(7168, 2048, 256)


@pytest.mark.parametrize(("layer", "width", "way"), [(mixtral, 4096, "list"), (stacked, 7168, "stack")])
def test_the_largest_layers_on_meta(layer: Callable[[], nn.Module], width: int, way: str) -> None:
    with torch.device("meta"):
        model = Model(layer(), layer(), width=width).to(torch.bfloat16)
    seconds, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captured = capture(model, (), tokens(2, 4))
    seconds, memory = time.process_time() - seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert [*captured.experts.values()] == [way, way] and not captured.unrecognised
    assert seconds < 15 and memory < 400 * 1024, f"{seconds:.1f} s of processor time, {memory / 1024:.0f} MB more"


@pytest.mark.parametrize("layer", [lambda: MoE("hits", width=WIDE, inner=200), lambda: Stacked(WIDE, 200)])
def test_wide_experts_are_right(layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (expert_record, expert_lists, expert_doubles, stand_in):
        monkeypatch.setattr(module, "LARGE", 1000)  # parameters without values, and cheap linear functions in their owner
    seen = []
    same = expert_proofs.same_steps
    monkeypatch.setattr(expert_proofs, "same_steps", lambda *args: seen.append(same(*args)) or seen[-1])
    torch.manual_seed(0)
    captured = assert_same(perturbed(Model(layer(), width=WIDE)), (), tokens(2, 4))
    assert captured.experts and seen == [True]


def test_many_tokens_are_tried_at_small_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a trial grows with tokens x experts x width."""
    tried: list[tuple[bool, int]] = []
    double = Case.double

    def noted(self: Case, width: int, trial: Trial, *rest: Any) -> Double:
        tried.append((bool(self.sizes), prod(trial.sizes)))
        return double(self, width, trial, *rest)

    monkeypatch.setattr(Case, "double", noted)
    layer = MoE("dense", width=WIDE, inner=200)
    found = expert_lists.Lists().lifted(layer, ("experts",), (torch.randn(8, 32, WIDE),), {})
    assert isinstance(found, expert_lists.LiftedLoop)
    assert max(tokens for small, tokens in tried if small) == 256 and max(tokens for small, tokens in tried if not small) == 6


def test_a_large_tensor_of_a_double_takes_few_pages() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    made = stand_in.filled(torch.empty(4096, 12288, device="meta"), torch.Generator().manual_seed(0), torch.double)
    assert resident() - before < 24 << 20, "of 384 MiB"
    assert bool((made != 0).any(0).all()) and int((made != 0).any(1).sum()) >= 2048, "values in every column, and in many rows"


class Wide(nn.Module):
    """Layers one after another, tables with more rows than a small double has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 160)
        self.layers = nn.ModuleList(nn.Linear(160, 160) for _ in range(48))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_take_one_double_of_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[bool] = []
    double = Case.double
    monkeypatch.setattr(Case, "double", lambda self, *rest: sizes.append(bool(self.sizes)) or double(self, *rest))
    found = expert_lists.Lists().lifted(Wide(), ("layers",), (torch.randint(300, (2, 8)),), {})
    assert isinstance(found, NotLifted) and not found.like_experts, found
    assert sizes.count(False) == 1, "the first shows that they run one after another"


class ByWidth(SwiGLU):
    """Another function where it is wide."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1) if x.shape[-1] > 100 else super().forward(x)


class Shifted(SwiGLU):
    """A number that follows the width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.shape[-1] ** -0.5


@pytest.mark.parametrize("kind", [ByWidth, Shifted])
def test_what_depends_on_the_width_is_proven_at_its_own(kind: type[SwiGLU], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    same = expert_proofs.same_steps
    monkeypatch.setattr(expert_proofs, "same_steps", lambda *args: seen.append(same(*args)) or seen[-1])
    layer = MoE("skipping", width=WIDE)
    layer.experts = nn.ModuleList(kind(WIDE, 200) for _ in range(E))
    captured = assert_same(perturbed(Model(layer, width=WIDE)), (), tokens(2, 4))
    assert captured.experts and seen == [False]


class Renormalised(Stack):
    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        return super().forward(tokens, gates=gates / gates.sum(-1, keepdim=True), chosen=chosen)


def test_a_wide_form_that_only_looks_like_it_is_not_lifted() -> None:
    with pytest.raises(CaptureError, match=r"inside: lifted from one expert, it gave other values than its forward"):
        capture(Model(Stacked(WIDE, 200, kind=Renormalised), width=WIDE), (), tokens(2, 4))


def test_reduced_sizes() -> None:
    assert stand_in.reduced([torch.empty(8, 4096, 28672), torch.empty(8, 14336, 4096)], 4096, kept=(8,)) == {4096: 12, 14336: 20, 28672: 40}
    assert stand_in.reduced([torch.empty(256, 512)], 512, kept=(256,)) == {512: 12}
    assert stand_in.reduced([torch.empty(8, 6)], 8) == {}


def test_the_same_steps_at_other_sizes() -> None:
    def record(width: int, inner: int, slope: float = 0.1) -> Body:
        w = torch.randn(inner, width)
        return expert_record.record(
            lambda x: F.leaky_relu(F.linear(x, w).narrow(1, 0, inner // 2), slope), width, torch.float, each={"w": w}
        )

    sizes = {160: 12, 200: 20}
    large, small = record(160, 200), record(12, 20)
    assert expert_proofs.same_steps(large, small, sizes)
    assert not expert_proofs.same_steps(large, record(12, 22), sizes)
    assert not expert_proofs.same_steps(large, record(12, 20, 0.2), sizes)
    assert not expert_proofs.same_steps(large, replace(small, steps=small.steps[:-1]), sizes)
