"""Rows chosen by a mask: loops over a list of experts, masked losses, and what cannot be lifted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from meshpar.graph.facts import facts
from tests.capture.models import assert_same, perturbed


class Experts(nn.Module):
    """A mixture of experts as a loop over a ModuleList, in the ways people write it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x.view(-1, 8)
        weights, chosen = torch.topk(F.softmax(self.router(h), -1), 2, -1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            out = getattr(self, self.style)(h, weights, chosen == i, expert, out)
        return {"loss": out.square().mean(), "out": out.view_as(x)}

    def index_add(self, h: Tensor, weights: Tensor, mask: Tensor, expert: nn.Module, out: Tensor) -> Tensor:
        slot, token = torch.where(mask.t())
        y = expert(h[None, token].reshape(-1, 8)) * weights[token, slot, None]
        out.index_add_(0, token, y.to(h.dtype))
        return out

    def read_modify_write(self, h: Tensor, weights: Tensor, mask: Tensor, expert: nn.Module, out: Tensor) -> Tensor:
        token, slot = mask.nonzero(as_tuple=True)
        out[token] += weights[token, slot, None] * expert(h[token])
        return out

    def nonzero(self, h: Tensor, weights: Tensor, mask: Tensor, expert: nn.Module, out: Tensor) -> Tensor:
        token = mask.any(-1).nonzero().squeeze(-1)
        y = expert(h[token]) * (weights * mask).sum(-1)[token].unsqueeze(-1)
        return out.index_add(0, token, y)

    def boolean(self, h: Tensor, weights: Tensor, mask: Tensor, expert: nn.Module, out: Tensor) -> Tensor:
        rows = mask.any(-1)
        out[rows] = out[rows] + expert(h[rows]) * (weights * mask).sum(-1)[rows].unsqueeze(-1)
        return out

    def overwrite(self, h: Tensor, weights: Tensor, mask: Tensor, expert: nn.Module, out: Tensor) -> Tensor:
        (token,) = torch.where(mask[:, 0])
        result = out.clone()
        result[token] = expert(h[token]) * weights[token, 0].unsqueeze(-1)
        return result


@pytest.mark.sweep(2)
@pytest.mark.parametrize("style", ["index_add", "read_modify_write", "nonzero", "boolean", "overwrite"])
def test_loops_over_experts(style: str) -> None:
    torch.manual_seed(0)
    captured = assert_same(perturbed(Experts(style)), (torch.randn(2, 5, 8, dtype=torch.double),), {})
    assert all(isinstance(n, int) for node in captured.graph.nodes for n in getattr(facts(node).info, "shape", ()))


def test_masked_losses() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits, mask = self.head(x), labels >= 0
            scores = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return {"loss": (logits[mask].square().sum(-1) * 0.1).sum() / mask.sum() - scores[mask].sum()}

    torch.manual_seed(0)
    labels = torch.tensor([[0, -1, 3], [-1, -1, 4]])
    assert_same(perturbed(Model()), (), {"x": torch.randn(2, 3, 4, dtype=torch.double), "labels": labels})


CHOSEN: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda y, labels: F.cross_entropy(y[labels >= 0], labels[labels >= 0]),
    lambda y, labels: F.cross_entropy(y[labels >= 0], labels[labels >= 0], reduction="sum", label_smoothing=0.1),
    lambda y, labels: F.cross_entropy(y[labels >= 0], labels[labels >= 0], ignore_index=2, weight=torch.arange(5.0).double()),
    lambda y, labels: F.nll_loss(y.log_softmax(-1)[labels >= 0], labels.masked_select(labels >= 0)),
    lambda y, labels: y[labels >= 0].mean() + y[labels >= 0].square().mean(0).sum() + y[labels >= 0].mean((0, 1), keepdim=True).sum(),
    lambda y, labels: y[labels > 9].sum() + F.cross_entropy(y[labels > 9], labels[labels > 9], reduction="sum") + y.sum(),  # none
    lambda y, labels: (y.masked_select(y > 0) ** 2).sum(),
    lambda y, labels: _masked_distances(y, labels),
    lambda y, labels: (y[labels >= 0].cumsum(-1) * y[labels >= 0].flip(-1)).sum() + y[labels >= 0].std(-1).sum(),
    lambda y, labels: y[labels >= 0].topk(2).values.sum() + y[labels >= 0].sort(-1).values[:, 0].sum() + y[labels >= 0].norm(dim=-1).sum(),
    lambda y, labels: torch.bmm(y[labels >= 0].unsqueeze(1), y[labels >= 0].unsqueeze(2)).sum(),
    lambda y, labels: y[labels >= 0].square().sum() / y[labels >= 0].shape[0] + y[labels >= 0].sum() * y[labels >= 0].numel(),
    lambda y, labels: (y[labels >= 0] * y[labels >= 0].shape[0]).sum() / max(1, y[labels >= 0].shape[0]) + y[labels > 9].sum() / 1,
    lambda y, labels: y[labels >= 0].sin().sum() / (1 + y[labels >= 0].shape[0]) + y[labels >= 0].reshape(-1, 1).square().sum(),
    lambda y, labels: F.kl_div(y.log_softmax(-1)[labels >= 0], y.softmax(-1)[labels >= 0], reduction="batchmean"),
    lambda y, labels: _masked_scores(y, labels),
    lambda y, labels: torch.cat([y[labels >= 0], y[labels >= 0].sin()], -1).square().sum() + y[labels >= 0][:, [0, 2]].sum(),
]


