"""What a graph is handed beside the batch. An extra input says by a fact what it is: a tensor of the batch may have any name.

forward(x, random_key)              graph(x, random_key, random_key_1)         random_key_1: Extra.RANDOM_KEY
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

from torch import fx

from meshpar.graph.facts import Extra, Facts, facts, set_facts


@dataclass(frozen=True, slots=True)
class ExtraInputs:
    """The names of a graph's extra inputs; None of a kind that it does not take."""

    denominators: tuple[str, ...] = ()
    random_key: str | None = None
    expert_tally: str | None = None
    weight_gradients: str | None = None


def extra_inputs(graph: fx.Graph) -> ExtraInputs:
    """The extra inputs of a graph, or of a stage of it."""
    found: dict[Extra, list[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and (kind := facts(node).extra) is not None:
            found.setdefault(kind, []).append(str(node.target))
    key, tally, queue = (next(iter(found.get(kind, ())), None) for kind in (Extra.RANDOM_KEY, Extra.EXPERT_TALLY, Extra.WEIGHT_GRADIENTS))
    return ExtraInputs(tuple(found.get(Extra.DENOMINATOR, ())), key, tally, queue)


def add_input(graph: fx.Graph, kind: Extra, known: Facts | None = None) -> fx.Node:
    """A new placeholder, after the others. `known`: what it gives and where it is used; else it has no shape and belongs to the model."""
    nodes = list(graph.nodes)
    last = [n for n in nodes if n.op == "placeholder"][-1]
    taken = {str(n.target) for n in nodes if n.op == "placeholder"} | {n.name for n in nodes}
    numbered = (f"{kind.value}_{i}" for i in count(1 if kind != Extra.DENOMINATOR else 0))
    names = numbered if kind == Extra.DENOMINATOR else (name for one in ((kind.value,), numbered) for name in one)
    with graph.inserting_after(last):
        made = graph.placeholder(next(name for name in names if name not in taken))
    return set_facts(made, replace(known or Facts(module=""), extra=kind))
