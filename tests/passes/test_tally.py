"""Loads of experts: one more input, a place for every module, names apart from the blocks' code."""

from __future__ import annotations

import operator

import torch
from torch import fx

from meshpar.graph.facts import Facts, facts, set_facts
from meshpar.ops import load
from meshpar.passes.inputs import extra_inputs
from meshpar.passes.tally import TallyExperts


def graph_of(modules: list[str]) -> fx.Graph:
    graph = fx.Graph()
    h, index = graph.placeholder("h"), graph.placeholder("index")
    found = []
    for name in modules:
        node = graph.call_function(torch.ops.meshpar.dispatch.default, (h, index, 3))
        set_facts(node, Facts(module=name, region=name))
        found.append(graph.call_function(operator.getitem, (node, 0)))
    graph.output(tuple(found))
    return graph


def test_every_dispatch_notes_its_ends() -> None:
    graph = TallyExperts()(graph_of(["a", "b", "b"]))
    assert [n.target for n in graph.nodes if n.op == "placeholder"] == ["h", "index", extra_inputs(graph).expert_tally]
    tally = load.Tally()
    run = fx.GraphModule(torch.nn.Module(), graph)
    run(torch.randn(4, 2), torch.tensor([[0], [2], [2], [0]]), tally)
    assert {name: load.rows(ends).tolist() for name, ends in tally.ends.items()} == {key: [2, 0, 2] for key in ("a", "b", "b#2")}


def test_blocks_do_not_hold_names() -> None:
    for node in TallyExperts()(graph_of(["a", "b"])).nodes:
        if facts(node).region:
            assert not any(isinstance(arg, str) for arg in node.args)


def test_a_graph_without_experts_is_left_alone() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    assert [n.op for n in TallyExperts()(graph).nodes] == ["placeholder", "output"]
