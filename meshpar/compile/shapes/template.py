"""A captured graph whose numbers follow from the shape of the batch: the graph of another shape is made of it, without a capture.

    capture at 16      capture at 20      a run on shapes alone at 23
       view(x, [4, 16, 8])   view(x, [4, 20, 8])                              view(x, [4, 23, 8])

Two captures tell which numbers depend on the shape. What a number is for a new shape is seen when the forward runs on tensors of that shape
without memory (`capture.witness`), and so is whether it does the same at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from meshpar._torch import OpOverload
from meshpar.capture.witness import Unseen, Witness
from meshpar.compile.shapes.numbers import Differs, NewNumbers, Number
from meshpar.compile.shapes.sizes import spread
from meshpar.compile.shapes.written import with_numbers, written
from meshpar.compile.state.held import variant
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, facts, infos_of
from meshpar.graph.op import op_name
from meshpar.graph.text import digest

Testify = Callable[[Captured], Witness]
"""Watches the forward for one batch, given the capture of another."""

KEPT = 4
"""Shapes that a template is told by, at most: two would do, more tell apart what was equal by chance."""


@dataclass(frozen=True)
class _KnownGraph:
    """The numbers of one capture, and those that its forward shows."""

    arguments: list[Number]
    sizes: list[Number]
    shown: tuple[Number, ...]


class Template:
    """The captures of one graph at several shapes.

    `witness`: that of the first shape. Without one, `again` makes it when there is a second shape.
    """

    def __init__(self, captured: Captured, witness: Witness | None, again: Testify) -> None:
        self.refused = _refused(captured)
        self.what, self._arguments, self._sizes = _written(captured)
        self.captured = replace(captured, graph=with_numbers(captured.graph, iter(self._arguments)))
        self._witness, self._again = witness, again
        self.known: list[_KnownGraph] = []

    def add(self, captured: Captured, witness: Witness | None) -> bool:
        """Learn the capture of one more shape; False where it is of another graph, or of another forward."""
        what, arguments, sizes = _written(captured)
        if what != self.what:
            return False
        if witness is None or self.refused:
            return True  # (nothing to be learned)
        try:
            first = self._first()
        except Unseen as error:
            self.refused = str(error)
            return True
        if first.calls != witness.calls:
            return False
        if len(self.known) < KEPT:
            self.known.append(_KnownGraph(arguments, sizes, witness.numbers))
        return True

    def _first(self) -> Witness:
        """The witness of the first shape. Raises Unseen where the state of Python is another one by now."""
        if self._witness is None:
            self._witness = self._again(self.captured)
            if variant(self._witness.state) != variant(self.captured.state):
                self._witness = None
                raise Unseen("what the forward reads changed before there was a second shape")
        if not self.known:
            self.known.append(_KnownGraph(self._arguments, self._sizes, self._witness.numbers))
        return self._witness

    def at(self, witness: Witness) -> Captured:
        """The captured graph of the shape of `witness`. Raises Differs with the reason where it is not this one."""
        if self.refused:
            raise Differs(self.refused)
        if len(self.known) < 2:
            raise Differs("one shape alone does not tell which numbers depend on it")
        self._check(witness)
        captured = self.captured
        numbers = NewNumbers([known.shown for known in self.known], witness.numbers)
        arguments = [numbers.now(key) for key in zip(*(known.arguments for known in self.known), strict=True)]
        graph = with_numbers(captured.graph, iter(arguments))
        spread(graph, _input_shapes(witness))
        _, _, sizes = written(graph)
        for key, size in zip(zip(*(known.sizes for known in self.known), strict=True), sizes, strict=True):
            numbers.add(key, size)
        return replace(captured, graph=graph, in_leaves=witness.batch.leaves, out_leaves=witness.outcome.leaves, state=witness.state)

    def _check(self, witness: Witness) -> None:
        """Raise Differs where something besides the graph is not as it was."""
        captured, outcome, first = self.captured, witness.outcome, self._first()
        if witness.calls != first.calls:
            raise Differs(_first_difference(first.calls, witness.calls))
        now = (outcome.spec, outcome.loss, outcome.dropped, witness.batch.names, dict(witness.experts), len(outcome.leaves))
        before = (captured.out_spec, captured.loss, captured.dropped, captured.inputs, dict(captured.experts), len(captured.out_leaves))
        if now != before:
            raise Differs("the forward returns something else")
        if _few(witness) != _few(first):
            raise Differs("a dim has one element or none, which are computed in other ways")
        for place, (tensor, version) in captured.state.tensors.items():
            one, now_version = witness.state.tensors.get(place, (None, -1))
            if one is not tensor or version != now_version:
                raise Differs(f"{place} is another tensor now")


def _input_shapes(witness: Witness) -> dict[str, tuple[int, ...]]:
    batch = witness.batch
    shapes = (shape or tuple(tensor.shape) for tensor, shape in zip(batch.tensors, batch.shapes, strict=True))
    return dict(zip(batch.names, shapes, strict=True))


def _few(witness: Witness) -> list[tuple[int, ...]]:
    """Where dims of inputs have less than two elements."""
    return [tuple(min(n, 2) for n in shape) for shape in _input_shapes(witness).values()]


def _written(captured: Captured) -> tuple[Any, list[Number], list[Number]]:
    graph, arguments, sizes = written(captured.graph)
    beside = (
        captured.parameters,
        dict(captured.aliases),
        captured.buffers,
        {name: digest(value) for name, value in captured.constants.items()},
        captured.inputs,
        captured.in_spec,
        captured.in_leaves,
        dict(captured.batch_dims),
        captured.out_spec,
        captured.loss,
        captured.mutations,
        captured.dropped,
        dict(captured.experts),
        dict(captured.unrecognised),
        [tuple(min(n, 2) for n in _shape(node)) for node in captured.graph.nodes if node.op == "placeholder"],
    )
    return (graph, beside), arguments, sizes


def _shape(node: fx.Node) -> tuple[int, ...]:
    info = facts(node).info
    return info.shape if isinstance(info, Info) else ()


def _refused(captured: Captured) -> str:
    """Why a graph is made for one shape alone, if it is."""
    if captured.hooks:
        return "hooks that act in backward were captured for one shape"
    for node in captured.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if not isinstance(node.target, OpOverload) or facts(node).nature is not None:
            return f"{op_name(node.target)} ({facts(node).source}) has a backward of its own, which was captured for one shape"
        if not all(info is None or isinstance(info, Info) for info in infos_of(node)):
            return f"{op_name(node.target)} ({facts(node).source}) gives what is no tensor"
    return ""


def _first_difference(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    for one, other in zip(before, now, strict=False):
        if one != other:
            return f"the forward does something else: {op_name(other[0])} in place of {op_name(one[0])}, or with other values"
    return f"the forward does something else: {len(now)} calls in place of {len(before)}"
