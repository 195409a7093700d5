"""Small parameters of one block share one collective."""

from __future__ import annotations

from torch import fx

from meshpar.compile.ledger import ledger
from meshpar.graph.facts import Change
from meshpar.ops import collectives
from meshpar.passes.coalesce import Coalesce
from meshpar.sharding.types import I, R
from tests.passes.graphs import calls, info, put

NAMES = ("a", "b", "c")


def _graph(regions: dict[str, str | None]) -> fx.Graph:
    graph, used = fx.Graph(), []
    weights = [put(graph, "get_attr", name, (), info(8)) for name in regions]
    for weight, region in zip(weights, regions.values(), strict=True):
        change = Change("tp", 2, I, R, info(8))
        node = put(graph, "call_function", collectives.i_to_r, (weight,), info(8), region=region, conversion=change)
        node.kwargs = {"group": "tp", "size": 2, "rank": 0}
        used.append(node)
    graph.output(tuple(used))
    return graph


def test_before_and_after() -> None:
    graph = Coalesce(frozenset(NAMES))(_graph({"a": "block", "b": "block", "c": "other"}))
    graph.lint()
    joined = next(n for n in graph.nodes if n.target is collectives.i_to_r_many)
    assert [str(a) for a in joined.args] == ["a", "b"]
    assert len(calls(graph)) == 4, "one joined call, two items of it, and the other block's own"


def test_the_ledger_counts_the_same_bytes() -> None:
    before = _graph(dict.fromkeys(NAMES, "block"))
    total = sum(c.nbytes for c in ledger(before))
    assert total == 3 * 64 and sum(c.nbytes for c in ledger(Coalesce(frozenset(NAMES))(before))) == total


def test_large_parameters_and_activations_stay_alone() -> None:
    same = dict.fromkeys(NAMES, "block")
    assert not any("many" in c for c in calls(Coalesce(frozenset(NAMES), most_bytes=63)(_graph(same))))
    assert not any("many" in c for c in calls(Coalesce(frozenset("a"))(_graph(same))))
