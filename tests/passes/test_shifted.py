"""Losses that leave out positions at the ends take all positions, and ignore the labels there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.graph.facts import info_of
from meshpar.passes.shifted import IgnoreEnds

B, S, V = 3, 8, 11
aten = torch.ops.aten


class Loss(nn.Module):
    """Ways in which models write it; what is not one of them is left alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(5, V, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        kind, logits, after = self.kind, self.head(x), labels[:, 1:]
        if kind == "view":
            return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V), after.contiguous().view(-1))
        if kind == "capped":
            return F.cross_entropy(torch.tanh(logits[:, :-1].float() / 3).reshape(-1, V).double(), after.reshape(-1), label_smoothing=0.1)
        if kind == "transposed":
            return F.cross_entropy(logits[:, :-1].transpose(1, 2), after)
        if kind == "two ahead":
            return F.cross_entropy(logits[:, :-2].reshape(-1, V), labels[:, 2:].reshape(-1), ignore_index=3)
        if kind == "both ends":
            return F.cross_entropy(logits[:, 2:-1].reshape(-1, V), labels[:, 3:].flatten())
        if kind == "hidden":
            return F.cross_entropy(self.head(x[:, :-1]).reshape(-1, V), after.reshape(-1), reduction="sum")
        if kind == "likelihood":
            return F.nll_loss(logits[:, :-1].log_softmax(-1).reshape(-1, V), after.reshape(-1))
        if kind == "positions as classes":
            return F.cross_entropy(self.head(x)[:, :-1, : S - 1], labels[:, : S - 1] % (S - 1))
        if kind == "each":
            return (F.cross_entropy(logits[:, :-1].reshape(-1, V), after.reshape(-1), reduction="none") ** 2).sum()
        assert kind == "every other"
        return F.cross_entropy(logits[:, :-1:2].reshape(-1, V), after[:, ::2].reshape(-1))


TAKEN = ["view", "capped", "transposed", "two ahead", "both ends", "hidden", "likelihood"]
LEFT = ["each", "positions as classes", "every other"]


@pytest.mark.parametrize("kind", TAKEN + LEFT)
def test_the_loss_stays_what_it_was(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Loss(kind), torch.randn(B, S, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (B, S)).masked_fill(torch.rand(B, S) < 0.3, 3 if kind == "two ahead" else -100)
    trained = (x, *model.parameters())
    right = model(x, labels)
    graph = IgnoreEnds()(capture(model, (x, labels)).graph)
    graph.lint()
    found = fx.GraphModule(model, graph)(x, labels)[0]
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    grads, wanted = (torch.autograd.grad(loss, trained) for loss in (found, right))
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-12)
    cut = [n for n in graph.nodes if n.target is aten.slice.Tensor and info_of(n).requires_grad and info_of(n).shape[1] < S]
    assert bool(cut) == (kind in LEFT)
