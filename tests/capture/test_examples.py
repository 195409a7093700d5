"""Tensors of one value: after capture they are made of sizes alone, the same as after their example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.compile.denominators import split_denominators
from meshpar.graph.run import run


class _Made(nn.Module):
    """Every such operator, and dtypes and devices that are said and that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.double))

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        x = given * self.scale
        half = x.half()
        every = (
            torch.zeros_like(half), torch.ones_like(x, dtype=torch.int64), torch.full_like(x, -1e30), torch.full_like(half[:, 0], 3),
            x.new_zeros(2, 3), x.new_ones(x.shape[0]), half.new_full((5,), 2.5), torch.zeros_like(x[0, 0]),
            torch.empty_like(x).fill_(7), x.new_empty(4, 2).zero_(),
        )  # fmt: skip
        return tuple(one + 0 * x.sum().to(one.dtype) for one in every)


def test_the_example_is_forgotten() -> None:
    x = torch.rand(3, 4, dtype=torch.double)
    model = _Made()
    captured = capture(model, (x,))
    left = [n for n in captured.graph.nodes if any(word in str(n.target) for word in ("_like", "new_"))]
    assert not left
    for got, wanted in zip(run(captured, {"scale": model.scale}, {"given": x}), model(x), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


class _Mean(nn.Module):
    """Ones after the labels count them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.up(x) - y).square().sum() / torch.ones_like(y).sum()


def test_ones_after_the_batch_still_count_it() -> None:
    captured = capture(_Mean(), (torch.rand(4, 4), torch.rand(4, 4)))
    split = split_denominators(captured, 2)
    assert split.counts is not None and not split.averaged
