"""The expert operators against their meaning written as a loop, and the seam at capture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.experts.seam import REGISTERED
from meshpar.capture.export import capture
from meshpar.errors import CaptureError, ConfigError
from meshpar.ops.experts import combine, dispatch, grouped_mm, row_expert
from tests.capture.experts.test_stacks import Looped
from tests.capture.models import assert_same, causal_lm, perturbed
from tests.capture.moe import Model, MoE, tokens

T, K, E, H, O = 7, 2, 5, 4, 6


def routed(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    index[index == 3] = 4  # an expert without a token, and a token that chose one expert twice
    return torch.randn(T, H, dtype=dtype), index, torch.randn(E, H, O, dtype=dtype), torch.rand(T, K, dtype=dtype)


def layer(h: Tensor, index: Tensor, w: Tensor, weights: Tensor) -> Tensor:
    x, offsets, perm = dispatch(h, index, E)
    return combine(grouped_mm(x, w, offsets), perm, weights)


def test_against_a_loop() -> None:
    h, index, w, weights = routed()
    expected = torch.stack([sum(weights[t, k] * (h[t] @ w[index[t, k]]) for k in range(K)) for t in range(T)])  # type: ignore[misc]
    torch.testing.assert_close(layer(h, index, w, weights), expected, rtol=1e-14, atol=1e-14)


def test_layout() -> None:
    h, index, _, _ = routed()
    x, offsets, perm = dispatch(h, index, E)
    assert offsets.tolist() == [int((index <= e).sum()) for e in range(E)] and offsets.dtype == torch.int32
    assert torch.equal(row_expert(x, offsets), index.flatten()[perm])
    assert torch.equal(x, h[perm // K])
    assert all(a < b for a, b, e, f in zip(perm, perm[1:], row_expert(x, offsets), row_expert(x, offsets)[1:]) if e == f), "stable"


def test_gradients() -> None:
    h, index, w, weights = (t.requires_grad_(t.is_floating_point()) for t in routed())
    assert torch.autograd.gradcheck(lambda h, w, weights: layer(h, index, w, weights), (h, w, weights))
    (for_w,) = torch.autograd.grad(layer(h, index, w, weights).sum(), [w])
    assert for_w[3].eq(0).all(), "an expert without a token has a zero gradient, not none"


def test_rows_beyond_the_last_expert() -> None:
    x, offsets = torch.randn(5, H), torch.tensor([1, 3], dtype=torch.int32)
    assert grouped_mm(x, torch.randn(2, H, O), offsets)[3:].eq(0).all()
    assert row_expert(x, offsets).tolist() == [0, 1, 1, 1, 1]


def test_half_precision_is_summed_wide() -> None:
    y = torch.full((4, 1), 1.0, dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 2**-9, 2**-9, 2**-9]], dtype=torch.bfloat16)
    assert combine(y, torch.arange(4), weights).item() == torch.tensor(1 + 3 * 2**-9).bfloat16().item() != 1.0


@pytest.mark.parametrize("operator", [dispatch, grouped_mm, combine, row_expert])
def test_operators_are_what_torch_expects(operator: torch.library.CustomOpDef) -> None:
    h, index, w, weights = (t.requires_grad_(t.is_floating_point()) for t in routed())
    x, offsets, perm = (t.detach() for t in dispatch(h, index, E))
    x.requires_grad_()
    arguments = {dispatch: (h, index, E), grouped_mm: (x, w, offsets), combine: (x, perm, weights), row_expert: (x, offsets)}[operator]
    torch.library.opcheck(operator, arguments)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("kind", "layers", "way"),
    [
        ("mixtral", 2, "transformers"),
        ("qwen3_moe", 2, "transformers"),
        ("olmoe", 2, "transformers"),
        ("deepseek_v3", 1, "transformers"),
        ("gpt_oss", 2, "transformers"),
        ("granitemoe", 2, "transformers"),
        ("jetmoe", 2, "stack"),
        ("llama4_text", 0, None),
    ],
)
def test_transformers(kind: str, layers: int, way: str | None) -> None:
    import transformers

    model, batch = causal_lm(kind)
    if kind == "granitemoe" and transformers.__version__.startswith("5.0."):  # that release asks an integer for its device
        with pytest.raises(AttributeError, match="'int' object has no attribute 'to'"):
            model(**batch)
        return
    model = perturbed(model)
    captured = assert_same(model, (), batch, tolerance=1e-6 if kind in ("granitemoe", "jetmoe", "llama4_text") else 1e-10)
    names = [str(node.target) for node in captured.graph.nodes]
    assert set(captured.experts.values()) == ({way} if way else set()) and not captured.unrecognised
    assert names.count("meshpar.grouped_mm.default") == (8 if kind == "jetmoe" else 2 * layers)
    routed = 0 if way == "stack" else layers
    assert names.count("meshpar.dispatch.default") == names.count("meshpar.combine.default") == routed
    assert model.config._experts_implementation == "eager"  # type: ignore[union-attr]

    import transformers.integrations.moe as moe

    assert "meshpar" not in moe.ALL_EXPERTS_FUNCTIONS


class Odd(nn.Module):
    """Experts called in a way of their own: with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, H, O)), nn.Parameter(torch.randn(E, O, H))

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        out = torch.zeros_like(given["x"])
        for e in given["index"].unique():
            token, slot = torch.where(given["index"] == e)
            y = (given["x"][token] @ self.up[e]).relu() @ self.down[e]
            out[token] += y * given["weights"][token, slot, None]
        return out


