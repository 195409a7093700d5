"""Calls that mix samples: each against what changes when another sample does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.graph.facts import facts
from meshpar.passes.samples import Samples, mixing
from tests.sharding.models import captured_of

Call = Callable[[Tensor], Tensor]


def written(h: Tensor, *at: int | slice) -> Tensor:
    h = h.clone()
    h[at] = 1.0
    return h


NUMBERED = ("the last one is written", "some are written", "one is added to", "one is scattered to")
"""A sample is treated by its number, which is another one in a microbatch."""
MIXING: dict[str, Call] = {
    NUMBERED[0]: lambda h: written(h, -1),
    NUMBERED[1]: lambda h: written(h, slice(1, 3)),
    NUMBERED[2]: lambda h: h.index_add(0, torch.tensor([3]), torch.ones(1, 8, dtype=h.dtype)),
    NUMBERED[3]: lambda h: h.scatter(0, torch.full((1, 8), 2), 1.0),
    "statistics": lambda h: (h - h.mean(0)) * (h.var(0) + 1e-5).rsqrt(),
    "pairs": lambda h: (h @ h.t()).softmax(-1) @ h,
    "covariance": lambda h: h @ (h.t() @ h),
    "rolled": lambda h: h + h.roll(1, 0),
    "flipped": lambda h: h + h.flip(0),
    "sorted": lambda h: h.sort(0).values,
    "summed up": lambda h: h.cumsum(0),
    "softmax over samples": lambda h: h.softmax(0),
    "largest": lambda h: h / h.abs().max(),
    "norm of all": lambda h: h / h.norm(),
    "first": lambda h: h - h[0],
    "next": lambda h: h + torch.cat([h[1:], h[:1]]),
    "halves": lambda h: torch.cat([h[:2] + h[2:], h[2:] - h[:2]]),
    "permuted": lambda h: h + h[torch.tensor([1, 2, 3, 0])],
    "counted permutation": lambda h: h + h[(torch.arange(4) + 1) % 4],
    "gathered": lambda h: h + h.gather(0, torch.full((4, 8), 1)),
    "selected": lambda h: h + h.index_select(0, torch.tensor([3, 2, 1, 0])),
    "in its order": lambda h: h + h[h[:, 0].argsort()],
    "the best": lambda h: h * (h[:, 0] >= h[:, 0].topk(2).values[-1]).unsqueeze(1),
    "groups of two": lambda h: h + h.view(2, 2, 8).mean(1, keepdim=True).expand(2, 2, 8).reshape(4, 8),
    "pooled": lambda h: F.avg_pool1d(h.t().unsqueeze(0), 3, 1, 1).squeeze(0).t(),
    "spread": lambda h: torch.cat([h[:, :7], h.std(0).mean().expand(4, 1)], 1),
}
ALONE: dict[str, Call] = {
    "elementwise": lambda h: h.relu() * h,
    "layer norm": lambda h: F.layer_norm(h, (8,)),
    "statistics of a sample": lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
    "positions of a sample": lambda h: h.roll(1, 1).cumsum(1).softmax(1).flip(1),
    "outer product": lambda h: (h.unsqueeze(2) * h.unsqueeze(1)).softmax(-1).sum(-1),
    "grouped heads": lambda h: h.view(4, 2, 4).transpose(0, 1).reshape(8, 4).relu().view(2, 4, 4).transpose(0, 1).reshape(4, 8),
    "a column is written": lambda h: written(h, slice(None), 2),
    "its own row": lambda h: h[torch.arange(4)] + h[torch.arange(4), h.argmax(1)].unsqueeze(1),
    "twice": lambda h: sum(torch.cat([h, h * 2]).chunk(2)),  # type: ignore[arg-type, return-value]
    "like it": lambda h: h + torch.zeros_like(h) + torch.ones(8).type_as(h),
}


class Net(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.up, self.call = nn.Linear(8, 8), call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.call(self.up(x)), y)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 8, dtype=torch.float64, generator=generator) for name in ("x", "y")}


def found(model: nn.Module) -> list[str]:
    captured = captured_of(model, batch())
    output = next(n for n in captured.graph.nodes if n.op == "output")
    samples = Samples(captured.graph, captured.batch_dims)
    return [str(facts(node).source) for node in mixing(samples, captured.graph, output.args[0])]


def really(call: Call) -> bool:
    """Whether what comes out for a sample changes with another one."""
    x = batch()["x"].requires_grad_()
    seen = [torch.autograd.grad(call(x)[k].square().sum(), x)[0].abs().sum(1) > 0 for k in range(4)]
    return bool((torch.stack(seen) & ~torch.eye(4, dtype=torch.bool)).any())


@pytest.mark.sweep(11)
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_found_at_its_line(name: str) -> None:
    assert really(MIXING[name]) or name in ("the best", "in its order", *NUMBERED)  # (a choice has no gradient)
    lines = found(Net(MIXING[name]).double())
    assert lines and all("test_samples.py" in line for line in lines)


@pytest.mark.parametrize("name", ALONE)
def test_what_treats_samples_by_themselves_is_left_alone(name: str) -> None:
    assert not really(ALONE[name])
    assert found(Net(ALONE[name]).double()) == []


def test_a_permutation_that_is_drawn() -> None:
    assert found(Net(lambda h: h + h[torch.randperm(4)]).double())


@pytest.mark.parametrize("microbatches", [1, 2])
def test_several_microbatches_are_warned_of(microbatches: int, recwarn: pytest.WarningsRecorder) -> None:
    config = mp.ParallelConfig(microbatches=microbatches)
    with mp.simulate(2):
        pm = mp.parallelize(Net(MIXING["pairs"]).double(), mp.make_mesh("tp=2"), example=batch(), config=config)
        told = [str(one.message) for one in recwarn if "not of the whole batch: the model (test_samples.py:" in str(one.message)]
        assert len(told) == microbatches - 1
        assert ("the model (test_samples.py:" in pm.explain()) is (microbatches > 1)
