"""Convolutions along positions that give one result for every so many positions, written as such.

    before                                          after
      y = conv1d(x, w, b, padding=[3])  [b, c, s+3]     y = convolved(x, w, b, left=3)    [b, c, s]
      z = slice(y, 2, 0, s)             [b, c, s]

What is cut off, or put before it, is part of it then: positions stay positions, so that an axis that cuts the sequence can cut them before
and after. Done before anything is decided, where there is such an axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.graph.op import operands, read
from meshpar.ops.convolution import convolved
from meshpar.passes.erase import erase_unused
from meshpar.sharding.rules import by_position
from meshpar.sharding.views import slice_bounds

aten = torch.ops.aten


@dataclass(frozen=True)
class AlignConvolutions:
    """Write convolutions along positions as `convolved`, with the padding before and the slice after them. Changes the graph in place."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            if node.op == "call_function" and (found := _read(node)) is not None:
                _rewrite(node, found)
        return graph


@dataclass(frozen=True)
class _Padded:
    """A convolution of `x` with `left` zeros before it: result j begins at position `j * stride - left`."""

    x: fx.Node
    left: int
    stride: int
    dilation: int
    groups: int


def _read(node: fx.Node) -> _Padded | None:
    """A convolution along one dim with zeros around."""
    if node.target not in (aten.conv1d.default, aten.conv1d.padding, aten.convolution.default):
        return None
    op = read(node)
    a = op.arguments
    if len(op.shapes[0]) != 3 or a.get("transposed") or by_position(op):
        return None
    stride, dilation = _number(a["stride"]), _number(a["dilation"])
    reach = dilation * (op.shapes[1][-1] - 1)
    padding = {"same": reach // 2, "valid": 0}[a["padding"]] if isinstance(a["padding"], str) else _number(a["padding"])
    x, left = a["input"], padding
    if (before := _zeros_before(x)) is not None and (padding == 0 or min(before[1]) >= 0):
        x, left = before[0], padding + before[1][0]
    return _Padded(x, left, stride, dilation, int(a["groups"]))


def _number(given: Any) -> int:
    return int(given[0]) if isinstance(given, (list, tuple)) else int(given)


def _zeros_before(x: fx.Node) -> tuple[fx.Node, tuple[int, int]] | None:
    """The value that is padded with zeros along its last dim, and how many come before and after it."""
    if x.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return None
    a = read(x).arguments
    pad = [*a["pad"], 0, 0]
    if a.get("mode", "constant") != "constant" or a.get("value") or any(pad[2:]):
        return None
    return a["self"], (pad[0], pad[1])


def _rewrite(node: fx.Node, found: _Padded) -> None:
    length = info_of(found.x).shape[-1]
    for user in list(node.users):
        bounds = _sliced(user)
        if bounds is not None and (bounds[1] - bounds[0]) * found.stride == length:
            _replace(user, node, found, found.left - bounds[0] * found.stride)
    if node.users and info_of(node).shape[-1] * found.stride == length:
        _replace(node, node, found, found.left)


def _sliced(node: fx.Node) -> tuple[int, int] | None:
    """The bounds of a slice of the last dim."""
    if node.target is not aten.slice.Tensor:
        return None
    op = read(node)
    return slice_bounds(op) if op.dim() == len(op.shapes[0]) - 1 else None


def _replace(node: fx.Node, convolution: fx.Node, found: _Padded, left: int) -> None:
    """`node` is the convolution of as many results as there are positions."""
    before = operands(node)
    weight, bias = (read(convolution).arguments.get(name) for name in ("weight", "bias"))
    set_facts(node, replace(facts(convolution), info=info_of(node)))
    node.target, node.args = convolved, (found.x, weight, *([] if bias is None else [bias]))
    node.kwargs = {"left": left, "stride": found.stride, "dilation": found.dilation, "groups": found.groups}
    for one in before:
        erase_unused(one)
