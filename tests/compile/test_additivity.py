"""How terms of a loss follow from those of microbatches: every one against the whole batch, and named where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.compile.denominators import split_denominators
from meshpar.graph.run import run
from meshpar.passes.inputs import extra_inputs
from tests.sharding.models import captured_of

Loss = Callable[[Tensor, Tensor], Tensor]

EXACT: dict[str, Loss] = {
    "sum": lambda o, y: F.mse_loss(o, y, reduction="sum"),
    "sum over samples": lambda o, y: (o - y).square().sum() / len(o),
    "sum over elements": lambda o, y: (o - y).square().sum() / o.numel(),
    "sum times 1 / samples": lambda o, y: (o - y).square().sum() * (1 / o.shape[0]),
    "sum of rows over elements": lambda o, y: (o - y).square().sum(-1).sum() / o.numel(),
    "sum times a constant": lambda o, y: (o - y).square().sum() * 0.01,
    "sum over a count of the caller": lambda o, y: (o - y).square().sum() / 187,
    "mean": lambda o, y: (o - y).square().mean(),
    "mean of sums": lambda o, y: (o - y).square().sum(-1).mean(),
    "sum of means": lambda o, y: (o - y).square().mean(0).sum(),
    "mean and constant": lambda o, y: 1 - F.cosine_similarity(o, y).mean(),
    "labels, sum": lambda o, y: F.cross_entropy(o, y.argmax(-1), reduction="sum"),
    "labels, mean": lambda o, y: F.cross_entropy(o, y.argmax(-1)),
    "labels, mean, and a sum": lambda o, y: F.cross_entropy(o, y.argmax(-1)) + 1e-3 * o.square().sum(),
    "smooth": lambda o, y: F.smooth_l1_loss(o, y),
    "probabilities": lambda o, y: F.binary_cross_entropy_with_logits(o, (y > 0).to(o)),
    "divergence": lambda o, y: F.kl_div(o.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "masked": lambda o, y: ((o - y).square() * (y > 0)).sum() / (y > 0).sum(),
    "stacked": lambda o, y: torch.stack([(o - y).square().mean(), o.abs().mean()]).sum(),
}
AVERAGED: dict[str, Loss] = {
    "root": lambda o, y: (o - y).square().mean().sqrt(),
    "norm": lambda o, y: (o - y).norm(),
    "product of means": lambda o, y: (o - y).square().mean() * o.abs().mean(),
    "largest": lambda o, y: (o - y).square().max(),
    "hardest": lambda o, y: (o - y).square().mean(1).topk(3).values.mean(),
    "median": lambda o, y: (o - y).square().median(),
    "log of sum": lambda o, y: torch.logsumexp((o - y).square().flatten(), 0),
    "overlap": lambda o, y: 1 - 2 * (o.sigmoid() * (y > 0)).sum() / (o.sigmoid().sum() + (y > 0).sum()),
    "sum and constant": lambda o, y: (1 + (o - y).square().sum()) * 2,
    "balance": lambda o, y: (o.softmax(-1).mean(0) * (y > 0).double().mean(0)).sum(),
}


class Net(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.up, self.loss = nn.Linear(6, 5), loss

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(torch.tanh(self.up(x)), y)}


def parts(samples: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{n: torch.randn(samples, d, dtype=torch.float64, generator=draw) for n, d in (("x", 6), ("y", 5))} for _ in range(3)]


def step(loss: Loss, samples: int) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
    """Loss and gradients of three microbatches, and of the whole batch; the terms that are named."""
    torch.manual_seed(0)
    model, batches = Net(loss).double(), parts(samples)
    split = split_denominators(captured_of(model, batches[0]), 3)
    state = dict(model.named_parameters())
    counted = {}
    if split.counts is not None:
        sums = [sum(one) for one in zip(*(run(split.counts, state, part) for part in batches), strict=True)]
        counted = dict(zip(extra_inputs(split.captured.graph).denominators, sums, strict=True))
    ours: Tensor = sum(run(split.captured, state, part | counted)[0] for part in batches)  # type: ignore[assignment]
    right = model(**{n: torch.cat([part[n] for part in batches]) for n in ("x", "y")})["loss"]
    both = [[value.detach(), *torch.autograd.grad(value, list(state.values()))] for value in (ours, right)]
    return both[0], both[1], split.averaged


@pytest.mark.sweep(16)
@pytest.mark.parametrize("name", EXACT)
def test_sums_add_up_and_means_are_averaged(name: str) -> None:
    ours, right, named = step(EXACT[name], 4)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b)
    assert named == ()


@pytest.mark.sweep(16)
@pytest.mark.parametrize("name", EXACT)
def test_microbatches_of_one_sample_are_exact_or_named(name: str) -> None:
    """A sum over one sample and a mean over it are one thing."""
    ours, right, named = step(EXACT[name], 1)
    exact = all(torch.allclose(a, b) for a, b in zip(ours, right, strict=True))
    assert exact or named
    assert not named or name not in ("mean", "mean and constant", "labels, mean", "masked", "smooth", "probabilities")


@pytest.mark.parametrize("name", AVERAGED)
def test_what_is_neither_is_named(name: str) -> None:
    ours, right, named = step(AVERAGED[name], 4)
    assert named and "test_additivity.py" in named[0]
    assert any(not torch.allclose(a, b) for a, b in zip(ours, right, strict=True))
