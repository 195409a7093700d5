"""Whether a mask of the model's graph, made of numbers alone, is the causal one: it is computed from what the graph says, all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from meshpar._torch import without_modes
from meshpar.graph.facts import Info, facts
from meshpar.graph.op import operands
from meshpar.proof.static.actions import elements
from meshpar.proof.static.report import Contradiction, Unproved

MOST = 2**24
"""Masks of more elements are not computed."""


class Masks:
    """What is known of masks."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, bool | None] = {}

    def check_causal(self, mask: fx.Node, queries: int, keys: int) -> None:
        """Raise Contradiction if it is not causal, Unproved if that cannot be told."""
        if mask not in self._known:
            self._known[mask] = _is_causal(mask, queries, keys)
        if self._known[mask] is None:
            raise Unproved("a mask is left out that does not follow from numbers alone, or is too large to look at")
        if not self._known[mask]:
            raise Contradiction("a mask that is not causal is left out for a causal one")


def _is_causal(mask: fx.Node, queries: int, keys: int) -> bool | None:
    needed = _needed(mask)
    if needed is None:
        return None
    values: dict[fx.Node, Any] = {}
    with without_modes(), torch.no_grad():
        for node in needed:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))  # type: ignore[operator]
        found = _once(values[mask])
        return found.dtype == torch.bool and torch.equal(found, (torch.arange(keys) <= torch.arange(queries)[:, None]).expand_as(found))


def _once(mask: torch.Tensor) -> torch.Tensor:
    """Without what `expand` repeats: samples and heads of a large batch are no memory, and one of them is looked at."""
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _needed(mask: fx.Node) -> list[fx.Node] | None:
    found: set[fx.Node] = set()
    todo = [mask]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        info = facts(node).info
        plain = node.op == "call_function" and isinstance(info, Info) and facts(node).seed is None
        if not plain or (elements(info) > MOST and node.target is not torch.ops.aten.expand.default):  # type: ignore[arg-type]
            return None
        found.add(node)
        todo += operands(node)
    return [node for node in mask.graph.nodes if node in found]
