"""Experts modules of unknown form with stacked parameters: their forward is lifted where that is proven right, and left alone elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.capture.export import capture
from meshpar.errors import CaptureError
from tests.capture.models import assert_same, perturbed

T, K, E, H, I = 6, 2, 5, 8, 6


class Looped(nn.Module):
    """Unknown names, a fused and transposed matrix, biases, a per-expert norm, and a loop over the experts that were hit."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(E, H, 2 * I))
        self.beta = nn.Parameter(torch.randn(E, H, I))
        self.gamma, self.delta = nn.Parameter(torch.randn(E, 2 * I)), nn.Parameter(torch.randn(E, H))
        self.norm, self.lead = nn.Parameter(torch.randn(E, I)), nn.Parameter(torch.randn(H))

    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        with torch.no_grad():
            mask = F.one_hot(chosen, num_classes=E).permute(2, 1, 0)
            hit = mask.sum(dim=(-1, -2)).nonzero()
        for i in hit:
            e = i[0]
            slot, row = torch.where(mask[e])
            a, b = (tokens[row] @ self.alpha[e] + self.gamma[e]).chunk(2, -1)
            y = F.layer_norm(F.silu(a) * b, (I,), self.norm[e])
            y = F.linear(y, self.beta[e], self.delta[e]) * self.lead
            out.index_add_(0, row, y * gates[row, slot, None])
        return out


class Skipping(Looped):
    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for e, (w, v) in enumerate(zip(self.alpha, self.beta)):
            row, slot = torch.where(chosen == e)
            if row.numel() == 0:
                continue
            out[row] += (gates[row, slot].unsqueeze(-1) * (tokens[row] @ w)[:, :I]) @ v.t()
        return out


class Masked(Looped):
    """Every token through every expert, masked."""

    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for e in range(E):
            weight = (gates * (chosen == e)).sum(-1, keepdim=True)
            out = out + weight * F.linear(F.gelu(tokens @ self.alpha[e])[:, ::2], self.beta[e])
        return out


class Renormalised(Looped):
    """Not a sum weighted by the gates given: with one expert per token it looks like one."""

    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        return super().forward(tokens, gates=gates / gates.sum(-1, keepdim=True), chosen=chosen)


class Limited(Looped):
    """At most three tokens per expert."""

    def forward(self, tokens: Tensor, *, gates: Tensor, chosen: Tensor) -> Tensor:
        hot = F.one_hot(chosen, num_classes=E).view(-1, E)
        kept = ((hot.cumsum(0) * hot).sum(-1) <= 3).view(chosen.shape)
        return super().forward(tokens, gates=gates * kept, chosen=chosen)


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.inside = nn.Linear(H, E), experts

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        gates, chosen = F.softmax(self.gate(x), -1).topk(K, -1)
        return {"loss": self.inside(x, gates=gates, chosen=chosen).square().mean()}


def names(kind: type[Looped]) -> list[str]:
    torch.manual_seed(0)
    x = torch.randn(T, H, dtype=torch.double)
    captured = assert_same(perturbed(Layer(kind())), (x,), {})
    return [str(node.target) for node in captured.graph.nodes]


@pytest.mark.parametrize("kind", [Looped, Skipping, Masked])
def test_lifted(kind: type[Looped]) -> None:
    found = names(kind)
    assert found.count("meshpar.dispatch.default") == found.count("meshpar.combine.default") == 1
    assert found.count("meshpar.grouped_mm.default") == 2
    assert not [name for name in found if name.startswith("aten.nonzero")]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Renormalised, "lifted from one expert, it gave other values than its forward"), (Limited, "it mixes rows of several experts")],
)
def test_a_form_that_only_looks_like_it_is_not_lifted(kind: type[Looped], reason: str) -> None:
    with pytest.raises(CaptureError, match=rf"(?s)inside: {reason}.*mp.register_experts"):
        capture(Layer(kind()), (torch.randn(T, H),))


def test_the_model_is_as_before() -> None:
    model = Layer(Looped())
    before = {name: value for name, value in model.inside.__dict__.items()}
    capture(model, (torch.randn(T, H),))
    assert model.inside.__dict__ == before