class OddLayer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), experts

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weights, index = self.gate(x).sigmoid().topk(K, -1)
        return {"loss": self.experts({"x": x, "index": index, "weights": weights, "a": x, "b": x}).square().mean()}


def test_a_registered_function_runs_in_place_of_a_forward() -> None:
    model = perturbed(OddLayer(Odd()))
    x = torch.randn(T, H, dtype=torch.double)
    with pytest.raises(CaptureError, match=r"(?s)experts: .*Two forms are: .*mp.register_experts\(MyExperts, run\)"):
        capture(model, (x,))

    def run(module: Odd, given: dict[str, Tensor]) -> Tensor:
        rows, offsets, perm = dispatch(given["x"], given["index"], E)
        return combine(grouped_mm(grouped_mm(rows, module.up, offsets).relu(), module.down, offsets), perm, given["weights"])

    mp.register_experts(Odd, run)
    try:
        captured = assert_same(model, (x,), {})
    finally:
        del REGISTERED[Odd]
    assert captured.experts == {"experts": "registered"} and not captured.unrecognised
    with pytest.raises(ConfigError, match="wants the class of an experts module"):
        mp.register_experts(model, run)  # type: ignore[arg-type]


class Dense(nn.Module):
    """Every token through every expert: an ordinary graph."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.gate = way, nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 6)), nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, 8)
        weights, index = F.softmax(self.gate(x), -1).topk(2, -1)
        gates = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter(1, index, weights)
        return getattr(self, self.way)(x, gates, weights, index).view_as(hidden), gates.mean(0).square().sum()

    def einsum(self, x: Tensor, gates: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        y = F.silu(torch.einsum("th,ehi->eti", x, self.up))
        return torch.einsum("eti,eih,te->th", y, self.down, gates)

    def bmm(self, x: Tensor, gates: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        y = torch.bmm(F.gelu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down)
        return (y * gates.t().unsqueeze(-1)).sum(0)

    def gathered(self, x: Tensor, gates: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        y = F.silu(torch.einsum("th,tkhi->tki", x, self.up[index]))
        return torch.einsum("tki,tkih,tk->th", y, self.down[index], weights)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("way", ["einsum", "bmm", "gathered"])
def test_dense_experts_are_ordinary_graphs(way: str) -> None:
    model = Model(Dense(way))
    captured = assert_same(perturbed(model), (), tokens(2, 4))
    assert not captured.experts and not captured.unrecognised
    mp.verify(model, "tp=2", tokens(2, 4)).raise_if_failed()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
@pytest.mark.parametrize("kind", ["list", "stack"])
def test_lifted_experts_in_parallel(kind: str, mesh: str) -> None:
    torch.manual_seed(0)
    layer = MoE("mixtral") if kind == "list" else Stacked()
    mp.verify(Model(layer), mesh, tokens(2, 4)).raise_if_failed()


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inside = nn.Linear(8, 5), Looped()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, 8)
        gates, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        return self.inside(x, gates=gates, chosen=chosen).view_as(hidden), gates.mean()
