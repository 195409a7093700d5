"""Shards: which elements of a dim every rank holds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshpar.sharding.types import I, P, R, Shard, chunk, local_shape, plain

SEGMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=3).map(tuple)
SHARDS = st.builds(Shard, st.just(0), st.integers(1, 3), SEGMENTS)


def test_heads_are_never_cut_inside() -> None:
    assert Shard(0, 1, ((3, 4),)).ranges(2, 0) == ((0, 8),)
    assert Shard(0, 1, ((3, 4),)).ranges(2, 1) == ((8, 12),)


def test_every_segment_is_cut() -> None:
    fused = Shard(0, 1, ((8, 4), (2, 4), (2, 4)))
    assert fused.ranges(2, 0) == ((0, 16), (32, 36), (40, 44))
    assert fused.ranges(2, 1) == ((16, 32), (36, 40), (44, 48))


def test_a_strided_factor_is_cut_in_every_stretch() -> None:
    assert Shard(0, 2, ((4, 1),)).ranges(2, 1) == ((2, 4), (6, 8))


def test_as_text() -> None:
    assert [str(t) for t in (I, R, P, plain(1, 8))] == ["I", "R", "P", "S(1)"]
    assert str(Shard(0, 4, ((12, 1),))) == "S(0: 4*[12])"
    assert str(Shard(0, 1, ((8, 4), (2, 4)))) == "S(0: [8x4|2x4])"


@given(SHARDS, st.integers(1, 6))
def test_the_ranges_of_all_ranks_tile_the_dim(shard: Shard, size: int) -> None:
    held = [shard.ranges(size, rank) for rank in range(size)]
    elements = sorted(i for ranges in held for low, high in ranges for i in range(low, high))
    assert elements == list(range(shard.length))
    assert [sum(high - low for low, high in ranges) for ranges in held] == [shard.local_length(size, rank) for rank in range(size)]


@given(SHARDS, st.integers(1, 6))
def test_even_means_equal_lengths(shard: Shard, size: int) -> None:
    if shard.is_even(size):
        assert {shard.local_length(size, rank) for rank in range(size)} == {shard.length // size}


@given(st.integers(1, 40), st.integers(1, 8))
def test_chunks_are_those_of_torch(length: int, size: int) -> None:
    want = [x.tolist() for x in torch.arange(length).chunk(size)]
    have = [list(range(*chunk(length, size, rank))) for rank in range(size)]
    assert have == want + [[]] * (size - len(want))


def test_local_shape() -> None:
    assert local_shape((5, 8), plain(0, 5), 2, 1) == (2, 8)
    assert local_shape((5, 8), P, 2, 1) == (5, 8)
