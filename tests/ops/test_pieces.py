"""Products in pieces on real ranks: values and gradients of the plain conversions and products, three and two ranks, with a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from meshpar.ops import collectives, pieces, products
from tests.pool import Pool


def made(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def compared(kind: str, batch: int) -> dict[str, float]:
    """The largest differences of values and gradients, in pieces and not."""
    where = {"group": dist.group.WORLD.group_name, "size": dist.get_world_size(), "rank": dist.get_rank()}  # type: ignore[union-attr]
    size, real = dist.get_world_size(), pieces.LEAST
    layout, n = (1, 1, ((2 * size, 1),)), 2 * size
    pieces.LEAST = 1  # two messages for what a rank sends another
    try:
        return _compared(kind, batch, where, layout, n)
    finally:
        pieces.LEAST = real


def _compared(kind: str, batch: int, where: Any, layout: Any, n: int) -> dict[str, float]:
    size, found = dist.get_world_size(), []
    for cut in (True, False):
        later = products.beside()
        x, u, v = made(batch, 2, 5, seed=1), made(7, 5, seed=2), made(3, 5, seed=3)
        bias, w = made(3, seed=5), made(5, 7, seed=6)
        a, q = made(batch, n, 7, seed=4), made(4, 5, seed=7)
        if kind.startswith("gathered"):
            if kind == "gathered, of stretches":  # one of each sample
                layout, x = (0, batch, ((n, 1),)), x.detach().flatten(0, 1).requires_grad_()
            elif kind == "gathered, unequal":
                layout = (1, 1, ((n - 1, 1),))
                x = x[:, : 2 - (dist.get_rank() == size - 1)].detach().requires_grad_()
            more, form = kind == "gathered, and whole", {"at_once": True} if kind == "gathered, at once" else {}
            if cut:
                y, z, *whole = pieces.gathered(x, (u, v), (None, bias), *layout, later, (w,), whole=more, **form, **where)
                out = [y, z, products.linear(y, w, None, later, 0), *whole]
            else:
                one = collectives.s_to_r(x, *layout, **where)
                y = linear(one, u)
                out = [y, linear(one, v, bias), linear(y, w), *([one] if more else [])]
            leaves = [x, u, v, bias, w]
        elif kind == "scattered":
            if cut:
                first = pieces.scattered(a, w, *layout, None, 0, later, (q,), **where)
                out = [first, products.linear(first, q, None, later, 0)]
            else:
                first = collectives.p_to_s(linear(a, w), *layout, **where)
                out = [first, linear(first, q)]
            leaves = [a, w, q]
        else:
            out = [pieces.reduced(a, w, **where) if cut else collectives.p_to_i(linear(a, w), **where)]
            leaves = [a, w]
        sum((o**2).sum() for o in out).backward()  # type: ignore[union-attr]
        found.append([*out, *(leaf.grad for leaf in leaves)])
    return {str(i): (p - q).abs().max().item() for i, (p, q) in enumerate(zip(*found, strict=True))}  # type: ignore[operator]


KINDS = (
    *("gathered", "gathered, and whole", "gathered, at once", "gathered, of stretches", "gathered, unequal"),
    *("scattered", "reduced"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "batch"), [(3, 2), (2, 1)])
def test_values_and_gradients(gloo: Pool, kind: str, world: int, batch: int) -> None:
    for differences in gloo.run(compared, kind, batch, world=world):
        assert max(differences.values()) < 1e-12, differences


def test_how_many_messages() -> None:
    least = pieces.LEAST
    assert [pieces.messages(12, least * k, 2) for k in (0, 1, 2, 3, 4, 9)] == [1, 1, 2, 3, 4, 4]
    assert [pieces.messages(12, least * 9, size) for size in (2, 3, 4, 5, 8, 16)] == [4, 2, 2, 1, 1, 1], "ranks are parts, too"
    assert pieces.messages(6, 4 * least, 2) == 3 and pieces.messages(7, 4 * least, 2) == 1, "equal ones"


def without_gradients() -> bool:
    where: dict[str, Any] = {"group": dist.group.WORLD.group_name, "size": 2, "rank": dist.get_rank()}  # type: ignore[union-attr]
    x, u = made(1, 2, 5, seed=1), made(7, 5, seed=2)
    with torch.no_grad():
        (y,) = pieces.gathered(x, (u,), (None,), 1, 1, ((4, 1),), **where)
        return bool((y - linear(collectives.s_to_r(x, 1, 1, ((4, 1),), **where), u)).abs().max() < 1e-12) and not y.requires_grad


def test_evaluation(gloo: Pool) -> None:
    assert all(gloo.run(without_gradients, world=2))
