"""Gradients of parameters summed in the graph."""

from __future__ import annotations

import torch
from torch import fx

from meshpar.compile.ledger import ledger
from meshpar.mesh import Axis
from meshpar.passes.reduce import ReduceGradients
from tests.passes.graphs import calls, info, put

aten = torch.ops.aten


def test_before_and_after() -> None:
    graph = fx.Graph()
    x, w = put(graph, "placeholder", "x", (), info(4, 8)), put(graph, "get_attr", "w", (), info(8, 8))
    frozen = put(graph, "get_attr", "frozen", (), info(8, 8, grad=False))
    y = put(graph, "call_function", aten.mm.default, (x, w), info(4, 8), region="one")
    z = put(graph, "call_function", aten.mm.default, (y, w), info(4, 8), region="two")
    graph.output((put(graph, "call_function", aten.mm.default, (z, frozen), info(4, 8)),))
    ReduceGradients(Axis("dp", 4, 1, "group"), frozenset({"w", "frozen"}))(graph)
    graph.lint()
    assert calls(graph) == [
        "i_to_r = i_to_r(w)",
        "mm = mm(x, i_to_r)",
        "i_to_r_1 = i_to_r(w)",
        "mm_1 = mm(mm, i_to_r_1)",
        "mm_2 = mm(mm_1, frozen)",
    ]
    entries = ledger(graph)
    assert [(c.kind, c.axis, c.phase, c.nbytes, c.region) for c in entries] == [
        ("all_reduce", "dp", "backward", 2 * 512 * 3 / 4, "one"),
        ("all_reduce", "dp", "backward", 2 * 512 * 3 / 4, "two"),
    ]
