"""Weight gradients that are computed beside a collective: that each is left to one that computes it, and that comes after it in backward.

x_r = i_to_r(x, later, (wa, wb), ...)
y   = linear(x_r, wb, None, later, 1)        wb is number 1, and x_r is on the way of the gradients from y
"""

from __future__ import annotations

from typing import Any

from torch import fx

from meshpar.graph.facts import infos_of
from meshpar.graph.op import op_name
from meshpar.proof.static.report import Contradiction

_HERE = "meshpar.ops.products."
CONVERSIONS = frozenset(_HERE + name for name in ("i_to_r", "convert"))
"""Conversions of values that compute weight gradients."""
_COMPUTING = CONVERSIONS | {_HERE + "send_rows"}
_LEAVING = frozenset(_HERE + name for name in ("linear", "matmul", "grouped_mm"))


def computes(node: fx.Node) -> bool:
    """Whether a call computes weight gradients in its backward."""
    return op_name(node.target) in _COMPUTING


def conversion_of(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of a conversion, and the layouts that it is told."""
    name = op_name(node.target)
    if name == _HERE + "convert":
        return str(node.args[3]), node.args[4:]
    return name.rpartition(".")[2], () if name in CONVERSIONS else node.args[1:]


def check(node: fx.Node) -> None:
    """Raise Contradiction for a product whose weight gradient is left to nobody."""
    if op_name(node.target) not in _LEAVING:
        return
    weight, later, number = node.args[1], node.args[-2], node.args[-1]
    assert isinstance(later, fx.Node) and isinstance(number, int)
    takers = [user for user in later.users if computes(user)]
    rivals = [user for user in later.users if op_name(user.target) in _LEAVING and user.args[-1] == number]
    if len(takers) != 1 or len(rivals) != 1:
        raise Contradiction("the gradient of its weight is left to another call than computes one of that number")
    weights: Any = next(a for a in takers[0].args if isinstance(a, (tuple, list)))
    if not 0 <= number < len(weights) or weights[number] is not weight:
        raise Contradiction("the gradient of its weight is taken for that of another one")
    if not _passes(node, takers[0]):
        raise Contradiction("the gradient of its weight is left to a call that its gradients do not come to")


def _passes(node: fx.Node, start: fx.Node) -> bool:
    """Whether gradients come from a product to `start` through its value."""
    value: Any = node.args[0]
    waiting, seen = [value], {value}
    while waiting:
        at = waiting.pop()
        if at is start:
            return True
        if start < at and any(info is not None and info.requires_grad for info in infos_of(at)):  # (what comes before it cannot lead there)
            new = [n for n in at.all_input_nodes if n not in seen]
            seen.update(new)
            waiting += new
    return False
