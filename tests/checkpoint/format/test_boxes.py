"""Nested cuts, runs and boxes, against numpy; and the proof of tiling, against a painted array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.format.boxes import Box, Cut, find_flaw, fit, intersect, local_shape, runs_held, runs_of
from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.sharding.types import Shard, plain
from tests.checkpoint.making import boxes_held


def test_two_axes_on_one_dim_nest_in_order() -> None:
    cuts = [Cut("tp", plain(0, 12)), Cut("dp", plain(0, 12))]
    held = [runs_held((12,), cuts, {"tp": 2, "dp": 2}, {"tp": t, "dp": d}) for t in range(2) for d in range(2)]
    assert held == [(((0, 3),),), (((3, 6),),), (((6, 9),),), (((9, 12),),)]


def test_a_fused_projection_gives_one_run_per_segment() -> None:
    qkv = Shard(0, 1, ((4, 2), (2, 2), (2, 2)))
    assert runs_of(16, [(qkv, 2, 1)]) == ((4, 8), (10, 12), (14, 16))
    assert [str(b) for b in boxes_held((16, 3), [Cut("tp", qkv)], {"tp": 2}, {"tp": 0})] == ["[0:4, 0:3]", "[8:10, 0:3]", "[12:14, 0:3]"]


def test_a_plain_cut_behind_a_fused_one_counts_along_the_local_rows() -> None:
    qkv = Shard(0, 1, ((4, 2), (2, 2), (2, 2)))
    assert runs_of(16, [(qkv, 2, 1), (plain(0, 16), 2, 0)]) == ((4, 8),)
    assert runs_of(16, [(qkv, 2, 1), (plain(0, 16), 2, 1)]) == ((10, 12), (14, 16))


def test_uneven_cuts_leave_some_ranks_with_less_and_some_with_nothing() -> None:
    assert [runs_of(5, [(plain(0, 5), 4, r)]) for r in range(4)] == [((0, 2),), ((2, 4),), ((4, 5),), ()]


def test_segments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ImpossibleError, match="describes 16 elements of dim 0, but there are 10"):
        fit(Shard(0, 1, ((4, 2), (4, 2))), 10)


def axes() -> Any:
    return st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 2)), max_size=3, unique_by=lambda pair: pair[0])


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], tuple[Cut, ...], dict[str, int]]:
    """A shape, cuts on it, fused ones first, and axis sizes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cuts: list[Cut] = []
    for axis, dim in draw(axes()):
        dim %= len(shape)
        if not any(c.shard.dim == dim for c in cuts) and draw(st.booleans()):
            segments = tuple(draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3)))
            shard = Shard(dim, draw(st.integers(1, 2)), segments)
            shape = tuple(shard.length if d == dim else n for d, n in enumerate(shape))
            cuts.append(Cut(axis, shard))
        else:
            cuts.append(Cut(axis, plain(dim, shape[dim])))
    return shape, tuple(cuts), {axis: draw(st.integers(1, 4)) for axis in "abc"}


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_the_boxes_of_all_ranks_tile_the_tensor_and_agree_with_numpy(case: tuple[tuple[int, ...], tuple[Cut, ...], dict[str, int]]) -> None:
    shape, cuts, sizes = case
    full = np.arange(np.prod(shape)).reshape(shape)
    used = [c.axis for c in cuts]
    boxes = []
    for index in np.ndindex(*(sizes[a] for a in used)):
        coords = dict(zip(used, map(int, index)))
        local = full
        for cut in cuts:  # apply the cuts one after the other to the local array
            shard = fit(cut.shard, local.shape[cut.shard.dim])
            picks = [i for a, b in shard.ranges(sizes[cut.axis], coords[cut.axis]) for i in range(a, b)]
            local = np.take(local, picks, axis=cut.shard.dim)
        runs = runs_held(shape, cuts, sizes, coords)
        assert local_shape(runs) == local.shape
        assert np.array_equal(full[np.ix_(*([i for a, b in row for i in range(a, b)] for row in runs))], local)
        boxes += boxes_held(shape, cuts, sizes, coords)
    assert find_flaw(shape, boxes) is None


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            st.lists(st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape)), max_size=6),
        )
    )
)
@settings(max_examples=250, deadline=None)
def test_a_flaw_is_found_exactly_when_some_element_is_not_covered_once(case: tuple[tuple[int, ...], list[Any]]) -> None:
    shape, spans = case
    boxes = [Box(tuple(o for o, _ in s), tuple(min(n, shape[d] - o) for d, (o, n) in enumerate(s))) for s in spans]
    paint = np.zeros(shape, int)
    for box in boxes:
        paint[tuple(slice(o, o + n) for o, n in zip(*box))] += 1
    flaw = find_flaw(shape, boxes)
    assert (flaw is None) == bool((paint == 1).all())
    if flaw is not None:
        region = paint[tuple(slice(o, o + n) for o, n in zip(*flaw.box))]
        assert region.size and ((region == 0).all() if flaw.kind == "gap" else (region > 1).all())


def test_boxes_outside_the_tensor_and_empty_tensors() -> None:
    flaw = find_flaw((4,), [Box((2,), (3,))])
    assert flaw is not None and flaw.kind == "outside"
    assert find_flaw((0, 4), []) is None
    assert find_flaw((), [Box((), ())]) is None
    flaw = find_flaw((), [])
    assert flaw is not None and flaw.kind == "gap"


def test_intersection_is_none_when_boxes_only_touch() -> None:
    assert intersect(Box((0,), (2,)), Box((2,), (2,))) is None
    assert intersect(Box((), ()), Box((), ())) == Box((), ())
