"""run(): a captured graph on real tensors, node by node, exactly as captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from meshpar.graph.captured import Captured


def run(captured: Captured, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The values of the output node, for parameters and buffers by their names in `state` and the tensors of the batch in `inputs`.

    >>> run(captured, dict(model.named_parameters()) | dict(model.named_buffers()), batch)[captured.loss]     # doctest: +SKIP
    """
    values: dict[fx.Node, Any] = {}
    for node in captured.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = _attribute(captured, state, str(node.target))
        elif node.op == "output":
            return tuple(args[0])
        else:
            values[node] = node.target(*args, **kwargs)
        for source in node.all_input_nodes:
            if _last_user(source) is node:
                del values[source]
    raise AssertionError("a graph without an output")


def _attribute(captured: Captured, state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return state[name] if name in state else captured.constants[name]


def _last_user(node: fx.Node) -> fx.Node:
    return max(node.users)
