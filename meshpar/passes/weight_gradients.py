"""Weight gradients that can wait: products with a parameter get one more argument, the queue their gradient may go to.

before                                after
  y = linear(x, w, b)                   y = deferred.linear(x, w, b, weight_gradients)
  v = transpose(w, 1, 2)                z = deferred.grouped_mm(x, w, offsets, True, weight_gradients)
  z = grouped_mm(x, v, offsets)

`weight_gradients` is one more input of the graph: a `WeightGradients`, or None where nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from meshpar.graph.facts import Extra, info_of
from meshpar.ops import deferred
from meshpar.passes.inputs import add_input

aten = torch.ops.aten


@dataclass(frozen=True)
class DeferWeightGradients:
    """Let the gradients of matrix products with `parameters` (names of `get_attr` targets) wait. Changes the graph in place."""

    parameters: frozenset[str]

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        found = [(node, made) for node in graph.nodes if (made := self._deferred(node)) is not None]
        if not found:
            return graph
        queue = add_input(graph, Extra.WEIGHT_GRADIENTS)
        for node, (target, args) in found:
            before = node.all_input_nodes
            node.target, node.args, node.kwargs = target, (*args, queue), {}
            for operand in before:
                if operand.op == "call_function" and not operand.users:
                    graph.erase_node(operand)
        return graph

    def _deferred(self, node: fx.Node) -> tuple[object, tuple[object, ...]] | None:
        """What to call instead, without the queue."""
        if node.target is aten.linear.default and self._is_parameter(node.args[1]):
            return deferred.linear, (*node.args[:2], node.args[2] if len(node.args) > 2 else None)
        if node.target in (aten.mm.default, aten.matmul.default) and self._is_matrix(node.args[1]):
            return deferred.matmul, (*node.args[:2], None)
        if node.target is aten.addmm.default and self._is_matrix(node.args[2]) and not node.kwargs and len(_shape(node.args[0])) == 1:
            return deferred.matmul, (*node.args[1:3], node.args[0])
        if node.target is torch.ops.meshpar.grouped_mm.default:
            x, weight, offsets = node.args
            if self._is_parameter(weight):
                return deferred.grouped_mm, (x, weight, offsets, False)
            if isinstance(weight, fx.Node) and weight.target is aten.transpose.int and self._is_parameter(weight.args[0]):
                dims = sorted(d % 3 for d in weight.args[1:])  # type: ignore[operator]
                return (deferred.grouped_mm, (x, weight.args[0], offsets, True)) if dims == [1, 2] else None
        return None

    def _is_matrix(self, value: object) -> bool:
        return self._is_parameter(value) and len(_shape(value)) == 2

    def _is_parameter(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value.op == "get_attr" and value.target in self.parameters and info_of(value).requires_grad


def _shape(value: object) -> tuple[int, ...]:
    assert isinstance(value, fx.Node)
    shape: tuple[int, ...] = info_of(value).shape
    return shape
