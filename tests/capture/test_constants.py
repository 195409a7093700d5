"""What a forward computes from numbers alone may be asked for its value during capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from tests.capture.models import assert_same, perturbed


class Asking(nn.Module):
    """Takes another way for a causal mask, found out by looking at the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        mask = (steps[:, None] >= steps).logical_not()
        if (mask == torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)).all() and steps[-1].item() == x.shape[1] - 1:
            x = self.layer(x)
        scores = (x @ x.transpose(1, 2)).masked_fill(mask, float("-inf"))
        return (scores.softmax(-1) @ x).pow(2).mean()


def test_a_mask_that_is_looked_at() -> None:
    captured = assert_same(perturbed(Asking()), (torch.randn(2, 5, 8, dtype=torch.double),), {}, loss=lambda output: output)
    assert any(node.target is torch.ops.aten.linear.default for node in captured.graph.nodes)


def test_torch_transformer_with_a_causal_mask() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).to(self.embed.weight.dtype)
            return F.mse_loss(self.body(self.embed(source), self.embed(target), tgt_mask=mask), self.embed(target))

    batch = {"source": torch.randint(0, 11, (2, 5)), "target": torch.randint(0, 11, (2, 4))}
    assert_same(perturbed(Translator()), (), batch, loss=lambda output: output)


@pytest.mark.parametrize(
    "make", [lambda x: torch.rand(3), lambda x: torch.zeros(3).uniform_(), lambda x: x, lambda x: torch.zeros(3).add_(x)]
)
def test_values_that_are_not_known_are_refused(make: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if make(x).sum() > 0 else x

    with pytest.raises(CaptureError, match="turns the values of a tensor"):
        capture(Model(), (torch.randn(3),))


def test_what_was_written_to_is_forgotten() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(3)
            mask[0:1].add_(x[:1])
            return x * 2 if mask.sum() > 0 else x

    with pytest.raises(CaptureError, match="turns the values of a tensor"):
        capture(Model(), (torch.randn(3),))
