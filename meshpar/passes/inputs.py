"""One more input of a graph: what the runtime hands in beside the batch."""

from __future__ import annotations

from torch import fx

from meshpar.graph.facts import Facts, set_facts


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """A new placeholder called `name`, after the others; it belongs to no module and has no shape."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    return set_facts(made, Facts(module=""))
