"""Weight gradients that wait: the same bits as torch's, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshpar.ops import deferred, experts
from meshpar.ops.deferred import WeightGradients


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def linear_case() -> tuple[list[Tensor], Callable[[WeightGradients | None], Tensor], Callable[[], Tensor]]:
    x, w, b = made(2, 3, 5), made(7, 5), made(7)
    return [x, w, b], lambda later: deferred.linear(x, w, b, later), lambda: torch.nn.functional.linear(x, w, b)


def grouped_case(transposed: bool) -> tuple[list[Tensor], Callable[[WeightGradients | None], Tensor], Callable[[], Tensor]]:
    x, w, offsets = made(6, 5), made(*((4, 7, 5) if transposed else (4, 5, 7))), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    turned = w.transpose(1, 2) if transposed else w
    return (
        [x, w],
        lambda later: deferred.grouped_mm(x, w, offsets, transposed, later),
        lambda: experts.grouped_mm(x, turned, offsets),
    )


def matmul_case() -> tuple[list[Tensor], Callable[[WeightGradients | None], Tensor], Callable[[], Tensor]]:
    x, w, b = made(2, 3, 5), made(5, 7), made(7)
    return [x, w, b], lambda later: deferred.matmul(x, w, b, later), lambda: x @ w + b


CASES = {
    "linear": linear_case,
    "matmul": matmul_case,
    "grouped": lambda: grouped_case(False),
    "grouped, transposed": lambda: grouped_case(True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("state", ["open", "closed"])
def test_gradients_are_those_of_the_plain_product(name: str, recompute: bool, state: str) -> None:
    leaves, run, plain = CASES[name]()
    (plain() ** 3).sum().backward()
    wanted = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    later = WeightGradients()
    y = checkpoint(run, later, use_reentrant=False) if recompute else run(later)
    if state == "open":
        later.open()
    (y**3).sum().backward()
    later.close()
    if state == "open":
        assert leaves[1].grad is None
        assert len(later) == 1
        later.run()
        assert len(later) == 0
    for leaf, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-13, atol=1e-13)


def test_what_waits_is_added_to_what_is_there_and_hooks_run() -> None:
    leaves, run, _ = linear_case()
    ran = []
    leaves[1].register_post_accumulate_grad_hook(lambda leaf: None if leaf.grad is None else ran.append(leaf.grad.clone()))
    later = WeightGradients()
    for _ in range(2):
        later.open()
        run(later).sum().backward()
        later.close()
        before = len(ran)
        later.run()
        assert len(ran) == before + 1
    torch.testing.assert_close(ran[-1], 2 * ran[0])


def test_a_weight_that_needs_no_gradient_leaves_nothing_to_do() -> None:
    x, w = made(3, 5), made(7, 5).detach()
    later = WeightGradients()
    later.open()
    deferred.linear(x, w, None, later).sum().backward()
    assert len(later) == 0
    assert x.grad is not None
