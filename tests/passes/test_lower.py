"""Lowering obeys the types: local sizes and explicit conversions."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from meshpar.graph.facts import info_of
from meshpar.mesh import Axis
from meshpar.passes.lower import Lower
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.types import I, P, R, Shard, plain
from tests.passes.graphs import calls, info, put

aten = torch.ops.aten
HEADS = Shard(2, 1, ((8, 1),))


def _example() -> fx.Graph:
    """The example of the pass: a column-parallel linear, read as heads."""
    graph = fx.Graph()
    x, w = put(graph, "placeholder", "x", (), info(4, 12, 32)), put(graph, "get_attr", "w", (), info(64, 32))
    y = put(graph, "call_function", aten.linear.default, (x, w), info(4, 12, 64))
    z = put(graph, "call_function", aten.view.default, (y, [4, 12, 8, 8]), info(4, 12, 8, 8))
    graph.output((z,))
    return graph


PLAN = AxisPlan(
    "tp",
    2,
    {
        "x": NodePlan((), (I,), ""),
        "w": NodePlan((), (plain(0, 64),), ""),
        "linear": NodePlan((R, plain(0, 64)), (plain(2, 64),), ""),
        "view": NodePlan((plain(2, 64),), (HEADS,), ""),
    },
    (HEADS,),
)


@pytest.mark.parametrize("rank", [0, 1])
def test_before_and_after(rank: int) -> None:
    graph = _example()
    new = Lower(PLAN, Axis("tp", 2, rank, "group"))(graph)
    assert calls(graph) == ["linear = linear(x, w)", "view = view(linear, [4, 12, 8, 8])"], "the given graph is left alone"
    assert calls(new) == ["i_to_r = i_to_r(x)", "linear = linear(i_to_r, w)", "reshape = reshape(linear, [4, 12, -1, 8])"]
    conversion = next(n for n in new.nodes if n.name == "i_to_r")
    assert conversion.kwargs == {"group": "group", "size": 2, "rank": rank}
    assert [info_of(n).shape for n in new.nodes if n.op != "output"] == [(4, 12, 32), (32, 32), (4, 12, 32), (4, 12, 32), (4, 12, 4, 8)]


def test_a_value_used_twice_is_converted_once() -> None:
    graph = fx.Graph()
    x = put(graph, "placeholder", "x", (), info(4, 8))
    a = put(graph, "call_function", aten.exp.default, (x,), info(4, 8))
    b = put(graph, "call_function", aten.sin.default, (x,), info(4, 8))
    graph.output((a, b))
    nodes = {"x": NodePlan((), (plain(0, 4),), ""), "exp": NodePlan((R,), (R,), ""), "sin": NodePlan((R,), (R,), "")}
    new = Lower(AxisPlan("tp", 2, nodes, (I, I)), Axis("tp", 2, 0, "group"))(graph)
    assert calls(new)[:3] == ["s_to_r = s_to_r(x, 0, 1, ((4, 1),))", "exp = exp(s_to_r)", "sin = sin(s_to_r)"]


def test_a_mean_over_a_cut_dim_divides_by_the_global_count() -> None:
    graph = fx.Graph()
    x = put(graph, "placeholder", "x", (), info(6, 8))
    y = put(graph, "call_function", aten.mean.dim, (x, [0]), info(8))
    graph.output((y,))
    nodes = {"x": NodePlan((), (plain(0, 6),), ""), "mean": NodePlan((plain(0, 6),), (P,), "")}
    new = Lower(AxisPlan("dp", 3, nodes, (I,)), Axis("dp", 3, 1, "group"))(graph)
    assert calls(new) == ["sum = sum(x, [0], False)", f"mul = mul(sum, {1 / 6})", "p_to_i = p_to_i(mul)"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slice_is_cut_at_the_rank_s_own_bounds(rank: int) -> None:
    """x[2:8] of 10, as segments 2 | 6 | 2, each cut in two: rank 0 holds 0, 2 3 4, 8; rank 1 holds 1, 5 6 7, 9."""
    cut = Shard(0, 1, ((2, 1), (6, 1), (2, 1)))
    graph = fx.Graph()
    x = put(graph, "placeholder", "x", (), info(10))
    y = put(graph, "call_function", aten.slice.Tensor, (x, 0, 2, 8), info(6))
    graph.output((y,))
    nodes = {"x": NodePlan((), (cut,), ""), y.name: NodePlan((cut,), (plain(0, 6),), "")}
    new = Lower(AxisPlan("tp", 2, nodes, (plain(0, 6),)), Axis("tp", 2, rank, "group"))(graph)
    (call,) = (n for n in new.nodes if n.op == "call_function")
    held = torch.cat([torch.arange(10)[a:b] for a, b in cut.ranges(2, rank)])
    assert held[call.args[2] : call.args[3]].tolist() == torch.arange(2, 8).chunk(2)[rank].tolist()
