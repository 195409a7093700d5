"""Random operators get their seed from their place: equal on replicas, different on shards, the same again when recomputed.

    before                                after, with x cut on tp
      y = native_dropout(x, 0.1, True)      y = native_dropout(x, 0.1, True, key=random_key, number=0, shards=(("tp group", 2, 0),))

`random_key` is one more input of the graph, an integer that the runtime changes with every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from meshpar.graph.facts import Extra, Facts, PartOf, facts, infos_of, set_facts
from meshpar.mesh import Axis
from meshpar.ops.random import Part, derive, drawn
from meshpar.passes.inputs import add_input
from meshpar.roles import ROLES
from meshpar.sharding.types import Shard


@dataclass(frozen=True)
class SeedRandom:
    """Seed every node that capture marked with a number (`Facts.seed`)."""

    axes: Sequence[Axis]

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        nodes = [n for n in graph.nodes if n.op == "call_function" and facts(n).seed is not None]
        if not nodes:
            return graph
        key = add_input(graph, Extra.RANDOM_KEY)
        by_region: dict[str | None, list[fx.Node]] = {}
        for node in nodes:
            by_region.setdefault(facts(node).region, []).append(node)
        for place, (region, members) in enumerate(by_region.items()):
            own = key if region is None else self._derived(graph, key, place)
            for number, node in enumerate(members):
                self._seed(node, own, number)
        return graph

    def _derived(self, graph: fx.Graph, key: fx.Node, place: int) -> fx.Node:
        """A block gets a key of its own, so that blocks of one structure keep one code."""
        with graph.inserting_after(key):
            own = graph.call_function(derive, (key, place))
        return set_facts(own, Facts(module=""))

    def _seed(self, node: fx.Node, key: fx.Node, number: int) -> None:
        assert callable(node.target)
        target, leading = drawn(node.target)
        parts = {} if leading else self._parts(node)
        shards = tuple((a.group, a.size, a.rank) for a in self.axes if a.name in facts(node).cut and a.name not in parts)
        node.target = target
        node.args = (*leading, *node.args)
        node.kwargs = {**node.kwargs, "key": key, "number": number, "shards": shards}
        for part in parts.values():
            node.kwargs = {**node.kwargs, "part": part}

    def _parts(self, node: fx.Node) -> dict[str, Part]:
        """The axis that cuts the sequence of a value -> the part of it that a rank has, where no other axis cuts the same dim again."""
        typed = {name: outs[0] for name, _, outs in (facts(node).part_of or PartOf("")).typed}
        for a in self.axes:
            cut = typed.get(a.name) if ROLES[a.name].divides == "sequence" else None
            if isinstance(cut, Shard) and (info := infos_of(node)[0]) and info.shape[cut.dim] == cut.local_length(a.size, max(a.rank, 0)):
                return {a.name: (cut.dim, cut.repeat, cut.segments, a.group, a.size, a.rank)}
        return {}
