"""Views: the factors two shapes of one tensor have in common."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshpar.sharding.notation import Dims
from meshpar.sharding.views import reshape_dims


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two groupings of one list of factors: shapes that reshape into each other."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=6))

    def grouped() -> tuple[int, ...]:
        ends = [i + 1 for i in range(len(factors)) if i + 1 == len(factors) or draw(st.booleans())]
        return tuple(prod(factors[a:b]) for a, b in zip([0, *ends], ends))

    return grouped(), grouped()


def _product(dims: Dims, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(prod(sizes[n] for segment in dim for n in segment) for dim in dims)


def test_heads() -> None:
    assert reshape_dims((4, 64), (4, 8, 8)) == (((("0",),), (("1", "2"),)), ((("0",),), (("1",),), (("2",),)), {"0": 4, "1": 8, "2": 8}, [])


def test_without_common_factors_the_rest_is_fixed() -> None:
    left, right, sizes, fixed = reshape_dims((4, 2, 3), (4, 3, 2))
    assert left[0] == right[0] == (("0",),)
    assert sorted(sizes[n] for n in fixed) == [2, 2, 3, 3]
    assert not {n for d in left for s in d for n in s} & {n for d in right for s in d for n in s} & set(fixed)


@given(shapes())
def test_names_multiply_to_the_dims_of_both_sides(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = pair
    left, right, sizes, _ = reshape_dims(before, after)
    assert _product(left, sizes) == before
    assert _product(right, sizes) == after


@given(shapes())
def test_a_shared_name_is_the_same_stride_on_both_sides(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The elements whose coordinate along a shared name is 0 are the same in both shapes."""
    before, after = pair
    left, right, sizes, fixed = reshape_dims(before, after)
    x = torch.arange(prod(before))
    for name in sizes.keys() - set(fixed):
        assert torch.equal(_first(x, left, sizes, name), _first(x, right, sizes, name)), name


def _first(x: torch.Tensor, dims: Dims, sizes: dict[str, int], name: str) -> torch.Tensor:
    names = [n for dim in dims for segment in dim for n in segment]
    x = x.reshape([sizes[n] for n in names])
    return x.select(names.index(name), 0).flatten().sort().values
