"""Loss terms over microbatches: a mean over valid labels divides by the count of the whole step, everything else is averaged.

A model's loss is a sum of terms. A term `sum(...) / count`, whose count depends on the batch alone, must be divided by the count over all
microbatches and data ranks, or uneven numbers of ignored labels give the wrong mean. Any other term (a weight penalty, a router's
load-balancing loss) is not additive over microbatches: the step takes the mean of its microbatches.

    before                              after
      s = cross_entropy(..., sum)         denominator = placeholder          (counted over all microbatches before the first forward)
      n = sum(labels != -100)             s = cross_entropy(..., sum)
      loss = s / n + penalty              loss = s / denominator + penalty * (1 / microbatches)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from meshpar.graph.captured import Captured
from meshpar.graph.facts import Extra, Info, facts, info_of, set_facts
from meshpar.graph.op import op_name, operands, read
from meshpar.graph.operators import operator_of
from meshpar.ops.expect import EXPECT
from meshpar.passes.batch_norm import takes_statistics
from meshpar.passes.inputs import add_input, extra_inputs
from meshpar.passes.own_terms import share_out
from meshpar.passes.samples import Samples, mixing

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """A captured graph for one of several microbatches, and the graph that counts its denominators."""

    captured: Captured
    counts: Captured | None
    """Returns the denominators of one microbatch, in the order in which the other graph takes them; None when there are none."""
    averaged: tuple[str, ...]
    """Terms of the loss that are averaged over microbatches, by the submodule, or the source line, that computes them."""
    within: tuple[str, ...] = ()
    """Submodules, with lines where they are not known for it, that take the samples they see together: those of a microbatch."""


def split_denominators(captured: Captured, microbatches: int) -> Split:
    """Rewrite the loss of `captured` for a step of `microbatches` (a copy: the given graph is left alone)."""
    assert captured.loss is not None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    samples = Samples(graph, captured.batch_dims)
    added, together = share_out(graph, microbatches, samples)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    mixed = mixing(samples, graph, [output.args[0][captured.loss]])
    terms = _Terms(graph, microbatches, captured.batch_dims, frozenset(captured.state.inputs))
    values = list(output.args[0])
    loss = terms.rewrite(values[captured.loss])
    values[captured.loss] = loss
    output.args = (tuple(values),)
    counts = _counting(captured, graph, terms.denominators) if terms.denominators else None
    for node, users in terms.denominators.items():
        slot = add_input(graph, Extra.DENOMINATOR, facts(node).beside(info_of(node)).outside())
        for user in users:
            user.replace_input_with(node, slot)
    graph.eliminate_dead_code(lambda node: _is_kept(node) or node.target is EXPECT)
    graph.lint()
    names = (*captured.inputs, *extra_inputs(graph).denominators)
    within = dict.fromkeys([*_statistics([n for n in graph.nodes if takes_statistics(n)], mixed), *together])
    averaged = tuple(dict.fromkeys([*terms.averaged, *added]))
    return Split(replace(captured, graph=graph, inputs=names), counts, averaged, tuple(within))


def _statistics(known: Sequence[fx.Node], mixed: Sequence[fx.Node]) -> list[str]:
    """Where samples are taken together: submodules known for it, and the lines of others."""
    places = list(dict.fromkeys(map(_place, known)))
    lines: dict[str, dict[str, None]] = {}
    for node in mixed:
        if _place(node) not in places:
            lines.setdefault(str(facts(node).module or "the model"), {})[str(facts(node).source or node.name)] = None
    return [*places, *(f"{module} ({', '.join(found)})" for module, found in lines.items())]


def _place(node: fx.Node) -> str:
    """Where in the user's model: the submodule, or the line where the model itself does it."""
    return str(facts(node).module or facts(node).source or "the model")


