"""A loss in chunks of rows: the value and gradients of the loss at once, classes cut over ranks or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshpar._torch import TorchDispatchMode
from meshpar.ops import chunked_loss
from tests.pool import Pool

N, WIDTH, CLASSES = 13, 5, 11
OPTIONS: list[dict[str, Any]] = [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 3}]


def problem(dtype: torch.dtype = torch.float64, weighted: bool = True, bias: bool = True) -> list[Tensor | None]:
    """Rows, weight, bias, targets of which some are ignored, class weights."""
    torch.manual_seed(0)
    target = torch.randint(CLASSES, (N,))
    target[2:4] = -100
    x, weight, added, classes = torch.randn(N, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES), torch.rand(CLASSES)
    return [x.to(dtype), weight.to(dtype), added.to(dtype) if bias else None, target, classes.to(torch.float64) if weighted else None]


def at_once(given: list[Tensor | None], options: dict[str, Any]) -> list[Tensor]:
    x, weight, bias, target, classes = given
    assert target is not None
    ignore = options.get("ignore_index", -100)
    target = target.masked_fill(target == -100, ignore)
    return results(lambda *leaves: F.cross_entropy(F.linear(*leaves), target, classes, **{"reduction": "sum", **options}), x, weight, bias)


def results(loss: Any, *tensors: Tensor | None) -> list[Tensor]:
    """The loss, and the gradients of a nonlinear function of it."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    found = loss(*leaves)
    (found**2).sum().backward()
    return [found.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [1, 4, 13, 50])
def test_on_one_device(rows: int, options: dict[str, Any]) -> None:
    given = problem()
    target = given[3].masked_fill(given[3] == -100, options.get("ignore_index", -100))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_loss.cross_entropy(x, weight, bias, target, given[4], rows, torch.float64, ((CLASSES, 1),), **options)

    for a, b in zip(results(loss, *given[:3]), at_once(given, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def cut_over_ranks(options: dict[str, Any]) -> list[Tensor]:
    """This rank's loss and gradients, put together by rank where classes are cut."""
    rank, size = dist.get_rank(), dist.get_world_size()
    given = problem()
    target = given[3].masked_fill(given[3] == -100, options.get("ignore_index", -100))
    where = {"group": dist.group.WORLD.group_name, "size": size, "rank": rank}  # type: ignore[union-attr]
    own = [given[0], given[1].tensor_split(size)[rank], given[2].tensor_split(size)[rank]]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_loss.cross_entropy(x, weight, bias, target, given[4], 4, torch.float64, ((CLASSES, 1),), **options, **where)

    found = results(loss, *own)
    dist.all_reduce(found[1])  # (a pending sum: each rank knows that of its classes)
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_classes_cut_over_ranks(gloo: Pool, options: dict[str, Any]) -> None:
    found = gloo.run(cut_over_ranks, options, world=2)
    expected = at_once(problem(), options)
    for one in found:
        for a, b in zip(one[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for at in (2, 3):
        torch.testing.assert_close(torch.cat([one[at] for one in found]), expected[at], rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        self.most = max(
            [self.most, *(x.numel() for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, Tensor))]
        )
        return found


def test_no_more_logits_than_asked_for() -> None:
    x, weight, _, target, _ = problem(torch.bfloat16, bias=False)
    x, weight, target = x.repeat(40, 1).requires_grad_(), weight.requires_grad_(), target.repeat(40)
    with Largest() as seen:
        chunked_loss.cross_entropy(x, weight, None, target, None, 16, torch.float32, ((CLASSES, 1),)).backward()
    assert seen.most == x.numel() < x.shape[0] * CLASSES
    expected = [x.grad, weight.grad]
    x.grad = weight.grad = None
    F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum").backward()
    for a, b in zip(expected, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
