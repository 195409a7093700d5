"""The expert operators against their meaning written as a loop, and the seam at capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshpar.capture.export import capture
from meshpar.ops.experts import combine, dispatch, grouped_mm, row_expert
from tests.capture.models import causal_lm, perturbed

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


@pytest.mark.parametrize(("kind", "layers"), [("mixtral", 2), ("deepseek_v3", 1), ("gpt_oss", 2)])
def test_seam(kind: str, layers: int) -> None:
    model, batch = causal_lm(kind)
    model = perturbed(model)
    captured = capture(model, (), batch)
    names = [str(node.target) for node in captured.graph.nodes]
    assert names.count("meshpar.dispatch.default") == names.count("meshpar.combine.default") == layers
    assert names.count("meshpar.grouped_mm.default") == 2 * layers
    assert model.config._experts_implementation == "eager"  # type: ignore[union-attr]

    import transformers.integrations.moe as moe

    assert "meshpar" not in moe.ALL_EXPERTS_FUNCTIONS
