"""Arithmetic of shards against the elements themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.proof.static.layout import around, between, inside, joined, layout_of, normal, of_layout, reshaped
from meshpar.sharding.types import Shard


def held(shape: tuple[int, ...], shard: Shard, ranks: int, rank: int) -> torch.Tensor:
    """The numbers of the elements that a rank has, in its own order."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    return torch.cat([whole.narrow(shard.dim, low, high - low) for low, high in shard.pieces(ranks, rank)], shard.dim).flatten()


@given(
    st.sampled_from([((4, 12, 64), (4, 12, 8, 8)), ((48, 64), (4, 12, 64)), ((6, 8), (2, 3, 8)), ((2, 3, 8), (6, 8)), ((16,), (1, 16))]),
    st.integers(0, 2),
    st.sampled_from([1, 2]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_part_of_one_shape_is_that_part_of_another(shapes: tuple[tuple[int, ...], ...], dim: int, repeat: int, dealt: bool) -> None:
    before, after = shapes
    dim, ranks = dim % len(before), 2
    units = before[dim] // repeat
    if units % 4 or before[dim] % repeat:
        return
    shard = Shard(dim, repeat, ((units // 2, 1), (-units // 2, 1)) if dealt else ((units, 1),))
    for found in reshaped(shard, before, after, ranks):
        for rank in range(ranks):
            assert torch.equal(held(before, shard, ranks, rank), held(after, found, ranks, rank))


def test_heads_of_a_width_are_found_and_what_is_inside_of_them_is_not() -> None:
    assert reshaped(Shard(2, 1, ((8, 8),)), (4, 12, 64), (4, 12, 8, 8), 2) == [Shard(2, 1, ((2, 4),))]
    assert reshaped(Shard(1, 1, ((6, 1),)), (4, 6), (24,), 2) == [Shard(0, 4, ((2, 3),))]
    assert reshaped(Shard(0, 1, ((4, 1),)), (4, 6), (3, 8), 2) == []


@pytest.mark.parametrize("shard", [Shard(0, 1, ((8, 1),)), Shard(0, 2, ((4, 2),)), Shard(0, 1, ((4, 1), (-4, 1))), Shard(0, 1, ((5, 1),))])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_normal_form_is_the_same_cut(shard: Shard, ranks: int) -> None:
    same = of_layout(0, layout_of(shard, ranks))
    assert [same.ranges(ranks, r) for r in range(ranks)] == [shard.ranges(ranks, r) for r in range(ranks)]
    assert normal(layout_of(shard, ranks), ranks) == layout_of(shard, ranks)


def test_factors_of_a_product() -> None:
    sizes = {"b": 4, "s": 12}
    assert inside(("b", "s"), sizes, (4, ((2, 6),))) == ("s", (1, ((2, 6),)))
    assert inside(("b", "s"), sizes, (1, ((2, 24),))) == ("b", (1, ((2, 2),)))
    assert inside(("b", "s"), sizes, (1, ((3, 16),))) is None
    assert around(("b", "s"), sizes, "s", (1, ((2, 6),))) == (4, ((2, 6),))


def test_segments_are_taken_apart_and_put_together() -> None:
    fused = (1, ((8, 4), (2, 4), (2, 4)))
    assert between(fused, 0, 32) == (1, ((8, 4),))
    assert between(fused, 32, 48) == (1, ((2, 4), (2, 4)))
    assert between(fused, 8, 40) is None
    assert joined([(1, ((8, 4),)), (1, ((2, 4),))]) == (1, ((8, 4), (2, 4)))
