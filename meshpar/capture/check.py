"""The last look at a captured graph: what still mutates or depends on data is refused, what draws random numbers is numbered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from meshpar._torch import OpOverload
from meshpar.capture.captured import Info
from meshpar.errors import CaptureError

aten = torch.ops.aten


def refuse(graph: fx.Graph) -> None:
    """Raise CaptureError, once, for every operator that a functional graph of fixed shapes cannot hold."""
    found = [(node, reason) for node in graph.nodes if node.op == "call_function" for reason in [_objection(node)] if reason]
    if not found:
        return
    lines = [
        f"  {node.target} in {node.meta['module'] or 'the model'} ({node.meta['source'] or 'source unknown'}): {reason}."
        for node, reason in found
    ]
    raise CaptureError("\n".join(["The forward cannot become a graph of fixed shapes:", *dict.fromkeys(lines)]))


def _objection(node: fx.Node) -> str | None:
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return "it overwrites a tensor; write y = x.op() instead of x.op_()"
    if node.target is aten.as_strided_scatter.default:
        return "it writes through as_strided; write to slices or indices instead"
    info = node.meta.get("info")
    if not (isinstance(info, Info) or (isinstance(info, tuple) and all(i is None or isinstance(i, Info) for i in info))):
        return (
            "its result, or the size of it, depends on values; use torch.where, masked_fill or a fixed size, or pass numbers as arguments"
        )
    return None


def number_seeds(graph: fx.Graph) -> None:
    """Set `node.meta["seed"]` = 0, 1, ... on the nodes that draw random numbers."""
    count = 0
    for node in graph.nodes:
        if node.op == "call_function" and draws(node):
            node.meta["seed"] = count
            count += 1


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    dropout = _DROPOUT.get(node.target)
    if dropout is not None:
        position, name = dropout
        probability = node.args[position] if len(node.args) > position else node.kwargs.get(name, 0.0)
        return isinstance(probability, fx.Node) or bool(probability != 0)
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


_DROPOUT: Mapping[Any, tuple[int, str]] = {
    aten.dropout.default: (1, "p"),
    aten.native_dropout.default: (1, "p"),
    aten.feature_dropout.default: (1, "p"),
    aten.alpha_dropout.default: (1, "p"),
    aten.feature_alpha_dropout.default: (1, "p"),
    aten.scaled_dot_product_attention.default: (4, "dropout_p"),
}
"""Operators that draw only with a probability above zero -> its position and name."""
