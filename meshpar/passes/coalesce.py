"""Gradients of small parameters travel together: one all-reduce per block instead of one per norm weight.

before                                   after
  a = i_to_r(norm1.weight)                 many = i_to_r_many(norm1.weight, norm2.weight)
  ...                                      a = many[0]
  b = i_to_r(norm2.weight)                 b = many[1]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.ops import collectives


@dataclass(frozen=True)
class Coalesce:
    """Join the invariant-to-replicate conversions of parameters, per block and axis. Names in `parameters` are `get_attr` targets."""

    parameters: frozenset[str]
    most_bytes: int = 4 * 2**20
    """Parameters larger than this keep their own collective: concatenating them would cost a copy."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target is collectives.i_to_r and self._is_small_parameter(node.args[0]):
                key = (facts(node).region, node.kwargs["group"], info_of(node).dtype)
                groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _join(graph, nodes)
        return graph

    def _is_small_parameter(self, value: object) -> bool:
        return (
            isinstance(value, fx.Node)
            and value.op == "get_attr"
            and value.target in self.parameters
            and info_of(value).nbytes <= self.most_bytes
        )


def _join(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    first = nodes[0]
    with graph.inserting_before(first):
        many = graph.call_function(collectives.i_to_r_many, tuple(n.args[0] for n in nodes), dict(first.kwargs))
        changes = tuple(change for n in nodes if (change := facts(n).conversion) is not None)
        set_facts(many, replace(facts(first).beside(tuple(info_of(n) for n in nodes)), cut=facts(first).cut, joined=changes))
        for index, node in enumerate(nodes):
            item = graph.call_function(operator.getitem, (many, index))
            node.replace_all_uses_with(set_facts(item, replace(facts(node), conversion=None)))
    for node in nodes:
        graph.erase_node(node)
