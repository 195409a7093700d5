"""Experts whose parameters are joined along one dim, [E * n, ...], and told apart in the forward; hidden states [B, S, H]."""

from __future__ import annotations

import resource
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from meshpar.sharding.types import Shard
from tests.capture.models import assert_same, perturbed

E, H, N, K = 4, 12, 6, 2


class Holder(nn.Module):
    """All parameters, and what one expert does with its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E * inner, width)), nn.Parameter(torch.randn(E * inner, width))
        self.lead = nn.Parameter(torch.randn(E * width))

    def forward(self, x: Tensor, up: Tensor, down: Tensor, lead: Tensor) -> Tensor:
        return self.inner(x @ up.T) @ down + lead

    def inner(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Written(Holder):
    """Rows in another shape, overwritten there, and back."""

    def inner(self, x: Tensor) -> Tensor:
        y = F.silu(x).unsqueeze(0)
        y.mul_(2.0)
        return y.squeeze(0)


class Viewed(nn.Module):
    """Views of all, of which an expert takes its part; hidden states [B, S, H]."""

    def __init__(self, width: int = H, inner: int = N, kind: type[Holder] = Holder) -> None:
        super().__init__()
        self.inside = kind(width, inner)
        self.width, self.inner, self.count, self.few = width, inner, E, 2

    def part(self, whole: Tensor, e: Tensor) -> Tensor:
        shape = (-1, self.inner, self.width) if whole.dim() == 2 else (-1, self.width)
        return whole.view(shape)[e]

    def forward(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.width)
        out = torch.zeros_like(rows)
        mask = F.one_hot(chosen, E + 1).permute(2, 1, 0)
        for hit in mask.sum(dim=(-1, -2)).nonzero():
            slot, token = torch.where(mask[hit[0]])
            own = [self.part(whole, hit[0]) for whole in (self.inside.up, self.inside.down, self.inside.lead)]
            out.index_add_(0, token, self.inside(rows[token], *own) * gates[token, slot, None])
        return out.view(hidden.shape)


class Sliced(Viewed):
    def part(self, whole: Tensor, e: Tensor) -> Tensor:
        n = whole.shape[0] // E
        return whole[int(e) * n : int(e) * n + n]


class Chunked(Viewed):
    def part(self, whole: Tensor, e: Tensor) -> Tensor:
        return whole.to(whole.dtype, copy=True).chunk(E)[int(e)]


class Overwriting(Viewed):
    def __init__(self, width: int = H, inner: int = N) -> None:
        super().__init__(width, inner, Written)


class Woven(Viewed):
    """Experts take turns along the dim: not one after the other."""

    def part(self, whole: Tensor, e: Tensor) -> Tensor:
        return whole.unflatten(0, (-1, E))[:, e]


class Layer(nn.Module):
    def __init__(self, kind: type[Viewed], width: int = H, inner: int = N) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(width, E, bias=False), kind(width, inner)

    def forward(self, hidden: Tensor) -> Tensor:
        gates, chosen = F.softmax(self.gate(hidden.flatten(0, -2)), -1).topk(K, -1)
        return (hidden + self.experts(hidden, chosen, gates)).square().mean()


@pytest.mark.parametrize("kind", [Viewed, Sliced, Chunked, Overwriting])
def test_lifted(kind: type[Viewed]) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Layer(kind)), (torch.randn(2, 5, H, dtype=torch.double),), {}, loss=lambda loss: loss)
    assert captured.experts == {"experts": "stack"} and not captured.unrecognised


def test_experts_that_take_turns_are_not_lifted() -> None:
    with pytest.raises(CaptureError, match="mixes the experts' parameters"):
        capture(Layer(Woven), (torch.randn(2, 5, H),))


@pytest.mark.parametrize("mesh", ["tp=2", "ep=2,tp=2"])
def test_cut_over_ranks(mesh: str) -> None:
    torch.manual_seed(0)
    mp.verify(Layer(Viewed), mesh, (torch.randn(4, 5, H),)).raise_if_failed()


def test_each_rank_has_its_experts() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(Layer(Viewed), mp.make_mesh("ep=2"), example=(torch.randn(2, 5, H),))
        placed = {name: plan.placements["ep"] for name, plan in pm.plan.parameters.items()}
    assert all((type_ == Shard(0, 1, ((E * n, 1),))) == ("experts" in name) for (name, type_), n in zip(placed.items(), (0, N, N, H)))


def test_the_largest_layers_on_meta() -> None:
    with torch.device("meta"):
        model = Layer(Viewed, 6144, 10752).to(torch.bfloat16)
    seconds, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captured = capture(model, (torch.randn(2, 8, 6144, dtype=torch.bfloat16),))
    seconds, memory = time.process_time() - seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert [*captured.experts] == ["experts"]
    assert seconds < 15 and memory < 400 * 1024, f"{seconds:.1f} s of processor time, {memory / 1024:.0f} MB more"
