"""Where gradients flow: no_grad sections become detaches, and every value learns whether it needs a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from meshpar._torch import OpOverload
from meshpar.capture.captured import Info

_SET_GRAD = "wrap_with_set_grad_enabled"

STOPS: frozenset[str] = frozenset(
    {
        "aten::detach",
        "aten::zeros_like",
        "aten::ones_like",
        "aten::full_like",
        "aten::empty_like",
        "aten::rand_like",
        "aten::randn_like",
        "aten::randint_like",
        "aten::new_zeros",
        "aten::new_ones",
        "aten::new_full",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
"""Floating operators whose result needs no gradient although an operand does."""


def inline(module: fx.GraphModule) -> None:
    """Inline the sub-graphs that export makes of `torch.no_grad()` sections; what enters such a section is detached.

    y = no_grad_section(w, x)     ->     w_, x_ = detach(w), detach(x);  y = <the section on w_, x_>
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and str(node.target) == _SET_GRAD:
            _Section(module, node).inline()
    module.graph.eliminate_dead_code()
    module.recompile()


class _Section:
    """One section with gradients switched on or off, and the sections inside it."""

    def __init__(self, owner: fx.GraphModule, call: fx.Node) -> None:
        self.owner = owner
        self.call = call

    def inline(self) -> None:
        enabled, body, *operands = self.call.args
        graph = self.call.graph
        with graph.inserting_before(self.call):
            results = _copy(graph, _submodule(self.owner, body), {}, list(operands), enabled=bool(enabled))
        for user in list(self.call.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(self.call)


def _submodule(owner: fx.GraphModule, body: Any) -> fx.GraphModule:
    found = owner.get_submodule(str(body.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _copy(graph: fx.Graph, section: fx.GraphModule, raw: dict[fx.Node, Any], operands: list[Any], *, enabled: bool) -> list[Any]:
    """Copy the nodes of `section` to the insertion point of `graph`; returns its results.

    `raw` holds each value as it was before any detach, for sections inside this one that switch gradients on again.
    """
    used: dict[fx.Node, Any] = {}
    items: dict[fx.Node, list[Any]] = {}
    placeholders = iter(operands)
    for node in section.graph.nodes:
        if node.op == "placeholder":
            raw[node] = next(placeholders)
            used[node] = raw[node] if enabled else _detached(graph, raw[node])
        elif node.op == "output":
            return [raw[value] if isinstance(value, fx.Node) else value for value in node.args[0]]
        elif str(node.target) == _SET_GRAD:
            inner_enabled, body, *inner = node.args
            items[node] = _copy(graph, _submodule(section, body), raw, [raw[value] for value in inner], enabled=bool(inner_enabled))
        elif node.op == "call_function" and node.args and node.args[0] in items:
            raw[node] = used[node] = items[node.args[0]][node.args[1]]
        elif node.op != "get_attr":
            raw[node] = used[node] = graph.node_copy(node, lambda value: used[value])
    raise AssertionError("a section without an output")


def _detached(graph: fx.Graph, value: Any) -> Any:
    """`value` cut off from its gradient, if it can have one."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()) or value.name.startswith("b_"):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update(value.meta)
    return node


def propagate(graph: fx.Graph, leaves: Mapping[str, bool]) -> None:
    """Set `requires_grad` of every `Info` in `graph`, given that of the placeholders and `get_attr` targets."""
    for node in graph.nodes:
        info = node.meta.get("info")
        if info is None:
            continue
        if node.op in ("placeholder", "get_attr"):
            needs = leaves.get(str(node.target), False)
        else:
            needs = not _stops(node) and any(_needs(source, node) for source in node.all_input_nodes)
        node.meta["info"] = tuple(_with(i, needs) for i in info) if isinstance(info, tuple) else _with(info, needs)


def _stops(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.name in STOPS


def _needs(source: fx.Node, node: fx.Node) -> bool:
    info = source.meta.get("info")
    if not isinstance(info, tuple):
        return info is not None and info.requires_grad
    index = node.args[1] if len(node.args) > 1 else None
    picked = [info[index]] if isinstance(index, int) else info
    return any(i is not None and i.requires_grad for i in picked)


def _with(info: Info | None, needs: bool) -> Info | None:
    if info is None:
        return None
    return Info(info.shape, info.dtype, needs and (info.dtype.is_floating_point or info.dtype.is_complex))
