"""What is known of a new node follows from what is known of an old one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import fx

from meshpar.graph.facts import Change, Exchange, Extra, Facts, Info, PartOf, facts, gives_several, info_of, infos_of, set_facts
from meshpar.ops.nature import Nature
from meshpar.sharding.types import I, P, R, plain

INFO = Info((4, 6), torch.float32, True)
LESS = Info((2, 6), torch.float32, True)
PLACE = {"module": "layers.0.mlp", "region": "layers.0", "source": "model.py:7", "stage": 1}
FULL = Facts(
    INFO,
    **PLACE,  # type: ignore[arg-type]
    seed=3,
    nature=Nature(),
    expert_stack=True,
    statistics=True,
    extra=Extra.RANDOM_KEY,
    unrecognised="it drops weights at random",
    part_of=PartOf("linear_2", (("dp", 2, (P,)),)),
    cut=("dp",),
    axis="dp",
    conversion=Change("dp", 2, P, I, INFO),
    joined=(Change("dp", 2, I, R, INFO),),
    exchange=Exchange("ep", 2, INFO),
    inside=(Facts(INFO),),
    symbol="u0",
)


def said(known: Facts) -> set[str]:
    """The names of what is known."""
    return {one.name for one in fields(Facts) if getattr(known, one.name) != getattr(Facts(), one.name)}


def test_every_field_is_in_the_example_but_that_of_capture() -> None:
    assert {one.name for one in fields(Facts)} - said(FULL) == {"stack"}


def test_beside_is_the_place_alone() -> None:
    assert FULL.beside(LESS) == Facts(LESS, **PLACE)  # type: ignore[arg-type]
    assert replace(FULL, stack=("", "layers.0")).beside(LESS).stack == ("", "layers.0"), "until regions are known"


def test_outside_is_all_but_the_block() -> None:
    assert FULL.outside() == replace(FULL, region=None)


def test_an_item_is_not_the_call() -> None:
    item = FULL.item(1, LESS)
    assert said(item) == {"info", "part_of", "cut", *PLACE} and item.info == LESS
    assert item.part_of == PartOf("linear_2", (("dp", 2, (P,)),), 1)


def test_lowered_is_the_same_call_on_one_axis_more() -> None:
    found = FULL.lowered("mul", ("tp", 4), (plain(0, 4),), lambda info, type_: LESS)
    assert found.part_of == PartOf("linear_2", (("dp", 2, (P,)), ("tp", 4, (plain(0, 4),)))) and found.cut == ("dp", "tp")
    assert said(found) == said(FULL) and found.info == LESS
    assert found.conversion is not None and found.conversion.whole == LESS, "less is sent on the axes before"
    assert found.exchange is not None and found.exchange.rows == LESS
    assert Facts(INFO).lowered("mul", ("tp", 4), (R,), lambda info, type_: info) == Facts(INFO, part_of=PartOf("mul", (("tp", 4, (R,)),)))


def test_converted_is_the_value_where_it_is_asked_for() -> None:
    change = Change("dp", 2, P, I, INFO)
    at = Facts(LESS, "norm", "layers.1", "model.py:9", 2, seed=1)
    found = FULL.converted(change, INFO, at=at)
    assert found == Facts(
        INFO, "norm", "layers.1", "model.py:9", None, part_of=PartOf("linear_2", (("dp", 2, (I,)),)), cut=("dp",), conversion=change
    )


def test_one_value_of_several_is_converted_alone() -> None:
    part = PartOf("split", (("dp", 2, (I, I)), ("tp", 2, (P, I))), 1)
    assert part.converted(Change("tp", 2, P, R, INFO)).typed == (("dp", 2, (I, I)), ("tp", 2, (R, I)))


def test_a_graph_keeps_them_and_nothing_changes_them() -> None:
    graph, copy = fx.Graph(), fx.Graph()
    node = set_facts(graph.placeholder("x"), FULL)
    assert facts(copy.node_copy(node)) == FULL and info_of(node) == INFO and infos_of(node) == (INFO,) and not gives_several(node)
    with pytest.raises(FrozenInstanceError):
        facts(node).seed = 4  # type: ignore[misc]
    many = set_facts(graph.placeholder("y"), Facts((INFO, None)))
    assert infos_of(many) == (INFO, None) and gives_several(many)
    with pytest.raises(AssertionError, match="y"):
        info_of(many)
    assert facts(graph.placeholder("z")) == Facts()
