"""The loss over microbatches: means over valid labels of the whole step, other terms averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.compile.denominators import split_denominators
from meshpar.graph.run import run
from meshpar.passes.inputs import extra_inputs
from tests.sharding.models import captured_of

PARTS = 3


class Net(nn.Module):
    """`terms`: cross entropy, a weight penalty, a term that is not additive over microbatches."""

    def __init__(self, *terms: str) -> None:
        super().__init__()
        self.terms, self.first = terms, nn.Linear(4, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.first(x)
        found: dict[str, Any] = {
            "ce": lambda: F.cross_entropy(y.flatten(0, 1), labels.flatten()),
            "scaled": lambda: 0.5 * F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum(),
            "penalty": lambda: 0.1 * self.first.weight.pow(2).sum(),
            "soft": lambda: F.cross_entropy(y.flatten(0, 1), x.flatten(0, 1)[:, :1].sigmoid().expand(-1, 5)) / (labels != -100).sum(),
            "balance": lambda: y.mean((0, 1)).pow(2).sum(),
        }
        return sum((found[t]() for t in self.terms[1:]), found[self.terms[0]]())


def _batches() -> list[dict[str, Tensor]]:
    """Uneven numbers of valid labels: 7, 3 and 1."""
    parts = []
    for valid in (7, 3, 1):
        labels = torch.randint(0, 5, (2, 4))
        labels.view(-1)[valid:] = -100
        parts.append({"x": torch.randn(2, 4, 4, dtype=torch.float64), "labels": labels})
    return parts


def _step(model: Net, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Loss and gradient as the runtime makes them: count first, then sum the microbatches."""
    split = split_denominators(captured_of(model, parts[0]), PARTS)
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    counted = {}
    if split.counts is not None:
        sums = [sum(one) for one in zip(*(run(split.counts, state, part) for part in parts), strict=True)]
        counted = dict(zip(extra_inputs(split.captured.graph).denominators, sums, strict=True))
    loss = sum(run(split.captured, state, part | counted)[split.captured.loss or 0] for part in parts)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss, state["first.weight"])[0], split.averaged


def _reference(model: Net, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    loss = model(**{k: torch.cat([p[k] for p in parts]) for k in parts[0]})
    return loss.detach(), torch.autograd.grad(loss, model.first.weight)[0]


@pytest.mark.parametrize("terms", [("ce",), ("ce", "penalty"), ("scaled",), ("ce", "scaled", "penalty")], ids=" + ".join)
def test_uneven_labels_give_the_mean_of_the_whole_step(terms: tuple[str, ...]) -> None:
    model, parts = Net(*terms).double(), _batches()
    loss, grad, _ = _step(model, parts)
    want, want_grad = _reference(model, parts)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, want_grad)


def test_the_mean_of_microbatch_means_would_differ() -> None:
    """What the pass is for: the test above could not pass without it."""
    model, parts = Net("ce").double(), _batches()
    naive = sum(model(**p).detach() for p in parts) / PARTS
    assert (naive - _reference(model, parts)[0]).abs() > 1e-2


def test_other_terms_are_averaged_and_named() -> None:
    model, parts = Net("ce", "balance").double(), _batches()
    loss, grad, averaged = _step(model, parts)
    ce, ce_grad = _reference(_with(model, "ce"), parts)
    balance = [_reference(_with(model, "balance"), [p]) for p in parts]
    torch.testing.assert_close(loss, ce + sum(b[0] for b in balance) / PARTS)
    torch.testing.assert_close(grad, ce_grad + sum(b[1] for b in balance) / PARTS)
    assert len(averaged) == 1


def test_a_mean_over_samples_is_no_sum_whatever_it_is_divided_by() -> None:
    """Cross entropy with probabilities stays a mean: over the count of the step it would be a third of what it is."""
    model, parts = Net("soft").double(), _batches()
    loss, grad, averaged = _step(model, parts)
    each = [_reference(model, [p]) for p in parts]
    torch.testing.assert_close(loss, sum(e[0] for e in each) / PARTS)
    torch.testing.assert_close(grad, sum(e[1] for e in each) / PARTS)
    assert len(averaged) == 1


def _with(model: Net, *terms: str) -> Net:
    other = Net(*terms).double()
    other.load_state_dict(model.state_dict())
    return other


def test_the_given_graph_is_left_alone() -> None:
    captured = captured_of(Net("ce").double(), _batches()[0])
    before = str(captured.graph)
    split = split_denominators(captured, PARTS)
    assert str(captured.graph) == before
    assert split.captured.inputs == (*captured.inputs, "denominator_0")
    assert [n.name for n in split.captured.graph.nodes if n.op == "placeholder"] == list(split.captured.inputs)
