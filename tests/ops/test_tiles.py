"""Attention in tiles: against attention in one piece, with everything that may be added to scores; and that no table of pairs is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshpar.dry_run.tape import MachineTape, levels
from meshpar.ops import pairings, tiles
from meshpar.ops.pairings import Pairing, Stretch
from meshpar.ops.tile import _hidden
from meshpar.ops.tiles import ScoreStep, Scoring, attend, attend_backward, nothing_yet, sums_of
from meshpar.ops.uneven import Visible, pairs
from meshpar.sharding.extents import dealt_out
from meshpar.sharding.types import Shard

S = 16
ALL = [Pairing((Stretch(0, 0, S),), (Stretch(0, 0, S),))]
ROWS = tuple(Stretch(at, at, 2) for at in (6, 0, 2, 8, 4)) + (Stretch(10, 10, 6),)
IN_PARTS = [Pairing(ROWS, (Stretch(at, at, size),)) for at, size in ((4, 12), (1, 1))] + [
    Pairing(ROWS, (Stretch(0, 0, 1), Stretch(2, 2, 2)))
]
"""Short stretches of queries, in any order, and some of the keys at a time."""


def whole(query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], scoring: Scoring) -> Tensor:
    """Written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    z = query @ key.transpose(-1, -2) * scoring.scale
    for kind, *of in scoring.steps:
        numbers = [operands[x] if isinstance(x, int) else x for x in of]
        if kind == "times":
            z = z * numbers[0]
        elif kind == "tanh":
            z = torch.tanh(z)
        elif kind == "plus":
            z = z + numbers[0]
        elif kind == "by":
            z = z * numbers[0]
        elif kind == "seen":
            z = z.masked_fill(~numbers[0], -torch.inf)
        else:
            z = torch.where(numbers[0] if kind == "keep" else ~numbers[0], z, numbers[1])
    seen = scoring.causal or scoring.window is not None
    hidden = _hidden(torch.arange(query.shape[2]), torch.arange(key.shape[2]), scoring.sight) if seen else None
    return (z if hidden is None else z.masked_fill(hidden, -torch.inf)).softmax(-1) @ value


def given(samples: int, heads: int, kv: int, s: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(samples, n, s, d, dtype=dtype, requires_grad=True) for n, d in ((heads, 4), (kv, 4), (kv, 3))]


SEEN, ADDED, FACTORS, FILL, NONE = range(5)
"""Operands: what is seen, a bias of each head, factors of a query, a number, what is seen where some queries see nothing."""
STEPS: dict[str, tuple[ScoreStep, ...]] = {
    "none": (),
    "masked": (("seen", SEEN),),
    "biased": (("plus", ADDED),),
    "capped": (("times", 0.5), ("tanh",), ("times", 2.0), ("plus", ADDED)),
    "scaled by a tensor": (("by", FACTORS), ("plus", ADDED), ("seen", SEEN)),
    "kept": (("plus", ADDED), ("keep", SEEN, -3.0), ("times", 2.0)),
    "filled": (("fill", SEEN, FILL), ("by", FACTORS)),
    "hidden from some": (("plus", ADDED), ("keep", NONE, -3e38)),
}
SHOWN = {"all": (False, None), "causal": (True, None), "window": (True, 5)}


@pytest.mark.sweep(17)
@pytest.mark.parametrize("shape", [(2, 6, S, S), (1, 6, 1, S), (S, S), (2, 1, S, 1)], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shown", SHOWN)
def test_it_is_attention(shown: str, steps: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairings, "SIDE", 5)
    monkeypatch.setattr(tiles, "SCORES", 60)  # a head or two of a sample
    scoring = Scoring(*SHOWN[shown], 0.7, STEPS[steps])
    q, k, v = given(2, 6, 3)
    seen = (torch.rand(2, 1, S, S) < 0.6) | torch.eye(S, dtype=torch.bool)
    added, factors = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in (shape, (2, 1, S, 1)))
    operands = [seen, added, factors, torch.tensor(0.3, dtype=torch.float64), seen & (torch.arange(S) != 2)[:, None]]
    used = {x for step in scoring.steps for x in step[1:] if isinstance(x, int)}
    needed = [i in used and i in (ADDED, FACTORS) for i in range(5)]
    right = whole(q, k, v, operands, scoring)
    grad = torch.randn_like(right)
    wanted = torch.autograd.grad(right, [q, k, v, *(x for x, need in zip(operands, needed, strict=True) if need)], grad)
    with torch.no_grad():
        wide = [x[(None,) * (4 - x.dim())] for x in operands]
        out, norm = nothing_yet(q, 3)
        attend(q, k, v, wide, IN_PARTS, Scoring.read(scoring.written), out, norm)
        torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
        sums, more = [torch.zeros_like(x) for x in (q, k, v)], sums_of(wide, needed)
        attend_backward(q, k, v, wide, IN_PARTS, scoring, grad, norm, (out * grad).sum(-1), *sums, more)
        for found, want in zip((*sums, *(x for x, need in zip(more, needed, strict=True) if need)), wanted, strict=True):
            torch.testing.assert_close(found.view(want.shape), want, rtol=1e-12, atol=1e-12)


def test_queries_that_see_nothing_get_nothing() -> None:
    q, k, v = (x.detach() for x in given(1, 2, 2))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    mask[..., 3, :] = False
    out, norm = nothing_yet(q, 3)
    masked = Scoring(steps=(("seen", 0),))
    attend(q, k, v, [mask], ALL, masked, out, norm)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    attend_backward(q, k, v, [mask], ALL, masked, torch.ones_like(out), norm, out.sum(-1), *sums, [torch.zeros(1)])
    assert not out[..., 3, :].any() and not sums[0][..., 3, :].any() and all(bool(torch.isfinite(x).all()) for x in (out, *sums))


