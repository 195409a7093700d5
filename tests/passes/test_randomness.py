"""Random operators get their seed from their place."""

from __future__ import annotations

import torch
from torch import fx

from meshpar.mesh import Axis
from meshpar.ops import random
from meshpar.passes.inputs import extra_inputs
from meshpar.passes.randomness import SeedRandom
from tests.passes.graphs import info, put

aten = torch.ops.aten
AXES = (Axis("dp", 2, 1, "data"), Axis("tp", 2, 0, "tensor"))


def _graph(*cuts: tuple[str | None, tuple[str, ...]]) -> fx.Graph:
    graph = fx.Graph()
    last = put(graph, "placeholder", "x", (), info(64, 64))
    for number, (region, cut) in enumerate(cuts):
        last = put(graph, "call_function", aten.dropout.default, (last, 0.5, True), info(64, 64), region=region, seed=number, cut=cut)
    graph.output((last,))
    return SeedRandom(AXES)(graph)


def _random(graph: fx.Graph) -> list[fx.Node]:
    graph.lint()
    return [n for n in graph.nodes if n.target is random.dropout]


def test_the_key_is_one_more_input() -> None:
    graph = _graph((None, ("tp",)), (None, ()))
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x", "random_key"]
    first, second = _random(graph)
    assert first.kwargs["shards"] == (("tensor", 2, 0),) and second.kwargs["shards"] == ()
    assert [n.kwargs["number"] for n in (first, second)] == [0, 1]
    assert first.kwargs["key"].name == extra_inputs(graph).random_key


def test_without_random_operators_nothing_changes() -> None:
    assert [n.name for n in _graph().nodes] == ["x", "output"]


def test_blocks_of_one_structure_have_equal_numbers_and_keys_of_their_own() -> None:
    first, second = _random(_graph(("layers.0", ("dp",)), ("layers.1", ("dp",))))
    assert first.kwargs["number"] == second.kwargs["number"] == 0
    assert first.kwargs["shards"] == second.kwargs["shards"] == (("data", 2, 1),)
    keys = [n.kwargs["key"] for n in (first, second)]
    assert all(k.target is random.derive for k in keys) and keys[0].args[1] != keys[1].args[1]


def test_the_numbers_follow_from_the_key() -> None:
    run = fx.GraphModule(torch.nn.Module(), _graph(("layers.0", ()), ("layers.1", ())))
    x = torch.ones(64, 64, dtype=torch.float64)
    assert torch.equal(run(x, 1)[0], run(x, 1)[0])
    assert not torch.equal(run(x, 1)[0], run(x, 2)[0])
