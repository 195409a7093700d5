"""Numbers of a new shape are those that had the same values for all shapes known."""

from __future__ import annotations

import pytest

from meshpar.compile.shapes.numbers import Differs, NewNumbers


def test_a_number_is_told_by_its_values() -> None:
    numbers = NewNumbers([[16, 8, 17, 2.0], [20, 8, 21, 2.0]], [23, 8, 24, 2.0])
    assert [numbers.now(key) for key in ((16, 20), (17, 21), (8, 8), (5, 5), (2.0, 2.0))] == [23, 24, 8, 5, 2.0]


def test_what_the_forward_does_not_show_is_not_guessed() -> None:
    with pytest.raises(Differs, match="was 32 and 40 for the shapes known, which the forward does not show"):
        NewNumbers([[16], [20]], [23]).now((32, 40))


@pytest.mark.parametrize(
    ("known", "now", "told"),
    [
        ([[16, 16], [20, 20]], [23, 20], "two numbers that were 16 and 20 for the shapes known differ now"),
        ([[16, 8], [20, 8]], [23, 9], "a number that was 8 for the shapes known is 9 now"),
    ],
)
def test_numbers_that_part_are_noticed(known: list[list[int]], now: list[int], told: str) -> None:
    with pytest.raises(Differs, match=told):
        NewNumbers(known, now)


def test_integers_and_floats_are_two_kinds() -> None:
    numbers = NewNumbers([[16, 16.0], [20, 20.0]], [23, 24.0])
    assert (numbers.now((16, 20)), numbers.now((16.0, 20.0))) == (23, 24.0)


def test_a_count_may_be_written_as_a_float() -> None:
    found = NewNumbers([[16], [20]], [23]).now((16.0, 20.0))
    assert (found, type(found)) == (23.0, float)
