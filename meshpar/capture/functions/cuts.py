"""Operands whose gradient is None, not zeros: to autograd they are cut off, and so they are in the graph.

    y, aux = f(x, w)                                  y, aux = f(x, w)
    backward: g -> 2 g, None                  ->      x, w_ = x, detach(w);  y, aux = f(x, w_)
    or: w gets a gradient through aux alone, which nobody uses

An optimizer passes over a parameter without a gradient; one with zeros it still decays, and moves by its momentum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from meshpar.capture.functions.operators import ForeignOperator, is_foreign, known_infos
from meshpar.capture.functions.proofs import draws, sizes
from meshpar.capture.grad import stops
from meshpar.capture.stand_in import aside
from meshpar.graph.facts import Info, facts, gives_several, info_of, set_facts


def cut(graph: fx.Graph) -> bool:
    """Detach what never gets a gradient from the operators with a backward of their own; whether there was any."""
    reached = _reached(graph)
    found = [(node, position) for node in graph.nodes if is_foreign(node) and _needs(node) for position in _cut_off(node, reached)]
    for node, position in found:
        _detach(graph, node, position)
    return bool(found)


def _reached(graph: fx.Graph) -> set[fx.Node]:
    """The values that some result of the graph has a gradient for."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in found and not stops(node)):
            found.update(n for n in node.all_input_nodes if _needs(n))
    return found


def _cut_off(node: fx.Node, reached: set[fx.Node]) -> tuple[int, ...]:
    """The operands of a call that get no gradient, by position among all its tensors."""
    operator, outputs = ForeignOperator(node.target, node.args, node.kwargs), _outputs(node, reached)
    return aside(lambda: _without(operator, outputs))


def _needs(node: fx.Node) -> bool:
    return any(info.requires_grad for info in known_infos(node))


def _outputs(node: fx.Node, reached: set[fx.Node]) -> tuple[int, ...]:
    """The results of a call that get a gradient."""
    if gives_several(node):
        return tuple(sorted({int(user.args[1]) for user in node.users if user in reached}))  # type: ignore[arg-type]
    return (0,) if node in reached else ()


def _without(operator: ForeignOperator, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The operands that get no gradient in any draw, though something comes in; none where it does not run."""
    for examples in sizes(operator.tensors):
        found = [at for values in draws(examples) if (at := _nones(operator, values, outputs)) is not None]
        if found:
            return tuple(i for i in range(len(operator.tensors)) if all(i in one for one in found))
    return ()


def _nones(operator: ForeignOperator, values: list[Tensor], outputs: tuple[int, ...]) -> frozenset[int] | None:
    needing = [i for i, example in enumerate(operator.tensors) if example.needs_grad]
    try:
        leaves, results = operator.under_autograd(values)
        coming = [results[i] for i in outputs if results[i].requires_grad]
        if not coming:
            return frozenset(needing)
        found = torch.autograd.grad(coming, [leaves[i] for i in needing], [torch.randn_like(r) for r in coming], allow_unused=True)
    except Exception:  # it does not run on drawn values: nothing is known
        return None
    return frozenset(i for i, gradient in zip(needing, found, strict=True) if gradient is None)


def _detach(graph: fx.Graph, node: fx.Node, position: int) -> None:
    """Cut off the operand at one position, counted over all tensors of the call."""
    count = -1

    def one(value: Any) -> Any:
        nonlocal count
        count += 1
        if count != position:
            return value
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.aten.detach.default, (value,))
        info = info_of(value)
        return set_facts(made, facts(node).beside(Info(info.shape, info.dtype, False)))

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), one)
