"""Positions moved by padding one side of a sequence and cutting the other, written as such.

    before                                              after
      y = constant_pad_nd(x, [0, 0, 1, -1])               y = shifted(x, dim=1, by=1)
      y = slice(constant_pad_nd(x, [0, 0, 1, 0]), 1, 0, s)
      y = cat([zeros([b, 1, c]), slice(x, 1, 0, s - 1)], 1)
      y = slice_scatter(zeros([b, s, c]), slice(x, 1, 0, s - 1), 1, 1, s)

Positions stay positions then, so that an axis that cuts the sequence can cut them before and after. Done before anything is decided, where
there is such an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import info_of
from meshpar.graph.op import operands, read
from meshpar.ops.shifts import shifted
from meshpar.passes.erase import erase_unused
from meshpar.sharding.views import slice_bounds

aten = torch.ops.aten


@dataclass(frozen=True)
class AlignShifts:
    """Write what moves positions as `shifted`. Changes the graph in place."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            reader = _READERS.get(node.target) if node.op == "call_function" and node.users else None
            found = reader(node) if reader is not None else None
            if found is not None and _moves(node, found):
                before = operands(node)
                node.target, node.args, node.kwargs = shifted, (found.x,), {"dim": found.dim, "by": found.by}
                for one in before:
                    erase_unused(one)
        return graph


@dataclass(frozen=True)
class _Shift:
    x: fx.Node
    dim: int
    by: int


def _moves(node: fx.Node, found: _Shift) -> bool:
    """Whether that is a shift of all there is, of numbers with a gradient (others are whole on every rank)."""
    info, before = info_of(node), info_of(found.x)
    same = (info.shape, info.dtype) == (before.shape, before.dtype) and info.requires_grad and not info.dtype.is_complex
    return same and 0 < abs(found.by) < info.shape[found.dim]


def _padded(node: fx.Node) -> _Shift | None:
    """As many zeros put on one side as are cut off at the other."""
    found = _padding(node)
    return None if found is None or found[2] != -found[3] else _Shift(*found[:3])


def _padding(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(value, dim, before, after) of a padding of one dim with zeros."""
    if node.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return None
    op = read(node)
    pad = list(op.arguments["pad"])
    places = sorted({place // 2 for place, amount in enumerate(pad) if amount})
    if op.arguments.get("mode", "constant") != "constant" or op.arguments.get("value") or len(places) != 1:
        return None
    at = places[0]
    return op.operands[0], len(op.out.shape) - 1 - at, pad[2 * at], pad[2 * at + 1]


def _sliced(node: fx.Node) -> _Shift | None:
    """Zeros put on one side, and as many positions taken as there were."""
    (padded,), bounds = operands(node), slice_bounds(read(node))
    found = _padding(padded) if padded.op == "call_function" else None
    if found is None or bounds is None or found[1] != read(node).dim() or min(found[2:]) < 0:
        return None
    return _Shift(found[0], found[1], found[2] - bounds[0])


def _joined(node: fx.Node) -> _Shift | None:
    """Zeros, and all but the last positions; or all but the first ones, and zeros."""
    op = read(node)
    dim = int(op.arguments.get("dim", 0)) % max(1, len(op.out.shape))
    if len(op.operands) != 2 or any(len(shape) != len(op.out.shape) for shape in op.shapes):
        return None
    first, second = op.operands
    for zeros, part, sign in ((first, second, 1), (second, first, -1)):
        few, taken = info_of(zeros).shape[dim], _part(part, dim)
        if _is_zero(zeros) and taken is not None and taken[1] == (0 if sign > 0 else few):
            return _Shift(taken[0], dim, sign * few)
    return None


def _written(node: fx.Node) -> _Shift | None:
    """All but the last positions, or all but the first ones, written into zeros."""
    op = read(node)
    target, part = op.operands
    dim, n = op.dim(), op.out.shape[op.dim()]
    start, stop, step = slice(op.arguments.get("start"), op.arguments.get("end"), op.arguments.get("step", 1)).indices(n)
    taken = _part(part, dim)
    if not _is_zero(target) or taken is None or step != 1 or (start and stop < n):
        return None
    by = start - taken[1]
    return _Shift(taken[0], dim, by) if abs(by) == n - (stop - start) and taken[1] == max(0, -by) else None


def _part(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """A slice along a dim: of what, and from where on."""
    if node.op != "call_function" or node.target is not aten.slice.Tensor or read(node).dim() != dim:
        return None
    bounds = slice_bounds(read(node))
    return None if bounds is None else (operands(node)[0], bounds[0])


def _is_zero(node: fx.Node) -> bool:
    """Whether a value is made of zeros (or a part of one that is)."""
    while node.op == "call_function" and node.target in (aten.slice.Tensor, aten.expand.default, aten.reshape.default):
        node = operands(node)[0]
    if node.op != "call_function":
        return False
    return node.target is aten.zeros.default or (node.target is aten.full.default and not node.args[1])


_READERS: dict[Any, Callable[[fx.Node], _Shift | None]] = {
    aten.constant_pad_nd.default: _padded,
    aten.pad.default: _padded,
    aten.slice.Tensor: _sliced,
    aten.cat.default: _joined,
    aten.slice_scatter.default: _written,
}