def used(s: int, scoring: Scoring, *operands: Tensor) -> tuple[int, int]:
    """Of attention of `s` positions, forward and backward: the most bytes that are taken at a time, and how many products are made."""
    q, k, v = (x.detach() for x in given(1, 4, 2, s, torch.float32))
    (out, norm), sums, grad = nothing_yet(q, 3), [torch.zeros_like(x) for x in (q, k, v)], torch.ones(1, 4, s, 3)
    delta, several = torch.ones(1, 4, s), [Pairing((Stretch(0, 0, s),), (Stretch(0, 0, s),))]
    with MachineTape() as tape:
        for x in (q, k, v, out, norm, grad, delta, *sums):
            tape.number(x)
        before = sum(grown for _, grown in tape.storages.changes)
        attend(q, k, v, operands, several, scoring, out, norm)
        attend_backward(q, k, v, operands, several, scoring, grad, norm, delta, *sums, [torch.zeros(1)] * len(operands))
        most = max(levels(tape.storages.changes)) - before
        return most, sum(call.kernel.kind == "matrix" for call in tape.calls)


def test_nothing_is_as_large_as_the_pairs_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length: a few tiles. Those of which a causal query or a window sees nothing are not computed."""
    monkeypatch.setattr(pairings, "SIDE", 8)
    monkeypatch.setattr(tiles, "SCORES", 4 * 8 * 8)
    tile, products = 4 * 4 * 8 * 8, 7  # bytes of four heads; two products forward, five backward
    (short, every), (long, _) = used(64, Scoring()), used(128, Scoring())
    assert short == long < 6 * tile and every == 8 * 8 * products
    assert used(64, Scoring(causal=True))[1] == 8 * 9 // 2 * products
    assert used(64, Scoring(causal=True, window=9))[1] == (8 + 7) * products
    assert tiles.area([1, 1, 0, 0, 64, 0, 0, 64], Scoring(causal=True)) == 36 * 64


def test_tiles_between_documents_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a mask of the batch says that nothing is seen."""
    monkeypatch.setattr(pairings, "SIDE", 8)
    document = torch.tensor([0] * 12 + [1] * 20 + [2] * 32)
    mask = (document == document[:, None])[None, None]
    within = 2 * 2 + 3 * 3 - 1 + 4 * 4  # tiles of each document; the first two meet in one
    assert used(64, Scoring(steps=(("seen", 0),)), mask)[1] == 7 * within
    assert used(64, Scoring(steps=(("seen", 0), ("fill", 1, 0.0))), mask, mask)[1] == 7 * 8 * 8  # what is hidden comes back
    added = torch.zeros(1, 1, 64, 64).masked_fill(~mask, -torch.inf)
    for steps, operand in (((("fill", 0, -torch.inf),), ~mask), ((("keep", 0, -torch.inf), ("times", 2.0)), mask), ((("plus", 0),), added)):
        assert used(64, Scoring(steps=steps), operand)[1] == 7 * within
    for steps, operand in (((("plus", 0), ("tanh",)), added), ((("seen", 0), ("times", -1.0)), mask), ((("keep", 0, -1e38),), mask)):
        assert used(64, Scoring(steps=steps), operand)[1] == 7 * 8 * 8, steps  # not hidden for good


@pytest.mark.parametrize("pieces", [1, 2, 8, 16])
def test_short_pieces_cost_no_more_tiles(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positions in any number of pieces as many products as of those in one, and no more pairs than half as many again."""
    monkeypatch.setattr(pairings, "SIDE", 8)
    size, s = 2, 64
    document = torch.arange(2 * s) // 50
    mask = (document == document[:, None]).tril()
    cut = Shard(0, 1, dealt_out(2 * s, pieces))
    tiles_of, pairs_of, useful = 0, 0, 0
    for rank in range(size):
        own = pairings.held(cut.ranges(size, rank))
        rows = torch.cat([mask[at : at + n] for _, at, n in own])[None, None]
        for other in range(size):
            found = pairings.blocks(Pairing(own, pairings.held(cut.ranges(size, other))), pairings.Sight())
            seen = tiles._seen(Pairing(own, pairings.held(cut.ranges(size, other))), found, [rows], Scoring(steps=(("seen", 0),)))
            for parts in pairings.tiling(found, seen):
                tiles_of += 1
                pairs_of += len(parts) * parts[0][0].size * max(pairings.count(columns) for _, columns in parts)
                useful += sum(row.size * pairings.count(columns) for row, columns in parts)
    assert useful == sum(pairs(Visible(2 * s, any_of=lambda low, high: mask[low:high].any(0)), cut, size))
    assert useful <= pairs_of <= 1.5 * useful and int(mask.sum()) <= useful and tiles_of <= 70, (tiles_of, pairs_of, useful)


def test_a_tile_that_one_sample_or_head_sees_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairings, "SIDE", 5)
    q, k, v = (x.detach() for x in given(2, 2, 2))
    mask = torch.zeros(2, 2, S, S, dtype=torch.bool)
    for sample in range(2):
        for head in range(2):  # each sees another stretch of keys
            mask[sample, head, :, 3 * (2 * sample + head) : 3 * (2 * sample + head) + 3] = True
    masked = Scoring(steps=(("seen", 0),))
    out, norm = nothing_yet(q, 3)
    attend(q, k, v, [mask], ALL, masked, out, norm)
    torch.testing.assert_close(out, whole(q, k, v, [mask], masked), rtol=1e-12, atol=1e-12)
