"""Small graphs written by hand, with the facts the passes read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Facts, Info, set_facts


def info(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Info:
    return Info(shape, dtype, grad)


def put(graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...], gives: Info, **known: Any) -> fx.Node:
    """One more node at the end of the graph."""
    node = graph.create_node(op, target, args, name=target if isinstance(target, str) else _name(target))
    return set_facts(node, Facts(gives, "", **known))


def calls(graph: fx.Graph) -> list[str]:
    """The graph's calls as text, each result named after its operator and numbered from the second on."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op != "call_function":
            names[node] = node.name
            continue
        name = _name(node.target)
        count = sum(n.op == "call_function" and _name(n.target) == name for n in names)
        names[node] = f"{name}_{count}" if count else name
        lines.append(f"{names[node]} = {name}({', '.join(names[a] if isinstance(a, fx.Node) else str(a) for a in node.args)})")
    return lines


def _name(target: Any) -> str:
    return getattr(target, "_opname", None) or target.__name__
