"""The last look at a captured graph: what still mutates or depends on data is refused, what draws random numbers is numbered."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from meshpar._torch import OpOverload, pytree
from meshpar.errors import CaptureError
from meshpar.graph.facts import DataSized, Info, facts, set_facts
from meshpar.graph.operators import draws

aten = torch.ops.aten


def refuse(graph: fx.Graph) -> None:
    """Raise CaptureError, once, for every operator that a functional graph of fixed shapes cannot hold."""
    found = [(node, reason) for node in graph.nodes if node.op == "call_function" for reason in [_objection(node)] if reason]
    if not found:
        return
    lines = [
        f"  {node.target} in {facts(node).module or 'the model'} ({facts(node).source or 'source unknown'}): {reason}."
        for node, reason in found
    ]
    modules = tuple(dict.fromkeys(facts(node).module or "" for node, _ in found))
    raise CaptureError("\n".join(["The forward cannot become a graph of fixed shapes:", *dict.fromkeys(lines)]), modules=modules)


def _objection(node: fx.Node) -> str | None:
    if isinstance(node.target, OpOverload) and node.target.namespace in _SENDING and "wait" not in str(node.target):
        return (
            "it sends to other processes, but a graph is of the whole batch, as one process computes it. Leave it out where "
            "torch.distributed.is_initialized() says no, as it does while a forward is captured"
        )
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return "it overwrites a tensor; write y = x.op() instead of x.op_()"
    if node.target is aten.as_strided_scatter.default:
        return "it writes through as_strided; write to slices or indices instead"
    if len(dtypes := _multiplied(node)) > 1:
        return (
            f"torch does not multiply {' by '.join(dtypes)}, on one device either; cast one of them in the model, as x.to(weight.dtype)."
            " Under Precision(compute_dtype=...) parameters and inputs are cast, buffers and numbers written in the forward are not"
        )
    info = facts(node).info
    if not (isinstance(info, Info) or (isinstance(info, tuple) and all(i is None or isinstance(i, Info) for i in info))):
        if not isinstance(info, DataSized) and "item" in str(node.target):
            return "it makes a Python number of a value that the model computes; leave it a tensor (x * scale, not x * scale.item())"
        return (
            "its result, or the size of it, depends on values; use torch.where, masked_fill or a fixed size, or pass numbers as arguments"
        )
    return None


_SENDING = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
"""Namespaces of torch's collectives."""


def _multiplied(node: fx.Node) -> tuple[str, ...]:
    """The floating dtypes that a product multiplies. Fake tensors are not asked to have one, real ones are."""
    count = _ONE_DTYPE.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return ()
    infos = [facts(value).info for value in pytree.tree_leaves(node.args) if isinstance(value, fx.Node)][:count]
    return tuple(dict.fromkeys(str(i.dtype).removeprefix("torch.") for i in infos if isinstance(i, Info) and i.dtype.is_floating_point))


_ONE_DTYPE: dict[object, int] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.matmul, aten.einsum, aten._grouped_mm), 2),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv, aten.linear, aten.scaled_dot_product_attention), 3),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), 3),
    **dict.fromkeys((aten.convolution, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), 2),
}
"""Operators -> how many of their first operands torch wants in one dtype."""


def number_seeds(graph: fx.Graph) -> None:
    """Set the `seed` 0, 1, ... of the nodes that draw random numbers."""
    count = 0
    for node in graph.nodes:
        if node.op == "call_function" and draws(node):
            set_facts(node, replace(facts(node), seed=count))
            count += 1
