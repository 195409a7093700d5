"""The loss of a step of several microbatches, read beside the model's: the sum over the microbatches is the loss of the whole batch.

    model    loss = s / n + penalty            s, n: sums over samples
    step     loss = s / N + penalty * (1/m)    N: n of all microbatches, which the counting graph gives one microbatch's part of

A mean over samples divides by the count of the whole step; a term that is no sum over samples enters with 1/m; nothing enters twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose, prod
from typing import Any

from torch import fx

from meshpar.graph.captured import Captured
from meshpar.graph.facts import Extra, Info, facts
from meshpar.graph.op import op_name, operands, read
from meshpar.graph.operators import operator_of
from meshpar.proof.static.report import Contradiction, Finding, StaticReport, Unproved, place_of

_SUMS = (None, 2, "sum")


@dataclass
class _Numbers:
    """Nodes of several graphs by number: equal for nodes that compute the same."""

    known: dict[Any, int] = field(default_factory=dict)
    nodes: dict[fx.Node, int] = field(default_factory=dict)

    def add(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "output":
                continue
            args = node.args
            if facts(node).nature is not None and node.op == "call_function":
                args = tuple(a for a in args if isinstance(a, fx.Node))  # by how much a backward's own terms count is said last
            key = (node.op, node.target, self._plain(args), self._plain(node.kwargs))
            self.nodes[node] = self.known.setdefault(key, len(self.known))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return fx.Node, self.nodes[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._plain(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._plain(v)) for k, v in value.items())
        return type(value), value

    def same(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self.nodes[a] == self.nodes[b]
        return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b


def check_loss(model: Captured, step: Captured, counts: Captured | None, microbatches: int) -> StaticReport:
    """Whether the losses of the microbatches add up to the model's on the whole batch."""
    if model.loss is None or step.loss is None:
        return StaticReport(0)
    loss, now = _returned(model.graph)[model.loss], _returned(step.graph)[step.loss]
    try:
        _LossTerms(model, step, counts, microbatches).check(now, loss)
    except Unproved as why:
        return StaticReport(0, (Finding(place_of(now), "", str(why)),))
    except Contradiction as fault:
        return StaticReport(0, (), (Finding(place_of(now), "", str(fault)),))
    return StaticReport(1)


def _returned(graph: fx.Graph) -> Sequence[Any]:
    values: Sequence[Any] = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    return values


