"""The notation of the rules."""

from __future__ import annotations

import pytest

from meshpar.sharding.notation import Signature, bind


def test_shared_names() -> None:
    found = bind("i k, k j -> i j", [(2, 3), (3, 4)], [(2, 4)])
    assert found.inputs == (((("i",),), (("k",),)), ((("k",),), (("j",),)))
    assert found.outputs == (((("i",),), (("j",),)),)
    assert found.sizes == {"i": 2, "k": 3, "j": 4}


def test_an_ellipsis_stands_for_any_leading_dims() -> None:
    for lead in ((), (2,), (2, 5)):
        found = bind("... i, o i -> ... o", [(*lead, 3), (4, 3)], [(*lead, 4)])
        assert found.outputs[0] == tuple(((f".{i}",),) for i in reversed(range(len(lead)))) + ((("o",),),)


def test_a_composite_dim_is_read_as_a_product() -> None:
    found = bind("b (k g) e, b k e -> b (k g)", [(2, 8, 3), (2, 4, 3)], [(2, 8)])
    assert found.inputs[0][1] == (("k", "g"),)
    assert found.sizes["g"] == 2


def test_a_factor_of_one_has_no_name() -> None:
    assert bind("(k g), k -> k", [(4,), (4,)], [(4,)]).inputs[0][0] == (("k",),)


def test_dims_of_one_are_broadcast() -> None:
    found = bind("i j, i j -> i j", [(2, 1), (2, 3)], [(2, 3)])
    assert found.inputs[0] == ((("i",),), ())


def test_brackets_fix_a_name() -> None:
    assert bind("n [c], [c] -> n [c]", [(2, 3), (3,)], [(2, 3)]).fixed == {"c"}


def test_absent_operands_are_left_out() -> None:
    found = bind("... i, o i, o -> ... o", [(2, 3), (4, 3)], [(2, 4)], linear=((0, 2), (1, 2)))
    assert len(found.inputs) == 2
    assert found.linear == (frozenset({0}), frozenset({1}))


@pytest.mark.parametrize(
    ("text", "shapes", "outs", "message"),
    [
        ("a b", [], [], "rule 'a b' has no '->'"),
        ("(a b -> a", [], [], "rule '(a b -> a' leaves a bracket open"),
        ("a b) -> a", [], [], "rule 'a b) -> a' closes a bracket that is not open"),
        ("i, i -> i", [(2,), (3,)], [(2,)], "rule 'i, i -> i': i is 2 and 3"),
        ("i -> i", [(2,), (2,)], [(2,)], "rule 'i -> i' has 1 operands, not 2"),
        ("i j -> i", [(2,)], [(2,)], "does not fit a tensor of 1 dims"),
        ("... i j -> i", [(2,)], [(2,)], "does not fit a tensor of 1 dims"),
        ("(a b), a -> a", [(6,), (4,)], [(4,)], "cannot read a dim of 6 as (a b)"),
        ("(a b) -> a", [(6,)], [(1,)], "cannot read a dim of 6 as (a b)"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, shapes: list[tuple[int, ...]], outs: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError) as error:
        bind(text, shapes, outs)
    assert message in str(error.value)


def test_fellow_segments_are_cut_together() -> None:
    row = ((("q",), ("k",)),)
    other = ((("k",), ("v",)),)
    found = Signature((row, other), (((("free",),),),), {"q": 4, "k": 2, "v": 2, "free": 3})
    assert found.group("q") == found.group("v") == {"q", "k", "v"}
    assert found.group("free") == {"free"}
