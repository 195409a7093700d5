"""The terms of a loss, each as the microbatches of a step add up to it.

before                                after, m microbatches
  s = sum(...)                          s                                adds up
  n = sum(labels != -100);  s / n       s / denominator                  the count of the whole step, an input
  mean(...), sum(...) / len(x)          mean(...) * (1 / m)              the mean of as many
  penalty(weights)                      penalty(weights) * (1 / m)       every microbatch has it
  mean(...) * mean(...), max(...)       (...) * (1 / m)                  averaged for want of better, and named
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from meshpar.compile.additivity import Additivity, adds_up, passes_on
from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.graph.op import op_name, operands
from meshpar.graph.operators import operator_of
from meshpar.passes.samples import Samples

aten = torch.ops.aten


class Terms:
    """Rewrites the loss of one microbatch, in place. `samples`: those of the graph that are cut; `numbers`: inputs that are numbers."""

    def __init__(self, graph: fx.Graph, microbatches: int, samples: Samples, numbers: Collection[str]) -> None:
        self.graph, self.microbatches = graph, microbatches
        self.denominators: dict[fx.Node, list[fx.Node]] = {}
        self.averaged: dict[str, None] = {}
        self.trainable = _depends_on(graph, lambda n: n.op == "get_attr" and info_of(n).requires_grad)
        self.batch = _depends_on(graph, lambda n: n.op == "placeholder")
        self.split = samples.reached
        self.numbers = _made_of(graph, numbers)
        self.additivity = Additivity(graph, samples, self.numbers)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node but for numbers of the model's own, which count as constants."""
        return [a for a in operands(node) if a not in self.numbers]

    def rewrite(self, node: fx.Node, over: tuple[fx.Node, ...] = ()) -> fx.Node:
        """The node that holds this term of the step's loss. `over`: what it is multiplied with or divided by on the way to the loss."""
        name = op_name(node.target) if node.op == "call_function" else ""
        given = self._operands(node)
        through = passes_on(node)
        inner = [a for a in given if info_of(a).shape == () or through]
        if name in ("add", "sub") and len(inner) == len(given) == 2:
            return self._again(node, {a: self.rewrite(a, over) for a in inner})
        if (through and given) or (name in ("mul", "div") and len(given) == 1):
            first = given[0]
            return self._again(node, {first: self.rewrite(first, over if through else (*over, node))})
        if name == "div" and self._is_count(node.args[1]) and self._is_sum(node.args[0]):
            found = self._over_the_step(node, node.args[1])  # type: ignore[arg-type]
            if found is not None:
                return found
        return self._shared(node, over)

    def _shared(self, node: fx.Node, over: tuple[fx.Node, ...]) -> fx.Node:
        kind = self.additivity.of(node, over)
        if kind == "sum":
            return node
        if kind == "neither":
            self.averaged[place(node)] = None
        with self.graph.inserting_after(node):
            new = self.graph.call_function(aten.mul.Tensor, (node, 1.0 / self.microbatches))
        return set_facts(new, facts(node).beside(info_of(node)))

    def _over_the_step(self, term: fx.Node, count: fx.Node) -> fx.Node | None:
        """`term`, divided by the count of the whole step; None when the count cannot be had by adding up those of the microbatches.

        A count that no split input enters (the caller's own) is already the whole one. What is done to a count before it divides, and may
        not be done to its parts, is done to their sum:   s / clamp(n, 1)   ->   s / clamp(denominator, 1)
        """
        if count not in self.split:
            return term
        after: list[fx.Node] = []
        while not _is_additive(count):
            if len(operands(count)) != 1 or info_of(operands(count)[0]).shape != ():
                return None
            after.append(count)
            count = operands(count)[0]
        last, user = count, term
        for node in reversed(after):
            with self.graph.inserting_before(term):
                copied = self.graph.node_copy(node, lambda n, last=last: last)  # type: ignore[misc]
            last, user = copied, copied if user is term else user
        if after:
            term.args = (term.args[0], last)
        self.denominators.setdefault(count, []).append(user)
        return term

    def _is_sum(self, value: Any) -> bool:
        while isinstance(value, fx.Node) and value.op == "call_function":
            name, given = op_name(value.target), self._operands(value)
            if adds_up(value):
                return True
            if name in ("add", "sub"):
                return all(self._is_sum(v) for v in given)
            if not ((passes_on(value) and given) or (name in ("mul", "div") and len(given) == 1)):
                return False
            value = given[0]
        return False

    def _is_count(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.batch and value not in self.trainable and info_of(value).shape == ()

    def _again(self, node: fx.Node, changed: dict[fx.Node, fx.Node]) -> fx.Node:
        if all(a is b for a, b in changed.items()):
            return node
        last = max(changed.values(), key=lambda n: list(self.graph.nodes).index(n))
        with self.graph.inserting_after(last):
            return self.graph.node_copy(node, lambda n: changed.get(n, n))


def _is_additive(value: fx.Node) -> bool:
    """Whether a count is a sum over samples, so that the counts of microbatches add up."""
    name = op_name(value.target) if value.op == "call_function" else ""
    if name in ("add", "sub"):
        return len(operands(value)) == 2 and all(_is_additive(v) for v in operands(value))
    if passes_on(value) or (name in ("mul", "div") and len(operands(value)) == 1):
        return _is_additive(operands(value)[0])
    return value.op == "call_function" and operator_of(value.target).kind == "reduction" and adds_up(value)


def _made_of(graph: fx.Graph, names: Collection[str]) -> set[fx.Node]:
    """The placeholders of these names, and what is computed of nothing else."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = operands(node) if node.op == "call_function" else []
        if (node.op == "placeholder" and str(node.target) in names) or (given and all(a in found for a in given)):
            found.add(node)
    return found


def _depends_on(graph: fx.Graph, start: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "output" and (start(node) or any(a in found for a in operands(node))):
            found.add(node)
    return found


def place(node: fx.Node) -> str:
    """Where in the user's model: the submodule, or the line where the model itself does it."""
    return str(facts(node).module or facts(node).source or "the model")
