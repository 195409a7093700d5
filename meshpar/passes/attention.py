"""Causal attention without a mask, grouped heads without copies: what models do themselves, except while they are captured.

    before                                                    after
      mask = expand(le(arange(s), arange(s)[:, None]), ...)     y = sdpa(q, k, v, None, 0.0, True, enable_gqa=True)
      k' = reshape(expand(unsqueeze(k, 2), ...), ...)
      v' = reshape(expand(unsqueeze(v, 2), ...), ...)
      y = sdpa(q, k', v', mask)

A model that looks at its mask to see whether it may be left out cannot do so under capture, and writes a plain causal mask out. With it the
fast kernels are out of reach, and keys and values of grouped heads are repeated before the call. What a mask that comes from numbers alone
lets each query see is read here, of any length where that is an interval (see `passes.intervals`), else from all of it. It is done after
lowering, where it changes neither types nor the plan; before it where an axis cuts the sequence: a part of a causal mask is not causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from meshpar._torch import OpOverload, without_modes
from meshpar.graph.facts import Info, facts, info_of
from meshpar.graph.op import operands, read
from meshpar.ops.context import grouped_attention
from meshpar.ops.halo import windowed_attention
from meshpar.passes.erase import erase_unused
from meshpar.passes.intervals import intervals

aten = torch.ops.aten


@dataclass(frozen=True)
class SimplifyAttention:
    """Replace constant causal masks by `is_causal`, and then repeated keys and values by `enable_gqa`. Changes the graph in place."""

    windows: bool = False
    """Whether an axis cuts the sequence: sliding windows are written as such, and heads are not repeated under other masks either."""
    most_elements: int = 2**26
    """Masks larger than this are not looked at in full."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        known: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            arguments = read(node).arguments
            mask = arguments["attn_mask"]
            if not isinstance(mask, fx.Node) or arguments["is_causal"] or (arguments["dropout_p"] and facts(node).part_of is None):
                continue
            lengths = info_of(arguments["query"]).shape[-2], info_of(arguments["key"]).shape[-2]
            if mask not in known:
                known[mask] = self._is_causal(mask, *lengths)
            if self.windows and not known[mask] and (seen := intervals(mask)) is not None and seen.window is not None:
                _in_window(node, arguments, seen.window)
            elif known[mask] and info_of(mask).shape[-2:] == lengths:
                _without_mask(node, arguments)
            elif self.windows and not arguments["dropout_p"]:
                _in_groups(node, arguments)
        return graph

    def _is_causal(self, mask: fx.Node, queries: int, keys: int) -> bool:
        """Whether the mask is known and lets every position see itself and what is before it."""
        info = info_of(mask)
        if info.dtype == torch.bool and info.shape[-2:] == (queries, keys) and (found := intervals(mask)) is not None:
            return found.is_causal
        nodes = self._constants(mask) if info.dtype == torch.bool and info.shape[-2:] == (queries, keys) else None
        if nodes is None:
            return False
        with without_modes(), torch.no_grad():
            values: dict[fx.Node, Any] = {}
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))  # type: ignore[operator]
            value = values[mask]
            return bool((value == torch.ones(queries, keys, dtype=torch.bool).tril()).all())

    def _constants(self, mask: fx.Node) -> list[fx.Node] | None:
        """All nodes the mask is computed from, in order, if those are operators on numbers alone and of moderate size."""
        found: dict[fx.Node, None] = {}
        todo = [mask]
        while todo:
            node = todo.pop()
            if node in found:
                continue
            info = facts(node).info
            if node.op != "call_function" or not isinstance(node.target, OpOverload) or facts(node).seed is not None:
                return None
            if node.target.namespace != "aten" or not isinstance(info, Info) or _elements(node, info) > self.most_elements:
                return None
            found[node] = None
            todo += operands(node)
        return [node for node in mask.graph.nodes if node in found]


def _elements(node: fx.Node, info: Info) -> int:
    return 0 if node.target is aten.expand.default else prod(info.shape)


def _without_mask(node: fx.Node, arguments: dict[str, Any]) -> None:
    before = operands(node)
    key, value, grouped = _short(arguments)
    node.args = (arguments["query"], key, value, None, arguments["dropout_p"], True)
    node.kwargs = {"scale": arguments["scale"], "enable_gqa": grouped}
    for operand in before:
        erase_unused(operand)


def _in_window(node: fx.Node, arguments: dict[str, Any], window: int) -> None:
    before = operands(node)
    key, value, grouped = _short(arguments)
    node.target, node.args = windowed_attention, (arguments["query"], key, value)
    node.kwargs = {"window": window, "scale": arguments["scale"], "enable_gqa": grouped}
    for operand in before:
        erase_unused(operand)


def _in_groups(node: fx.Node, arguments: dict[str, Any]) -> None:
    """Heads of keys and values are not repeated, unless the mask tells them apart."""
    before = operands(node)
    key, value, grouped = _short(arguments)
    mask = arguments["attn_mask"]
    if not grouped or info_of(mask).shape[-3:-2] not in ((), (1,)):
        return
    node.target, node.args = grouped_attention, (arguments["query"], key, value)
    node.kwargs = {"attn_mask": mask, "is_causal": False, "scale": arguments["scale"], "enable_gqa": True}
    for operand in before:
        erase_unused(operand)


def _short(arguments: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Keys and values, of grouped heads without copies, and whether heads are grouped."""
    key, value = arguments["key"], arguments["value"]
    short = ungrouped(key), ungrouped(value)
    if short[0] is not None and short[1] is not None and info_of(short[0]).shape[1] == info_of(short[1]).shape[1]:
        return *short, True
    return key, value, bool(arguments["enable_gqa"])


def ungrouped(repeated: fx.Node) -> fx.Node | None:
    """`k [b, g, s, e]` where `repeated` is k with each head n times in a row, `[b, g n, s, e]`."""
    if repeated.target is aten.repeat_interleave.self_int and len(repeated.args) > 2 and repeated.args[2] in (1, -3):
        return repeated.args[0] if len(info_of(repeated).shape) == 4 else None  # type: ignore[return-value]
    expanded = repeated.args[0] if repeated.target is aten.reshape.default else None
    wide = expanded.args[0] if isinstance(expanded, fx.Node) and expanded.target is aten.expand.default else None
    if not isinstance(wide, fx.Node) or wide.target is not aten.unsqueeze.default or wide.args[1] != 2:
        return None
    original = wide.args[0]
    assert isinstance(expanded, fx.Node) and isinstance(original, fx.Node)
    shape, long = info_of(original).shape, info_of(expanded).shape
    if len(shape) != 4 or (long[0], long[1], long[3], long[4]) != shape:
        return None
    return original if info_of(repeated).shape == (shape[0], shape[1] * long[2], *shape[2:]) else None
