"""What a model draws at random is the same in both programs, on every mesh and for any number of microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.config import ParallelConfig
from meshpar.proof.noise import Drawn
from meshpar.proof.verify import verify


def drop_path(x: Tensor) -> Tensor:
    keep = 0.7
    return x / keep * (keep + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device)).floor_()


def stochastic_depth(x: Tensor) -> Tensor:
    noise = torch.empty([x.shape[0], 1], dtype=x.dtype, device=x.device).bernoulli_(0.6)
    return x * noise.div_(0.6)


def skipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(()) < 0.3, x, x.tanh())


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "drop path": drop_path,
    "stochastic depth": stochastic_depth,
    "a layer that is skipped": skipped,
    "noise": lambda x: x + torch.randn_like(x) + 0.1 * torch.randn(x.shape) + torch.normal(0.0, 1.0, x.shape),
    "gumbel": lambda x: F.gumbel_softmax(x, tau=0.7),
    "hard gumbel": lambda x: F.gumbel_softmax(x, hard=True) * x,
    "in place": lambda x: x + torch.empty_like(x).uniform_(-1, 1) * torch.empty_like(x).normal_(1, 2) + torch.zeros_like(x).exponential_(),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)) + x * torch.rand_like(x).bernoulli(),
    "integers": lambda x: x * torch.randint(1, 5, x.shape) + torch.randint_like(x, 3) + torch.randint(4, (8,)),
    "a functional dropout": lambda x: F.dropout(x, 0.5, training=True) + F.dropout(x, p=0.3) + torch.dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0],
}


class Net(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.draw = nn.Linear(8, 8), nn.Linear(8, 8), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.draw(self.up(x))).square().mean()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("draw", DRAWS)
def test_both_programs_draw_the_same(draw: str) -> None:
    report = verify(Net(DRAWS[draw]), "dp=2,tp=2", (torch.randn(8, 8),), config=ParallelConfig(microbatches=2)).raise_if_failed()
    switched_off = draw in ("a functional dropout", "rrelu", "attention")
    assert report.notes == () if switched_off else "test_noise.py" in report.notes[0], report


def test_modules_that_draw() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
            self.relu = nn.RReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return self.relu(self.attention(x, x, x, need_weights=False)[0]).square().mean()

    report = verify(Attending(), "dp=2,tp=2", (torch.randn(4, 3, 8),)).raise_if_failed()
    assert report.notes == ()


def test_numbers_are_spread_and_repeat() -> None:
    with Drawn() as drawn:
        a, b, c = torch.rand(50, 40), torch.rand(50, 40), torch.randn(50, 40)
        assert torch.equal(torch.randperm(4).sort().values, torch.arange(4))
        chosen = torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), 2)
    assert torch.equal(a, b) and a.min() > 0 and a.max() < 1
    assert abs(a.mean() - 0.5) < 0.02 and abs(a.std() - 12**-0.5) < 0.02
    assert abs(c.mean()) < 0.05 and abs(c.std() - 1) < 0.05
    assert len(a.unique()) > 1900 and chosen.tolist() == [2, 1]
    assert all("test_noise.py" in line for line in drawn.lines)


@pytest.mark.parametrize("rows", [2, 6])
def test_microbatches_draw_what_the_whole_batch_draws(rows: int) -> None:
    def draw(shape: tuple[int, ...]) -> Any:
        with Drawn(period=2):
            return torch.rand(shape)

    whole = draw((12, 3))
    for start in range(0, 12, rows):
        assert torch.equal(whole[start : start + rows], draw((rows, 3)))