def _masked_distances(y: Tensor, labels: Tensor) -> Tensor:
    """Two selections by one mask: losses compare their sizes."""
    mask = (labels >= 0).unsqueeze(-1).expand_as(y)
    target = labels.unsqueeze(-1).expand_as(y).masked_select(mask).to(y.dtype)
    return F.l1_loss(y.masked_select(mask), target) + F.mse_loss(y.sin()[mask], target, reduction="sum") + F.smooth_l1_loss(y[mask], target)


def _masked_scores(y: Tensor, labels: Tensor) -> Tensor:
    """Targets of rows that are not chosen are no numbers."""
    mask, target = labels >= 0, labels.to(y.dtype).div(4.0).sqrt().unsqueeze(-1).expand_as(y)
    weight = torch.arange(1.0, 6.0, dtype=y.dtype)
    total = F.binary_cross_entropy_with_logits(y[mask], target[mask], pos_weight=weight, reduction="sum")
    return total + F.binary_cross_entropy(y[mask].sigmoid(), target[mask]) + F.mse_loss(y[mask], target[mask])


class Scoring(nn.Module):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(4, 5), loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.head(x), labels)}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss", CHOSEN)
def test_losses_of_chosen_rows(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[0, -1, 3], [-1, -1, 4]])
    assert_same(perturbed(Scoring(loss)), (), {"x": torch.randn(2, 3, 4, dtype=torch.double), "labels": labels})


@pytest.mark.parametrize("label", [3, -1])
def test_one_row_to_choose(label: int) -> None:
    """Dims of one element have no name in a rule."""
    batch = {"x": torch.randn(2, 3, 4, dtype=torch.double), "labels": torch.full((2, 3), label)}
    model = Scoring(lambda y, labels: y[0, :1][labels[0, :1] >= 0].tanh().square().sum() + y.sum())
    captured = assert_same(perturbed(model), (), batch)
    assert not any(node.target is torch.ops.meshpar.expect.default for node in captured.graph.nodes), "any number of rows will do"


class Spelling(nn.Module):
    """The loss of a speech model: targets of different lengths, one after the other."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.head, self.reduction = nn.Linear(4, 6), reduction

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores, mask = self.head(x).log_softmax(-1).transpose(0, 1), labels >= 0
        lengths = torch.full((len(x),), x.shape[1])
        each = F.ctc_loss(scores, labels.masked_select(mask), lengths, mask.sum(-1), reduction=self.reduction, zero_infinity=True)
        return {"loss": each.square().sum()}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_one_after_the_other(reduction: str) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, -100, 3], [2, 2, 4], [-100, -100, -100], [-100, 5, 5]])
    batch = {"x": torch.randn(4, 4, 4, dtype=torch.double), "labels": labels}  # too short for the repeated label of sample 1
    assert_same(perturbed(Spelling(reduction)), (), batch)
    if reduction == "mean":
        report = mp.verify(Spelling(reduction), "dp=2,tp=2", batch)
        assert report.ok and not report.notes, report


def test_targets_in_rows() -> None:
    class Padded(Scoring):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.head(x).log_softmax(-1).transpose(0, 1)
            return {"loss": F.ctc_loss(scores, labels, (4, 3), (2, 1)) + F.ctc_loss(scores, labels, *torch.tensor([[4, 3], [1, 1]]))}

    batch = {"x": torch.randn(2, 4, 4, dtype=torch.double), "labels": torch.tensor([[1, 2], [3, 0]])}
    assert_same(perturbed(Padded(CHOSEN[0])), (), batch)


def test_lengths_of_other_targets_are_as_many_as_in_the_example() -> None:
    class Other(Scoring):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.head(x).log_softmax(-1).transpose(0, 1)
            return {"loss": F.ctc_loss(scores, labels.masked_select(labels >= 0), torch.tensor([4, 4]), (labels > 0).sum(-1))}

    batch = {"x": torch.randn(2, 4, 4, dtype=torch.double), "labels": torch.tensor([[1, 2], [3, 4]])}
    assert_same(perturbed(Other(CHOSEN[0])), (), batch)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[x[:, 0] > 0], "returns rows chosen by a mask"),
        (
            lambda x: x[x[:, 0] > 0].cumsum(0).sum(),
            "aten.cumsum.default in the model .test_selections.py:[0-9]+. mixes rows chosen by a mask",
        ),
        (lambda x: x[x[:, 0] > 0].std(), "aten.std.correction in the model .* mixes rows"),
        (lambda x: (x[x[:, 0] > 0].t() @ x[x[:, 0] > 0]).sum(), "mixes rows"),
        (lambda x: x[x[:, 0] > 0].softmax(0).sum(), "mixes rows"),
        (lambda x: (x[x[:, 0] > 0] * x.detach()[: x[x[:, 0] > 0].shape[0]]).sum(), "aten.slice.Tensor in the model .* mixes rows"),
        (lambda x: x.sum() ** x[x[:, 0] > 0].shape[0], r"aten.pow.* in the model .* the number of rows that a mask chooses.*\n.*mask.sum"),
        (lambda x: x[x[:, 0] > 0].norm(dim=0).sum(), "mixes rows"),
        (lambda x: x[x[:, 0] > 0].flip(0).square().sum(), "mixes rows"),
        (lambda x: x[x[:, 0] > 0].sort(0).values.sum(), "mixes rows"),
        (lambda x: torch.cat([x[x[:, 0] > 0], x[x[:, 0] > 0]]).sum(), "mixes rows"),
        (lambda x: x[x[:, 0] > 0].t().reshape(-1, len(x.T)).square().sum(), "mixes rows"),
    ],
)
def test_what_mixes_rows_is_refused(function: Callable[..., Any], reason: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with pytest.raises(CaptureError, match=reason):
        capture(Model(), (torch.randn(4, 3),))
