"""Cheap operators between dear ones are computed again in backward, where that keeps less: norms written out, gates, activations.

before                                 after
  s = silu(gate)                         y = again.computed(((silu, ...), (mul, ...)), gate, up)
  y = mul(s, up)                         z = linear(y, w)
  z = linear(y, w)

What is joined ends in one value, and nothing else reads what is inside of it. It is joined where backward then keeps fewer bytes: what it
read inside, less what it now reads and did not. (Products, attention, collectives, and what draws random numbers, are never computed again;
sums, which keep nothing, are no gain.)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from meshpar._torch import OpOverload
from meshpar.graph.facts import facts, info_of, infos_of, set_facts
from meshpar.graph.op import operands
from meshpar.graph.operators import draws, operator_of
from meshpar.ops import again

_CHEAP = frozenset(("elementwise", "view", "copy", "reduction", "softmax", "norm"))
_KEPT_RESULTS = frozenset(("results", "operands and results"))


@dataclass(frozen=True)
class ComputeAgain:
    """Join what is cheap within a block. Changes the graph in place.

    `least_bytes`: what must be gained; less is not worth the time. `within`: of these nodes alone.
    """

    least_bytes: int = 2**22
    within: frozenset[fx.Node] | None = None

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        joined: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            if (
                node in joined
                or (self.within is not None and node not in self.within)
                or not _is_cheap(node)
                or operator_of(node.target).view
                or not info_of(node).requires_grad
            ):
                continue
            inside = _inside(node, self.within)
            if len(inside) > 1 and _gain(inside) >= self.least_bytes:
                joined.update(inside)
                _join(graph, inside)
        return graph


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node is one that may be computed again: one result, in a block, of an operator of torch."""
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and facts(node).region is not None
        and operator_of(node.target).kind in _CHEAP
        and facts(node).seed is None
        and not draws(node)
        and len(infos_of(node)) == 1
        and infos_of(node)[0] is not None
    )


def _inside(last: fx.Node, within: frozenset[fx.Node] | None) -> Sequence[fx.Node]:
    """What ends in `last` alone, in the order of the graph."""
    found, new = {last}, [last]
    while new:
        before = dict.fromkeys(n for node in found for n in operands(node) if n not in found and (within is None or n in within))
        new = [n for n in before if _is_cheap(n) and facts(n).region == facts(last).region and found.issuperset(n.users)]
        found.update(new)
    return sorted(found)


def _gain(inside: Sequence[fx.Node]) -> int:
    """The bytes that backward keeps less."""
    within, given = set(inside), {_memory(n) for n in _given(inside) if not _is_constant(n)}
    before = {_memory(n) for node in inside for n in _read(node)}
    others = {_memory(n) for value in (*given, inside[-1]) for user in _users(value) if user not in within for n in _read(user)}
    others |= {value for value in given if value.op != "call_function"}
    gone, come = before & within - {inside[-1]} - others, given - before - others
    return sum(info_of(n).nbytes for n in gone) - sum(info_of(n).nbytes for n in come)


def _given(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """The operands of all of it, in order."""
    within = set(inside)
    return list(dict.fromkeys(n for node in inside for n in operands(node) if n not in within))


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """What the backward of a node keeps."""
    if node.op != "call_function" or not any(i is not None and i.requires_grad for i in infos_of(node)):
        return
    row, given = operator_of(node.target), operands(node)
    if row.view:
        return
    for at, one in enumerate(given):
        if row.saves in ("operands", "operands and results"):
            kept = True
        else:
            kept = row.saves == "others" and any(info_of(n).requires_grad for n in given[:at] + given[at + 1 :])
        if kept and not _is_constant(one):
            yield one
    if row.saves in _KEPT_RESULTS:
        yield node


def _memory(node: fx.Node) -> fx.Node:
    """The value whose memory a node is: of several results that are no views, each its own."""
    while node.op == "call_function" and operator_of(node.target).view and operands(node):
        before = operands(node)[0]
        if node.target is operator.getitem and not (before.op == "call_function" and operator_of(before.target).view):
            return node
        node = before
    return node


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, as it is or viewed."""
    for user in node.users:
        if user.op == "call_function" and operator_of(user.target).view:
            yield from _users(user)
        else:
            yield user


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _join(graph: fx.Graph, inside: Sequence[fx.Node]) -> None:
    given, last = _given(inside), inside[-1]
    slots = {node: f"%{number}" for number, node in enumerate([*given, *inside])}
    steps = tuple((str(node.target), said(node.args, slots), tuple(said(dict(node.kwargs), slots).items())) for node in inside)
    last.target, last.args, last.kwargs = again.computed, (steps, *given), {}
    set_facts(last, replace(facts(last), inside=tuple(facts(node) for node in inside[:-1])))
    for node in reversed(inside[:-1]):
        graph.erase_node(node)


def said(value: Any, slots: Mapping[fx.Node, str]) -> Any:
    """An argument of a step, with the names of values in their places."""
    if isinstance(value, fx.Node):
        return slots[value]
    if isinstance(value, (tuple, list)):
        return tuple(said(one, slots) for one in value)
    if isinstance(value, dict):
        return {key: said(one, slots) for key, one in value.items()}
    return value
