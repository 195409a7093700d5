"""The expert operators on one device against the plain formulas, on more rows than they take at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshpar.ops import experts


def problem(dtype: torch.dtype, tokens: int = 300, width: int = 1024, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Wide enough for two blocks of tokens, and four of rows."""
    assert len(list(experts._blocks(torch.empty(tokens, width)))) == 2
    index = torch.rand(tokens, 5).topk(k).indices
    return torch.randn(tokens, width, dtype=dtype, requires_grad=True), index, torch.rand(tokens, k, dtype=dtype, requires_grad=True)


def test_dispatch_and_its_gradient() -> None:
    hidden, index, _ = problem(torch.float64)
    x, offsets, perm = experts.dispatch(hidden, index, 5)
    order = index.flatten().argsort(stable=True)
    assert torch.equal(perm, order) and torch.equal(x, hidden[order // 3])
    assert offsets.tolist() == index.flatten().bincount(minlength=5).cumsum(0).tolist()
    grad = torch.randn_like(x)
    (found,) = torch.autograd.grad(x, hidden, grad)
    torch.testing.assert_close(found, torch.zeros_like(hidden).index_add_(0, order // 3, grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_and_its_gradients(dtype: torch.dtype) -> None:
    hidden, index, weights = problem(dtype)
    _, _, perm = experts.dispatch(hidden, index, 5)
    y = torch.randn(perm.shape[0], hidden.shape[1], dtype=dtype, requires_grad=True)
    out = experts.combine(y, perm, weights)
    wide = torch.promote_types(dtype, torch.float32)
    terms = torch.zeros(y.shape, dtype=wide).index_copy(0, perm, y.to(wide)).view(300, 3, -1) * weights.to(wide).unsqueeze(-1)
    expected = ((terms[:, 0] + terms[:, 1]) + terms[:, 2]).to(dtype)
    assert out.dtype == dtype and any(torch.equal(out, one) for one in (expected, fused(y, perm, weights)))  # choice by choice
    grad = torch.randn_like(out)
    for found, by_torch in zip(torch.autograd.grad(out, (y, weights), grad), torch.autograd.grad(expected, (y, weights), grad)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, by_torch)


def fused(y: torch.Tensor, perm: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In float32, each product and sum rounded once: float64 holds such a product exactly."""
    terms = torch.zeros(y.shape, dtype=torch.float64).index_copy(0, perm, y.double()).view(*weights.shape, -1) * weights.double().unsqueeze(
        -1
    )
    total = terms[:, 0].float()
    for at in range(1, weights.shape[1]):
        total = (total.double() + terms[:, at]).float()
    return total


def test_a_row_is_summed_alike_wherever_it_lies() -> None:
    """Alone, or among others, or at another address: the same bits, for all widths."""
    for width in (1, 3, 8, 13, 64, 67):
        y, weights = torch.randn(24, width), torch.rand(8, 3)
        perm = torch.randperm(24)
        whole, place = experts.combine(y, perm, weights), torch.empty_like(perm).index_copy_(0, perm, torch.arange(24)).view(8, 3)
        for low, high in ((0, 1), (3, 5), (2, 8)):
            rows = y[place[low:high].flatten()]
            moved = torch.empty(rows.numel() + 1)[1:].view_as(rows).copy_(rows)
            assert torch.equal(experts.combine(moved, torch.arange(len(rows)), weights[low:high]), whole[low:high])


@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (4, 0)])
def test_nothing_to_combine(tokens: int, k: int) -> None:
    hidden, index, weights = torch.randn(tokens, 3, requires_grad=True), torch.zeros(tokens, k, dtype=torch.int64), torch.rand(tokens, k)
    if k:
        x, offsets, perm = experts.dispatch(hidden, index, 4)
        assert x.shape == (0, 3) and offsets.tolist() == [0] * 4
    else:
        x, perm = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    out = experts.combine(x, perm, weights)
    assert torch.equal(out, torch.zeros(tokens, 3))
