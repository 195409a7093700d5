"""What is computed again in backward: the same bits as operators one by one, fewer of their operands kept, a second derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshpar.ops import again

NORM: tuple[again.CheapStep, ...] = (
    ("aten._to_copy.default", ("%0",), (("dtype", torch.float32),)),
    ("aten.pow.Tensor_Scalar", ("%2", 2), ()),
    ("aten.mean.dim", ("%3", (-1,), True), ()),
    ("aten.add.Tensor", ("%4", 1e-6), ()),
    ("aten.rsqrt.default", ("%5",), ()),
    ("aten.mul.Tensor", ("%2", "%6"), ()),
    ("aten._to_copy.default", ("%7",), (("dtype", torch.bfloat16),)),
    ("aten.mul.Tensor", ("%1", "%8"), ()),
)
GATE: tuple[again.CheapStep, ...] = (("aten.silu.default", ("%0",), ()), ("aten.mul.Tensor", ("%2", "%1"), ()))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gate(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.silu(a) * b


def run(fn: Callable[..., Tensor], *tensors: Tensor) -> tuple[list[Tensor], int]:
    """Result and gradients, and the bytes that autograd keeps beside the operands."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    seen = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = fn(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    kept = sum(size for at, size in seen.items() if at not in {x.untyped_storage()._cdata for x in leaves})
    return [out.detach(), *(x.grad for x in leaves)], kept


@pytest.mark.parametrize(("steps", "fn"), [(NORM, norm), (GATE, gate)])
def test_the_same_bits(steps: tuple[again.CheapStep, ...], fn: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    given = (
        torch.randn(6, 8).bfloat16(),
        torch.randn(8 if fn is norm else (6, 8)).bfloat16() if fn is norm else torch.randn(6, 8).bfloat16(),
    )
    (found, kept), (expected, before) = run(lambda *xs: again.computed(steps, *xs), *given), run(fn, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kept == 0 < before


def test_second_derivative() -> None:
    a, b = torch.randn(2, 5, dtype=torch.float64)
    for at in (a, b):
        at.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *xs: again.computed(GATE, *xs), (a, b))


def test_without_gradients() -> None:
    a, b = torch.randn(2, 5)
    assert torch.equal(again.computed(GATE, a, b), gate(a, b))


def test_an_operand_that_is_a_condition_alone_has_no_gradient() -> None:
    steps: tuple[again.CheapStep, ...] = (
        ("aten.gt.Scalar", ("%0", 0), ()),
        ("aten.sigmoid.default", ("%1",), ()),
        ("aten.where.self", ("%3", "%4", "%2"), ()),
    )
    leaves = [torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    again.computed(steps, *leaves).square().sum().backward()
    found = [x.grad for x in leaves]
    copies = [x.detach().clone().requires_grad_() for x in leaves]
    torch.where(copies[0] > 0, copies[1].sigmoid(), copies[2]).square().sum().backward()
    assert found[0] is None and copies[0].grad is None
    assert all(torch.equal(a, b.grad) for a, b in zip(found[1:], copies[1:], strict=True))
