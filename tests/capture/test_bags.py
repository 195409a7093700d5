"""Bags of embeddings: the same numbers as torch's operator, and tables that are cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.bags import embedding_bag
from meshpar.errors import BatchError

IDS = torch.tensor([[1, 3, 3, 2], [3, 3, 3, 3], [8, 8, 7, 0]])
ROW, OFFSETS = torch.tensor([1, 3, 2, 3, 3, 8, 8, 0]), torch.tensor([0, 3, 3, 5])


@pytest.mark.parametrize("padding", [None, 3, -2])
@pytest.mark.parametrize(("mode", "weighed"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
@pytest.mark.parametrize("form", ["rows", "offsets", "last offset"])
def test_a_bag_is_what_torch_says_it_is(form: str, mode: str, weighed: bool, padding: int | None) -> None:
    """Empty bags and bags of padding alone among them."""
    ids = IDS if form == "rows" else ROW
    offsets = {"rows": None, "offsets": OFFSETS, "last offset": torch.cat([OFFSETS, torch.tensor([8])])}[form]
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if weighed else None
    found = []
    for function in (F.embedding_bag, embedding_bag):
        table = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        named = {"mode": mode, "per_sample_weights": weights, "include_last_offset": form == "last offset", "padding_idx": padding}
        out = function(ids, table, offsets, **named)
        (out * torch.arange(1.0, 1 + out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
        found.append((out.detach(), table.grad))
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-14, atol=1e-14)


class Bags(nn.Module):
    def __init__(self, mode: str, rows: int = 24, width: int = 6) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(rows, width, mode=mode, padding_idx=0, sparse=mode == "sum")
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(self.bag(ids, offsets))


def _loss(output: Tensor, batch: object) -> Tensor:
    return (output * torch.cos(torch.arange(5.0))).sum(1).square().mean()


IDS_OF_BAGS = torch.tensor([[1, 3, 0, 2], [0, 0, 0, 0], [8, 8, 7, 0], [23, 9, 1, 1]])


@pytest.mark.sweep(4)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("rule", ["tp:0", "tp:1", None])
def test_tables_are_cut_by_vocabulary_or_width(mode: str, rule: str | None) -> None:
    rules = {"bag.weight": rule} if rule else None
    mp.verify(Bags(mode), "dp=2,tp=2", (IDS_OF_BAGS,), loss_fn=_loss, rules=rules, steps=1).raise_if_failed()


def test_bags_by_offsets() -> None:
    mp.verify(Bags("mean"), "tp=2", (ROW, OFFSETS), loss_fn=_loss, rules={"bag.weight": "tp:0"}, steps=1).raise_if_failed()


def test_offsets_that_fall_are_told() -> None:
    """As they do where every data rank counts its own ids from 0."""
    with pytest.raises(BatchError, match="ranks that count from 0 each pass ids .samples, n. without offsets"):
        embedding_bag(ROW, torch.randn(10, 4), torch.tensor([0, 4, 0, 4]))