class _LossTerms:
    def __init__(self, model: Captured, step: Captured, counts: Captured | None, microbatches: int) -> None:
        self.microbatches, self.numbers = microbatches, _Numbers()
        for one in (model, step, counts):
            if one is not None:
                self.numbers.add(one.graph)
        self.counted = () if counts is None else tuple(_returned(counts.graph))
        slots = [n for n in step.graph.nodes if n.op == "placeholder" and facts(n).extra is Extra.DENOMINATOR]
        self.slots = {n: i for i, n in enumerate(slots)}
        self.of_batch = _reached(model.graph, lambda n: n.op == "placeholder" and str(n.target) in model.batch_dims)
        self.trained = _reached(model.graph, lambda n: n.op == "get_attr" and facts(n).info.requires_grad)  # type: ignore[union-attr]
        numbers = frozenset(model.state.inputs)
        self.numeric = {n for n in model.graph.nodes if n.op == "placeholder" and str(n.target) in numbers}

    def check(self, now: Any, model: Any) -> None:
        """Raise Contradiction where the values of `now` of the microbatches do not add up to that of `model` of the whole batch."""
        name, given = op_name(model.target) if model.op == "call_function" else "", self._values(model)
        if name in ("add", "sub") and len(given) == 2 and op_name(now.target) == name:
            for a, b in zip(self._values(now), given, strict=True):
                self.check(a, b)
        elif name == "div" and len(given) == 2 and self._is_count(given[1]) and _is_sum(given[0]):
            self._mean(now, model)
        elif (len(given) == 1 and _hands_on(model) and now.target == model.target) or (
            name in ("mul", "div") and len(given) == 1 and op_name(now.target) == name and self._same_factor(now, model)
        ):
            self.check(self._values(now)[0], given[0])
        else:
            self._averaged(now, model)

    def _values(self, node: fx.Node) -> list[fx.Node]:
        return [a for a in operands(node) if a not in self.numeric]

    def _same_factor(self, now: fx.Node, model: fx.Node) -> bool:
        here, there = ([a for a in n.args if not isinstance(a, fx.Node)] for n in (now, model))
        return here == there

    def _is_count(self, node: fx.Node) -> bool:
        info = facts(node).info
        return node in self.of_batch and node not in self.trained and isinstance(info, Info) and info.shape == ()

    def _averaged(self, now: fx.Node, model: fx.Node) -> None:
        factor = now.args[1] if op_name(now.target) == "mul" and len(now.args) > 1 else None
        if self.numbers.same(now, model):
            if model not in self.of_batch or op_name(model.target) == "mean":
                raise Contradiction("a term of the loss that is no sum over samples counts once for every microbatch")
            raise Unproved("whether a term of the loss is a sum over samples is not followed")
        if not isinstance(factor, float) or not self.numbers.same(now.args[0], model):
            raise Unproved("how a term of the loss is shared out over microbatches is not followed")
        if not isclose(factor, 1.0 / self.microbatches):
            raise Contradiction(
                f"a term of the loss enters with {factor}, of {self.microbatches} microbatches each is {1 / self.microbatches}"
            )

    def _mean(self, now: fx.Node, model: fx.Node) -> None:
        total, count = self._values(model)
        if op_name(now.target) == "mul" and self.numbers.same(now.args[0], model):
            if _is_additive(_stripped(count)):
                raise Contradiction("a mean over samples is taken of the means of microbatches, which have different counts")
            self._averaged(now, model)
            return
        if op_name(now.target) != "div" or not self.numbers.same(now.args[0], total):
            raise Contradiction("a mean over samples does not sum what the model sums")
        here, there = now.args[1], count
        while isinstance(here, fx.Node) and here not in self.slots:
            if self.numbers.same(here, there):
                raise Contradiction("a mean over samples divides by the count of one microbatch")
            if here.target != there.target or len(operands(here)) != 1 or not self._same_factor(here, there):
                raise Contradiction("a mean over samples divides by another count than the model's")
            here, there = operands(here)[0], operands(there)[0]
        if not isinstance(here, fx.Node):
            raise Contradiction("a mean over samples divides by a number")
        if not self.numbers.same(self.counted[self.slots[here]], there):
            raise Contradiction("the count of the whole step is a count of something else than the model divides by")
        if not _is_additive(there):
            raise Contradiction("the counts of microbatches do not add up to that of the whole step")


def _reached(graph: fx.Graph, begins: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "output" and (begins(node) or any(a in found for a in operands(node))):
            found.add(node)
    return found


def _stripped(count: fx.Node) -> fx.Node:
    """A count before what is done to it at last (clamped, and so on)."""
    while not _is_additive(count) and len(operands(count)) == 1:
        count = operands(count)[0]
    return count


def _is_additive(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    given = operands(node)
    if op_name(node.target) in ("add", "sub"):
        return len(given) == 2 and all(_is_additive(a) for a in given)
    if _hands_on(node) or (op_name(node.target) in ("mul", "div") and len(given) == 1):
        return _is_additive(given[0])
    return operator_of(node.target).kind == "reduction" and _sums(node)


def _is_sum(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    given = operands(node)
    if _sums(node):
        return True
    if op_name(node.target) in ("add", "sub"):
        return bool(given) and all(_is_sum(a) for a in given)
    return (_hands_on(node) or op_name(node.target) in ("mul", "div")) and len(given) == 1 and _is_sum(given[0])


def _sums(node: fx.Node) -> bool:
    return operator_of(node.target).additive and read(node).arguments.get("reduction") in _SUMS


def _hands_on(node: fx.Node) -> bool:
    """Whether a call gives the elements of its operand, or these negated."""
    if node.op != "call_function" or len(operands(node)) != 1:
        return False
    before, after = facts(operands(node)[0]).info, facts(node).info
    if op_name(node.target) == "neg":
        return True
    moves = operator_of(node.target).kind in ("view", "copy") and isinstance(before, Info) and isinstance(after, Info)
    return moves and prod(before.shape) == prod(after.shape)  # type: ignore[union-attr]
