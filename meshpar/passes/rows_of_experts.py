"""What experts make of rows, between the call that sorts or sends them and the one that takes them back: whether pieces give the same.

rows, ends, ... = first(...)
h = silu(grouped_mm(rows, w, ends))          each row of h depends on one of rows, and on which expert it belongs to
y = last(grouped_mm(h, v, ends), ...)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from meshpar._torch import OpOverload
from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import op_name, operands
from meshpar.graph.operators import draws, operator_of
from meshpar.ops.again import CheapStep
from meshpar.passes.again import said

_NOT_BY_ELEMENT = frozenset(("tril", "triu"))
_ALONG_A_DIM = frozenset(("split", "split_with_sizes", "chunk", "slice"))
_AS_IT_IS = frozenset(("alias", "clone", "contiguous", "detach", "_to_copy"))


def items(first: fx.Node) -> dict[int, fx.Node]:
    """The results of a call, by number."""
    return {user.args[1]: user for user in first.users if user.target is operator.getitem}  # type: ignore[misc]


def between(first: fx.Node, last: fx.Node) -> list[fx.Node] | None:
    """What is computed of the rows and their ends (the first two results) before `last` is given its result, in order.

    None where pieces of the rows would not give the same, or where something else reads any of it.
    """
    rows, ends = (items(first)[k] for k in range(2))
    by_row, found = {rows}, list[fx.Node]()
    for node in _after(first, last):
        if not {*by_row, ends, *found}.intersection(operands(node)):
            continue
        if facts(node).region != facts(first).region or not _is_by_row(node, by_row, ends):
            return None
        by_row.add(node)
        found.append(node)
    inside = {rows, ends, *found}
    ends_here = last.args[0] in found and all(set(node.users) <= {*found, last} for node in inside)
    return found if ends_here else None


def joined(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The same calls, some of which were joined since."""
    own = {items(first)[k] for k in range(2)}
    found = []
    for node in _after(first, last):
        if own.intersection(operands(node)):
            own.add(node)
            found.append(node)
    return found


def steps(first: fx.Node, inside: Sequence[fx.Node]) -> tuple[tuple[CheapStep, ...], list[fx.Node]]:
    """The calls as steps (see `ops.expert_steps`), and what else they read."""
    own = [items(first)[k] for k in range(2)]
    given = list(dict.fromkeys(n for node in inside for n in operands(node) if n not in (*own, *inside)))
    slots = {node: f"%{number}" for number, node in enumerate([*own, *given, *inside])}
    return tuple((_name(node), said(node.args, slots), tuple(said(dict(node.kwargs), slots).items())) for node in inside), given


def _after(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The calls between two, but for the results of the first."""
    results, found, node = set(first.users), [], first.next
    while node is not last:
        if node.op == "call_function" and node not in results:
            found.append(node)
        node = node.next
    return found


def _is_by_row(node: fx.Node, by_row: set[fx.Node], ends: fx.Node) -> bool:
    """Whether a call gives, for each row it is given, a row that depends on nothing but it and its expert."""
    name, args = op_name(node.target), node.args
    if name == "meshpar.grouped_mm":
        return args[0] in by_row and args[1] not in by_row and args[2] is ends
    if name == "meshpar.row_expert":
        return args[0] in by_row and args[1] is ends
    if ends in operands(node):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or draws(node):
        return False
    if name == "index":
        indices: Any = args[1]
        return args[0] not in by_row and len(indices) == 1 and indices[0] in by_row and len(info_of(indices[0]).shape) == 1
    if name in _ALONG_A_DIM:
        given = info_of(args[0])  # type: ignore[arg-type]
        dim: Any = args[1 if name == "slice" else 2] if len(args) > (1 if name == "slice" else 2) else 0
        return dim % len(given.shape) != 0
    if name in _AS_IT_IS:
        return True
    return operator_of(node.target).kind == "elementwise" and name not in _NOT_BY_ELEMENT and _rows_stay(node, by_row)


def _rows_stay(node: fx.Node, by_row: set[fx.Node]) -> bool:
    """Whether operands have their rows first, as the result has, or the same values for all rows."""
    result = info_of(node).shape
    return all(
        info_of(n).shape[:1] == result[:1] and len(info_of(n).shape) == len(result)
        if n in by_row
        else len(info_of(n).shape) < len(result) or info_of(n).shape[0] == 1
        for n in operands(node)
    )


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, OpOverload) else op_name(node.target)
