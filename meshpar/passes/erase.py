"""Calls that nothing reads any more."""

from __future__ import annotations

from torch import fx

from meshpar.graph.op import operands


def erase_unused(node: fx.Node) -> None:
    """Erase a call without users, and then those that only it used."""
    if node.op == "call_function" and not node.users:
        inputs = operands(node)
        node.graph.erase_node(node)
        for one in dict.fromkeys(inputs):
            erase_unused(one)
