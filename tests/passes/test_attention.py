"""Masks that say nothing but "causal" go; all others stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from meshpar.capture.export import capture
from meshpar.passes.attention import SimplifyAttention

aten = torch.ops.aten


class Attend(nn.Module):
    """Causal attention with grouped heads and an explicit mask, as a captured model writes it."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        mask = (at[None, :] <= at[:, None])[None, None].expand(q.shape[0], -1, -1, -1)
        if self.mask == "window":
            mask = mask & (at[None, :] > at[:, None] - 3)
        if self.mask == "padding":
            mask = mask & seen[:, None, None, :]
        groups = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def _run(mask: str) -> tuple[fx.Graph, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 2, 6, 8).double(), torch.randn(2, 2, 6, 8).double()
    inputs = (q, k, v, torch.rand(2, 6) < 0.9)
    model = Attend(mask)
    graph = SimplifyAttention()(capture(model, inputs).graph)
    graph.lint()
    return graph, fx.GraphModule(model, graph)(*inputs)[0], model(*inputs)


def _attention(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default)


def test_a_causal_mask_goes_and_heads_stay_grouped() -> None:
    graph, found, expected = _run("causal")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    call = _attention(graph)
    assert call.args[3:] == (None, 0.0, True)
    assert call.kwargs == {"scale": 0.3, "enable_gqa": True}
    assert [n.name for n in call.args[1:3]] == ["k", "v"]  # type: ignore[union-attr]
    assert [n for n in graph.nodes if n.op == "call_function"] == [call]


@pytest.mark.parametrize("mask", ["window", "padding"])
def test_other_masks_stay(mask: str) -> None:
    graph, found, expected = _run(mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(_attention(graph).args[3], fx.Node)
