"""Tensors of one value: after capture they are made of sizes alone, the same as after their example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.run import run


class _Made(nn.Module):
    """Every such operator, and dtypes and devices that are said and that are not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = x.half()
        every = (
            torch.zeros_like(half), torch.ones_like(x, dtype=torch.int64), torch.full_like(x, -1e30), torch.full_like(half[:, 0], 3),
            x.new_zeros(2, 3), x.new_ones(x.shape[0]), half.new_full((5,), 2.5), torch.zeros_like(x[0, 0]),
            torch.empty_like(x).fill_(7), x.new_empty(4, 2).zero_(),
        )  # fmt: skip
        return tuple(one + 0 * x.sum().to(one.dtype) for one in every)


def test_the_example_is_forgotten() -> None:
    x = torch.rand(3, 4, dtype=torch.double)
    captured = capture(_Made(), (x,))
    left = [n for n in captured.graph.nodes if any(word in str(n.target) for word in ("_like", "new_"))]
    assert not left
    for got, wanted in zip(run(captured, {}, {"x": x}), _Made()(x), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
