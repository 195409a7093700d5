"""Attention in tiles: against attention in one piece, with everything that may be added to scores; and that no table of pairs is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshpar.dry_run.tape import MachineTape, levels
from meshpar.ops import tiles
from meshpar.ops.tiles import Rectangle, Sees, attend, attend_backward, nothing_yet

S = 16
ALL = [Rectangle(0, 0, S, S, 0, 0)]
IN_PARTS = [Rectangle(0, 4, 10, 12, 0, 4), Rectangle(10, 4, 6, 12, 10, 4), Rectangle(10, 0, 6, 4, 10, 0), Rectangle(0, 0, 10, 4, 0, 0)]
"""Some of the queries and some of the keys at a time, in any order."""


def whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sees: Sees) -> Tensor:
    """Written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * sees.scale
    if sees.softcap is not None:
        scores = sees.softcap * torch.tanh(scores / sees.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    hidden = sees.hidden(0, query.shape[2], 0, key.shape[2], query.device)
    return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1) @ value


def given(samples: int, heads: int, kv: int, s: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(samples, n, s, d, dtype=dtype, requires_grad=True) for n, d in ((heads, 4), (kv, 4), (kv, 3))]


SEES = [
    Sees(),
    Sees(causal=True, scale=0.5),
    Sees(causal=True, window=5),
    Sees(scale=3.0, softcap=2.0),
    Sees(causal=True, window=3, softcap=1.5),
]


@pytest.mark.parametrize("mask", [None, "seen", (2, 6, S, S), (1, 6, S, S), (S, S), (2, 1, 1, S), (1, 1, S, 1)])
@pytest.mark.parametrize("sees", SEES, ids=["all", "causal", "window", "capped", "capped window"])
def test_it_is_attention(sees: Sees, mask: str | tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIDE", 5)
    monkeypatch.setattr(tiles, "SCORES", 60)  # a head or two of a sample
    q, k, v = given(2, 6, 3)
    added: Tensor | None = None
    if mask == "seen":
        added = (torch.rand(2, 1, S, S) < 0.6) | torch.eye(S, dtype=torch.bool)
    elif mask is not None:
        added = torch.randn(mask, dtype=torch.float64).requires_grad_()  # type: ignore[arg-type]
    right = whole(q, k, v, added, sees)
    grad = torch.randn_like(right)
    learnt = added if added is not None and added.requires_grad else None
    wanted = torch.autograd.grad(right, [q, k, v, *([learnt] if learnt is not None else [])], grad)
    with torch.no_grad():
        wide = None if added is None else added[(None,) * (4 - added.dim())]
        out, lse = nothing_yet(q, 3)
        attend(q, k, v, wide, IN_PARTS, sees, out, lse)
        torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
        sums = [torch.zeros_like(x) for x in (q, k, v, *([wide] if learnt is not None else []))]  # type: ignore[arg-type]
        of_mask = sums[3] if learnt is not None else None
        attend_backward(q, k, v, wide, IN_PARTS, sees, grad, lse, (out * grad).sum(-1), *sums[:3], of_mask)
        for found, want in zip(sums, wanted, strict=True):
            torch.testing.assert_close(found.view(want.shape), want, rtol=1e-12, atol=1e-12)


def test_queries_that_see_nothing_get_nothing() -> None:
    q, k, v = (x.detach() for x in given(1, 2, 2))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    mask[..., 3, :] = False
    out, lse = nothing_yet(q, 3)
    attend(q, k, v, mask, ALL, Sees(), out, lse)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    attend_backward(q, k, v, mask, ALL, Sees(), torch.ones_like(out), lse, out.sum(-1), *sums, None)
    assert not out[..., 3, :].any() and not sums[0][..., 3, :].any() and all(bool(torch.isfinite(x).all()) for x in (out, *sums))


def used(s: int, sees: Sees) -> tuple[int, int]:
    """Of attention of `s` positions, forward and backward: the most bytes that are taken at a time, and how many products are made."""
    q, k, v = (x.detach() for x in given(1, 4, 2, s, torch.float32))
    (out, lse), sums, grad = nothing_yet(q, 3), [torch.zeros_like(x) for x in (q, k, v)], torch.ones(1, 4, s, 3)
    delta, rectangles = torch.ones(1, 4, s), [Rectangle(0, 0, s, s, 0, 0)]
    with MachineTape() as tape:
        for x in (q, k, v, out, lse, grad, delta, *sums):
            tape.number(x)
        before = sum(grown for _, grown in tape.storages.changes)
        attend(q, k, v, None, rectangles, sees, out, lse)
        attend_backward(q, k, v, None, rectangles, sees, grad, lse, delta, *sums, None)
        most = max(levels(tape.storages.changes)) - before
        return most, sum(call.kernel.kind == "matrix" for call in tape.calls)


def test_nothing_is_as_large_as_the_pairs_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length: a few tiles. Those of which a causal query or a window sees nothing are not computed."""
    monkeypatch.setattr(tiles, "SIDE", 8)
    monkeypatch.setattr(tiles, "SCORES", 4 * 8 * 8)
    tile, products = 4 * 4 * 8 * 8, 7  # bytes of four heads; two products forward, five backward
    (short, every), (long, _) = used(64, Sees()), used(128, Sees())
    assert short == long < 6 * tile and every == 8 * 8 * products
    assert used(64, Sees(causal=True))[1] == 8 * 9 // 2 * products
    assert used(64, Sees(causal=True, window=9))[1] == (8 + 7) * products
    assert tiles.area([0, 0, 64, 64, 0, 0], True, None) == 36 * 64
