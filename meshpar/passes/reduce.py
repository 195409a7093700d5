"""Sum the pending gradients of parameters in the graph itself, where no runtime does it (simulated ranks).

before                       after
  w = get_attr("weight")       w   = get_attr("weight")
  y = linear(x, w)             w_r = i_to_r(w, group="dp", ...)         backward: all-reduce
                               y   = linear(x, w_r)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from meshpar.graph.facts import Change, facts, info_of, set_facts
from meshpar.mesh import Axis
from meshpar.ops import collectives
from meshpar.sharding.types import I, R


@dataclass(frozen=True)
class ReduceGradients:
    """Make every trainable parameter invariant on a data axis: its gradient is summed before it arrives."""

    axis: Axis
    parameters: frozenset[str]

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            if node.op == "get_attr" and node.target in self.parameters and info_of(node).requires_grad:
                self._reduce(graph, node)
        return graph

    def _reduce(self, graph: fx.Graph, node: fx.Node) -> None:
        info = info_of(node)
        by_region: dict[str | None, list[fx.Node]] = {}
        for user in list(node.users):
            by_region.setdefault(facts(user).region, []).append(user)
        for region, users in by_region.items():
            with graph.inserting_before(min(users)):
                summed = graph.call_function(
                    collectives.i_to_r, (node,), {"group": self.axis.group, "size": self.axis.size, "rank": self.axis.rank}
                )
            change = Change(self.axis.name, self.axis.size, I, R, info)
            set_facts(summed, facts(node).converted(change, info, at=replace(facts(node), region=region)))
            for user in users:
                user.replace_input_with(node, summed)
