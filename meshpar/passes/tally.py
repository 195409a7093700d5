"""Experts' loads are noted where rows are dispatched.

before                                       after
  x, ends, perm = dispatch(h, index, 8)        at = slot(expert_tally, "layers.0.experts", ("dp",))     in the root
                                               x, ends, perm = load.dispatch(h, index, 8, at)

`expert_tally` is one more input of the graph: a `Tally`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from meshpar.graph.facts import Extra, Facts, facts, set_facts
from meshpar.ops import load
from meshpar.passes.inputs import add_input


@dataclass(frozen=True)
class TallyExperts:
    """Note the load of every expert. Changes the graph in place."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        nodes = [n for n in graph.nodes if n.target is torch.ops.meshpar.dispatch.default]
        if not nodes:
            return graph
        tally = add_input(graph, Extra.EXPERT_TALLY)
        taken: dict[str, int] = {}
        for node in nodes:
            name = str(facts(node).module or node.name)
            taken[name] = taken.get(name, 0) + 1
            with graph.inserting_after(tally):
                place = name if taken[name] == 1 else f"{name}#{taken[name]}"
                at = graph.call_function(load.slot, (tally, place, facts(node).cut))
            set_facts(at, Facts(module=""))
            node.target, node.args = load.dispatch, (*node.args[:3], at, *node.args[3:])
        return graph
