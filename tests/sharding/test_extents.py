"""Extents: which dims are the same thing, and how a factor lies in them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshpar.sharding.extents import Extents, join, nest, shard
from meshpar.sharding.types import Shard


def test_a_view_splits_an_extent_for_all_who_share_it() -> None:
    e = Extents()
    weight, activation = e.new(64), e.new(64)
    assert e.unify(weight, activation)
    heads, inner = e.new(8), e.new(8)
    assert e.unify(activation, e.product([heads, inner]))
    assert e.leaves(weight) == (heads, inner)
    assert e.pattern(weight, heads) == (1, ((8, 8),))
    assert e.pattern(weight, inner) == (8, ((8, 1),))


def test_products_refine_each_other() -> None:
    e = Extents()
    a, b = e.product([e.new(4), e.new(6)]), e.product([e.new(2), e.new(12)])
    assert e.unify(a, b)
    assert [e.size(f) for f in e.leaves(a)] == [e.size(f) for f in e.leaves(b)] == [2, 2, 6]


def test_rows_refine_each_other() -> None:
    e = Extents()
    a, b = e.row([e.new(8), e.new(4)]), e.row([e.new(6), e.new(6)])
    assert e.unify(a, b)
    assert [e.size(f) for f in e.leaves(a)] == [6, 2, 4]


def test_conflicting_factors_are_refused() -> None:
    e = Extents()
    assert not e.unify(e.new(6), e.new(8))
    a, b = e.product([e.new(4), e.new(6)]), e.product([e.new(6), e.new(4)])
    assert not e.unify(a, b)
    assert [e.size(f) for f in (*e.leaves(a), *e.leaves(b))] == [4, 6, 6, 4], "nothing is divided where nothing fits"
    assert not e.unify(e.product([e.new(4), e.new(6)]), e.row([e.new(12), e.new(12)]))


def test_grouped_queries_in_one_matrix() -> None:
    """q | k | v rows of 8 query and 2 key/value heads of 4: one factor, the key/value heads, cuts all three."""
    e = Extents()
    kv, group, size = e.new(2), e.new(4), [e.new(4) for _ in range(3)]
    fused = e.new(48)
    row = e.row([e.product([kv, group, size[0]]), e.product([kv, size[1]]), e.product([kv, size[2]])])
    assert e.unify(fused, row)
    pattern = e.pattern(fused, kv)
    assert pattern == (1, ((2, 16), (2, 4), (2, 4)))
    cut = shard(0, pattern, 2)
    assert cut == Shard(0, 1, ((32, 1), (8, 1), (8, 1)))
    assert cut.ranges(2, 1) == ((16, 32), (36, 40), (44, 48))
    assert e.pattern(fused, group) is None, "a factor of one segment alone cannot cut the row"


def test_heads_that_the_ranks_do_not_divide_are_not_cut() -> None:
    assert shard(0, (1, ((3, 8),)), 2) is None
    assert shard(0, (2, ((3, 1),)), 2) is None


def test_single_elements_may_be_cut_unevenly() -> None:
    assert shard(0, (1, ((131, 1),)), 2) == Shard(0, 1, ((131, 1),))
    assert shard(0, (1, ((131, 1),)), 2, even=True) is None
    assert shard(0, (1, ((132, 1),)), 2, even=True) == Shard(0, 1, ((132, 1),))
    assert shard(0, (1, ((5, 1),)), 4) is None, "the last rank would hold nothing"


def test_nest_and_join() -> None:
    assert nest(3, (1, ((8, 2),)), 5) == (3, ((8, 10),))
    assert join([(2, ((4, 1),)), (1, ((8, 1),))]) == (1, ((4, 1), (4, 1), (8, 1)))
    assert join([(2, ((4, 1),))]) == (2, ((4, 1),))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_a_factor_of_a_product_holds_every_element_once(sizes: list[int], data: st.DataObject) -> None:
    e = Extents()
    parts = [e.new(n) for n in sizes]
    at = data.draw(st.integers(0, len(sizes) - 1))
    pattern = e.pattern(e.product(parts), parts[at])
    assert pattern is not None
    outer, inner = 1, 1
    for n in sizes[:at]:
        outer *= n
    for n in sizes[at + 1 :]:
        inner *= n
    cut = Shard(0, *pattern)
    held = {i for low, high in cut.ranges(sizes[at], 0) for i in range(low, high)}
    assert held == {i for i in range(outer * sizes[at] * inner) if i // inner % sizes[at] == 0}


def test_few_that_all_heads_share_are_cut_beside_them() -> None:
    """z | x | B | C | dt of 4 heads of 8, one state of 6: only heads are in most segments; B and C are cut between their elements."""
    e = Extents()
    heads, b, c = e.new(4), e.new(6), e.new(6)
    z, x = (e.product([heads, e.new(8)]) for _ in range(2))
    row = e.row([z, x, b, c, heads])
    e.fuse(row)
    assert e.pattern(row, heads) == (1, ((4, 8), (4, 8), (6, 1), (6, 1), (4, 1)))
    assert shard(0, e.pattern(row, heads), 2) == Shard(0, 1, ((32, 1), (32, 1), (6, 1), (6, 1), (4, 1)))  # type: ignore[arg-type]
    assert e.pattern(row, b) is None, "most of the row does not hold it"
