"""Experts beside the exchange of their rows: what lies between sending rows and returning them becomes one call, in pieces.

before                                                    after
  r, e, *route = send_rows(x, ends, ...)                    y = through_experts(((grouped_mm, ("%0", "%2", "%1")), (silu, ("%4",)), ...),
  h = silu(grouped_mm(r, w, e))                                                  x, ends, w, v, ...)
  y = return_rows(grouped_mm(h, v, e), *route, ...)

Only where all of it is known to treat rows one by one, by their expert alone, and nothing else reads any of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from meshpar._torch import OpOverload
from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.graph.op import op_name, operands
from meshpar.graph.operators import draws, operator_of
from meshpar.ops import expert_all_to_all, expert_pieces
from meshpar.passes.again import ComputeAgain, said

_NOT_BY_ELEMENT = frozenset(("tril", "triu"))
_ALONG_A_DIM = frozenset(("split", "split_with_sizes", "chunk", "slice"))
_AS_IT_IS = frozenset(("alias", "clone", "contiguous", "detach", "_to_copy"))


@dataclass(frozen=True)
class CutExpertsIntoPieces:
    """Compute with the rows of experts while others travel. Changes the graph in place.

    `least_bytes`: of the rows of a rank; fewer are not worth their pieces.
    """

    least_bytes: int = 2**21

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            exchange = facts(node).exchange
            if node.target is not expert_all_to_all.send_rows or exchange is None or exchange.rows.nbytes < self.least_bytes:
                continue
            if (inside := _between(node)) is not None:
                ComputeAgain(within=frozenset(inside))(graph)
                _join(graph, node)
        return graph


def _items(sent: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in sent.users if user.target is operator.getitem}  # type: ignore[misc]


def _back(sent: fx.Node) -> fx.Node | None:
    """The call that returns what was sent, if it is the only one that reads the route."""
    items = _items(sent)
    if sent.kwargs.get("dropping") or len(items) != len(sent.users) or set(items) != set(range(5)):
        return None
    readers = {user for k in range(2, 5) for user in items[k].users}
    back = readers.pop() if len(readers) == 1 else None
    route = tuple(items[k] for k in range(2, 5))
    same = back is not None and back.target is expert_all_to_all.return_rows and back.args[1:] == route and back.kwargs == sent.kwargs
    return back if same else None


def _between(sent: fx.Node) -> list[fx.Node] | None:
    """What is computed of the rows before they return, in order; None where pieces of them would not give the same."""
    back = _back(sent)
    if back is None:
        return None
    rows, ends = (_items(sent)[k] for k in range(2))
    by_row, found = {rows}, list[fx.Node]()
    for node in _after(sent, back):
        if not {*by_row, ends, *found}.intersection(operands(node)):
            continue
        if facts(node).region != facts(sent).region or not _is_by_row(node, by_row, ends):
            return None
        by_row.add(node)
        found.append(node)
    inside = {rows, ends, *found}
    ends_here = back.args[0] in found and all(set(node.users) <= {*found, back} for node in inside)
    return found if ends_here else None


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


def _join(graph: fx.Graph, sent: fx.Node) -> None:
    back = _back(sent)
    assert back is not None
    inside, (rows, ends) = _inside(sent, back), (_items(sent)[k] for k in range(2))
    own = {rows, ends, *inside}
    given = list(dict.fromkeys(n for node in inside for n in operands(node) if n not in own))
    slots = {node: f"%{number}" for number, node in enumerate([rows, ends, *given, *inside])}
    steps = tuple((_name(node), said(node.args, slots), tuple(said(dict(node.kwargs), slots).items())) for node in inside)
    known = (facts(sent), *(facts(_items(sent)[k]) for k in range(5)), *(facts(node) for node in inside))
    back.target, back.args = expert_pieces.through_experts, (steps, *sent.args, *given)
    set_facts(back, replace(facts(back), inside=known))
    for node in (*reversed(inside), *_items(sent).values(), sent):
        graph.erase_node(node)


def _inside(sent: fx.Node, back: fx.Node) -> Sequence[fx.Node]:
    """What is computed of the rows, and joined by now."""
    own = {_items(sent)[k] for k in range(2)}
    found = []
    for node in _after(sent, back):
        if own.intersection(operands(node)):
            own.add(node)
            found.append(node)
    return found


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, OpOverload) else op_name(node.target)
