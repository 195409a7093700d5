"""Tensors of one value that are made after an example: of its sizes alone, so that what is cut of one says nothing of the other.

    state = zeros_like(x[:, 0])   [b, 32]    ->    state = zeros([b, 32])

The example of a recurrence's first state is often the residual stream, whose channels are not cut; those of the state are cut with the
keys and values that it holds, of which there happen to be as many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.graph.op import operands, read

aten = torch.ops.aten

_MADE: dict[Any, Any] = {
    aten.zeros_like.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.full_like.default: aten.full.default,
    aten.empty_like.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}
"""Operators that read nothing of their first operand but size, type and device -> those that are told."""


def with_device(node: fx.Node) -> dict[str, Any]:
    """The keyword arguments of an exported call, with the device where it would be that of an example."""
    given = dict(node.kwargs)
    return given | {"device": node.meta["val"].device} if node.target in _MADE and given.get("device") is None else given


def forget(graph: fx.Graph) -> None:
    """Rewrite every such call whose example has a gradient, in place: ones after labels may count them.

    Not of rows sorted by expert, of which a rank has as many as come to it (see `graph.rows`).
    """
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _MADE and not info_of(n).rows]:
        if not info_of(operands(node)[0]).requires_grad:
            continue
        info, arguments = info_of(node), read(node).arguments
        value = (arguments["fill_value"],) if "fill_value" in arguments else ()
        with graph.inserting_before(node):
            how = {"dtype": info.dtype, "device": node.kwargs["device"]}
            new = set_facts(graph.call_function(_MADE[node.target], (list(info.shape), *value), how), facts(node))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()
