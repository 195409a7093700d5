"""Costs of nodes, against counts by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.graph.cost import flops, nbytes
from tests.capture.models import GPT


def costs(function: nn.Module, *inputs: Tensor) -> dict[str, tuple[float, float]]:
    graph = capture(function, inputs).graph
    return {str(node.target).split(".")[1]: (flops(node), nbytes(node)) for node in graph.nodes if node.op == "call_function"}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.up = nn.Linear(8, 6), nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(4, 2, 3)

    def forward(self, x: Tensor, image: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        attended = F.scaled_dot_product_attention(query, query[:, :, :5], query[:, :, :5])
        return self.linear(x), self.conv(image), self.up(image[:, :, 0]), attended, torch.baddbmm(x, x, x.mT @ x), x.relu()


def test_counts_by_hand() -> None:
    found = costs(Model(), torch.randn(2, 8, 8), torch.randn(2, 4, 6, 6), torch.randn(2, 3, 7, 4))
    assert found["linear"] == (2 * 2 * 8 * 8 * 6, 4 * (128 + 48 + 6 + 96))
    assert found["conv2d"][0] == 2 * (2 * 8 * 4 * 4) * (2 * 9)
    assert found["conv_transpose1d"][0] == 2 * (2 * 4 * 6) * (2 * 3)
    assert found["scaled_dot_product_attention"][0] == 2 * (2 * 3 * 7) * 5 * 8
    assert found["matmul"][0] == found["baddbmm"][0] == 2 * 2 * 8**3
    assert found["relu"] == (0, 2 * 4 * 128)
    assert found["transpose"] == found["slice"] == (0, 0)


class Products(nn.Module):
    def forward(self, x: Tensor, v: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        return torch.einsum("bij,bkj->bik", x, x), torch.mv(x[0], v), torch.dot(v, v), x[:, v.argsort()], x.unfold(1, 2, 2)


def test_every_product_counts_and_every_view_is_free() -> None:
    """The solver knew einsum as a product, this file did not; unfold was a view here and nowhere else; a look-up read its whole table."""
    found = costs(Products(), torch.randn(2, 8, 4), torch.randn(4), torch.randn(2, 4, 6, 6))
    assert found["einsum"][0] == 2 * 2 * 8 * 8 * 4 and found["mv"][0] == 2 * 8 * 4 and found["dot"][0] == 2 * 4
    assert found["unfold"] == (0, 0)
    assert found["index"] == (0, 2 * 4 * 2 * 4 * 4)


def test_a_transformer_is_six_n_d() -> None:
    """Kaplan et al. 2020: forward is 2 N per token plus attention's 4 * length * width per layer."""
    model = GPT(width=16, layers=3, vocab=37)
    ids = torch.randint(0, 37, (2, 12))
    total = sum(flops(node) for node in capture(model, (ids, ids)).graph.nodes)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "positions")
    assert total == 24 * (2 * matrices + 3 * 4 * 12 * 16)
