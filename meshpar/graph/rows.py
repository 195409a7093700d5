"""Which values hold rows sorted by expert: what comes out of `dispatch`, and all that is computed from it up to `combine`.

Their order is that of the tokens a rank has: cutting tokens cuts them, but the parts put together are not the whole. So they are never
converted, and only what treats rows alike may touch them while they are cut.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from meshpar.graph.facts import facts, gives_several, infos_of, set_facts

_FIRST = torch.ops.meshpar.dispatch.default
_LAST = torch.ops.meshpar.combine.default


def mark(graph: fx.Graph) -> None:
    """Set `rows` in the `Info` of every such value."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is _LAST:
            continue
        if node.target is _FIRST or any(source in found for source in node.all_input_nodes):
            found.add(node)
            marked = tuple(info and replace(info, rows=True) for info in infos_of(node))
            set_facts(node, replace(facts(node), info=marked if gives_several(node) else marked[0]))