class _Terms:
    def __init__(self, graph: fx.Graph, microbatches: int, split: Collection[str], numbers: Collection[str]) -> None:
        self.graph, self.microbatches = graph, microbatches
        self.denominators: dict[fx.Node, list[fx.Node]] = {}
        self.averaged: dict[str, None] = {}
        self.trainable = _depends_on(graph, lambda n: n.op == "get_attr" and info_of(n).requires_grad)
        self.batch = _depends_on(graph, lambda n: n.op == "placeholder")
        self.split = _depends_on(graph, lambda n: n.op == "placeholder" and str(n.target) in split)
        self.numbers = _made_of(graph, numbers)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a node but for numbers of the model's own, which count as constants."""
        return [a for a in operands(node) if a not in self.numbers]

    def rewrite(self, node: fx.Node) -> fx.Node:
        """The node that holds this term of the step's loss."""
        name = op_name(node.target) if node.op == "call_function" else ""
        given = self._operands(node)
        through = _passes_on(node)
        inner = [a for a in given if info_of(a).shape == () or through]
        if name in ("add", "sub") and len(inner) == len(given) == 2:
            return self._again(node, {a: self.rewrite(a) for a in inner})
        if (through and given) or (name in ("mul", "div") and len(given) == 1):
            first = given[0]
            return self._again(node, {first: self.rewrite(first)})
        if name == "div" and self._is_count(node.args[1]) and self._is_sum(node.args[0]):
            found = self._over_the_step(node, node.args[1])  # type: ignore[arg-type]
            if found is not None:
                return found
        return self._average(node)

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
            if _adds_up(value):
                return True
            if name in ("add", "sub"):
                return all(self._is_sum(v) for v in given)
            if not ((_passes_on(value) and given) or (name in ("mul", "div") and len(given) == 1)):
                return False
            value = given[0]
        return False

    def _is_count(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.batch and value not in self.trainable and info_of(value).shape == ()

    def _average(self, node: fx.Node) -> fx.Node:
        self.averaged[_place(node)] = None
        with self.graph.inserting_after(node):
            new = self.graph.call_function(aten.mul.Tensor, (node, 1.0 / self.microbatches))
        return set_facts(new, facts(node).beside(info_of(node)))

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
    if _passes_on(value) or (name in ("mul", "div") and len(operands(value)) == 1):
        return _is_additive(operands(value)[0])
    return value.op == "call_function" and operator_of(value.target).kind == "reduction" and _adds_up(value)


def _passes_on(node: fx.Node) -> bool:
    """Whether a call hands on the elements of one value, all of them and nothing else, or these negated."""
    if node.op != "call_function" or len(operands(node)) != 1:
        return False
    before, after = facts(operands(node)[0]).info, facts(node).info
    moves = operator_of(node.target).kind in ("view", "copy") and isinstance(before, Info) and isinstance(after, Info)
    return op_name(node.target) == "neg" or (moves and prod(before.shape) == prod(after.shape))  # type: ignore[union-attr]


def _adds_up(node: fx.Node) -> bool:
    """Whether what a call gives for parts of the samples adds up to what it gives for all: a sum, a loss that takes no mean."""
    return operator_of(node.target).additive and read(node).arguments.get("reduction") in _SUMS


_SUMS = (None, 2, "sum")
"""What a reduction by a sum is called: by nothing, by torch's own losses, by other people's."""


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


def _counting(captured: Captured, graph: fx.Graph, denominators: dict[fx.Node, list[fx.Node]]) -> Captured:
    counts = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            counts.output(tuple(mapping[n] for n in denominators))
            continue
        mapping[node] = set_facts(counts.node_copy(node, lambda n: mapping[n]), facts(node).outside())
    counts.eliminate_dead_code(_is_kept)
    return replace(captured, graph=counts, mutations=(), loss=None, out_leaves=())


def _is_kept(node: fx.Node) -> bool:
    """Functional graphs have no side effects: only inputs and outputs stay without users (torch counts random operators as impure)."""
    return node.op in ("placeholder", "output")
