"""Products with a parameter take the queue their weight gradient may go to; others are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.ops import deferred
from meshpar.passes.inputs import extra_inputs
from meshpar.passes.weight_gradients import DeferWeightGradients

aten = torch.ops.aten


def graph_of(target: Any, shapes: dict[str, Sequence[int]], arguments: Sequence[Any], *, grad: bool = True) -> fx.Graph:
    """One call: names with a dot are parameters, other strings inputs."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: "." in item[0]):
        made[name] = graph.get_attr(name) if "." in name else graph.placeholder(name)
        set_facts(made[name], Facts(Info(tuple(shape), torch.float64, grad)))
    call = graph.call_function(target, tuple(made.get(a, a) if isinstance(a, str) else a for a in arguments))
    set_facts(call, Facts(Info((2, 3), torch.float64, True)))
    graph.output((call,))
    return graph


CASES = {
    "linear": (aten.linear.default, {"x": (2, 4), "m.w": (3, 4), "m.b": (3,)}, ["x", "m.w", "m.b"], deferred.linear),
    "mm": (aten.mm.default, {"x": (2, 4), "m.w": (4, 3)}, ["x", "m.w"], deferred.matmul),
    "addmm": (aten.addmm.default, {"x": (2, 4), "m.w": (4, 3), "m.b": (3,)}, ["m.b", "x", "m.w"], deferred.matmul),
    "input": (aten.mm.default, {"x": (2, 4), "y": (4, 3)}, ["x", "y"], aten.mm.default),
    "vector": (aten.matmul.default, {"x": (2, 4), "m.w": (4,)}, ["x", "m.w"], aten.matmul.default),
}


@pytest.mark.parametrize("name", CASES)
def test_what_waits(name: str) -> None:
    target, shapes, arguments, wanted = CASES[name]
    graph = DeferWeightGradients(frozenset({"m.w", "m.b"}))(graph_of(target, shapes, arguments))
    (call,) = (n for n in graph.nodes if n.op == "call_function")
    assert call.target is wanted
    assert (extra_inputs(graph).weight_gradients is not None) == (wanted is not target)


def test_what_is_frozen_has_nothing_to_wait_for() -> None:
    target, shapes, arguments, _ = CASES["linear"]
    graph = DeferWeightGradients(frozenset({"m.w", "m.b"}))(graph_of(target, shapes, arguments, grad=False))
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [target]
