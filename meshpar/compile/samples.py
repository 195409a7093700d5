"""Which values that are cut over a data axis hold this rank's samples: those of the batch, and what follows from parts of it alone.

What was gathered, exchanged or cut anew on the way holds other things: features of all samples, or rows in another order.
"""

from __future__ import annotations

import operator

from torch import fx

from meshpar.graph.op import Value, operands, value_of
from meshpar.plan import AxisPlan
from meshpar.sharding.types import Shard, Type


def of_own_samples(graph: fx.Graph, plan: AxisPlan) -> tuple[bool, ...]:
    """For every output of a captured graph: whether the part of it that a rank holds is what the model gives for the rank's samples."""
    types: dict[Value, Type] = {}
    own: set[Value] = set()
    for node in graph.nodes:
        found = plan.nodes.get(node.name)
        if found is None or node.target is operator.getitem:
            continue
        sources = [value_of(one) for one in operands(node)] if node.op == "call_function" else []
        follows = any(use == types.get(v) and v in own for use, v in zip(found.uses, sources, strict=False) if isinstance(use, Shard))
        cut = [(use, types.get(v)) for use, v in zip(found.uses, sources, strict=False) if isinstance(use, Shard)]
        exchanged = any(isinstance(type_, Shard) and use != type_ for use, type_ in cut)
        for index, type_ in enumerate(found.outs):
            handed = found.handed[index] if found.handed else None
            types[node, index] = handed or type_
            if isinstance(type_, Shard) and (node.op == "placeholder" or (follows and not exchanged)) and handed in (None, type_):
                own.add((node, index))
    last = next(n for n in reversed(graph.nodes) if n.op == "output")
    values = [value_of(v) if isinstance(v, fx.Node) else None for v in last.args[0]]
    return tuple(v in own and types[v] == type_ for v, type_ in zip(values, plan.outputs, strict=True))
