"""Calls that nothing reads any more."""

from __future__ import annotations

from torch import fx

from meshpar.graph.op import operands


def erase_unused(node: fx.Node) -> None:
    """Erase a call without users, and then those that only it used."""
    waiting, gone = [node], set[fx.Node]()
    while waiting:
        one = waiting.pop()
        if one.op == "call_function" and not one.users and one not in gone:
            gone.add(one)
            waiting += operands(one)
            one.graph.erase_node(one)
