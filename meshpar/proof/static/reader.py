"""Reads a lowered graph from its inputs on: which value of the model's graph every local value is, and how it lies on every axis.

    w: linear's weight, S(0) on tp        y = linear(x, w)         y: the model's linear, S(2) on tp
    x: the same on all ranks              z = p_to_i(y, tp)        contradiction: p_to_i takes a pending sum

A node says of which call of the model's graph it is the part. That is believed only if the operator is the same, if it reads the same
values, and if what it makes of their parts is that part of the result. What cannot be proved is taken from the node's word, and counted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from torch import fx

from meshpar.graph.facts import Extra, facts, infos_of
from meshpar.graph.op import op_name, operands
from meshpar.proof.static.claims import Claims, LocalValue, declared
from meshpar.proof.static.forms import AS_RESULT, PARTIAL, WHOLE, Gradient, told
from meshpar.proof.static.layout import layout_of
from meshpar.proof.static.report import Contradiction, Finding, NodePlace, Unproved, place_of
from meshpar.sharding.types import I, Replicate, Shard

LocalKey = tuple[fx.Node, int]
"""A local value: the node that makes it, and which of its results it is."""


@dataclass(frozen=True, slots=True)
class GradientStep:
    """What happens to a gradient on one axis on its way to an operand: what it has to be (None: anything), what it becomes."""

    needs: Gradient | None
    gives: Gradient


PASS = GradientStep(None, AS_RESULT)


@dataclass(frozen=True, slots=True)
class GradientEdge:
    """A way of gradients from a result back to an operand, axis by axis."""

    operand: LocalKey
    steps: tuple[GradientStep, ...]


@dataclass(frozen=True)
class Made:
    """What a call makes: its results, and for each of them the ways back."""

    results: tuple[LocalValue | None, ...]
    edges: tuple[tuple[GradientEdge, ...], ...]


def key_of(node: fx.Node) -> LocalKey:
    """The value that a node stands for."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
    return node, 0


_ASIDE = ("meshpar.ops.random.derive", "meshpar.ops.load.slot", "meshpar.ops.products.beside")


class ProgramReading:
    """What was read of a program, stage by stage."""

    def __init__(self, claims: Claims, make: Callable[[ProgramReading, fx.Node], Made]) -> None:
        self.claims, self._make = claims, make
        self.held: dict[LocalKey, LocalValue | None] = {}
        self.edges: dict[LocalKey, tuple[GradientEdge, ...]] = {}
        self.order: list[tuple[fx.Node, int]] = []
        self.outputs: list[tuple[LocalKey, int, fx.Node]] = []
        """What is returned: the local value, which of the values of the model's graph, the output node."""
        self.proved = 0
        self.unproved: list[Finding] = []
        self.faults: list[Finding] = []
        self.stage = 0

    def copy(self) -> ProgramReading:
        """The same, to be read on from here."""
        found = copy(self)
        found.held, found.edges = dict(self.held), dict(self.edges)
        found.order, found.outputs, found.unproved, found.faults = (list(x) for x in (self.order, self.outputs, self.unproved, self.faults))  # type: ignore[assignment]
        return found

    def read(self, graph: fx.Graph, received: Mapping[str, LocalKey], returned: Sequence[int | None]) -> list[LocalKey | None]:
        """Read one graph. `received`: placeholders that hold values of an earlier stage; `returned`: for everything it returns, which value
        of the model's graph that is, None for what goes to the next stage."""
        found: list[LocalKey | None] = []
        for node in graph.nodes:
            self.order.append((node, self.stage))
            if node.op == "placeholder":
                self._placeholder(node, received)
            elif node.op == "get_attr":
                self._parameter(node)
            elif node.op == "output":
                found = self._output(node, returned)
            elif node.target is not operator.getitem and op_name(node.target) not in _ASIDE:
                self._call(node)
        return found

    def fault(self, node: fx.Node, axis: str, text: str) -> None:
        """Note a contradiction."""
        self.faults.append(Finding(self.place(node), axis, text))

    def place(self, node: fx.Node) -> NodePlace:
        """Where a node is."""
        return place_of(node, self.stage)

    # -- what a graph begins with --------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, received: Mapping[str, LocalKey]) -> None:
        if facts(node).extra not in (None, Extra.DENOMINATOR):
            return
        if str(node.target) in received:
            key = received[str(node.target)]
            self.held[node, 0] = self.held.get(key)
            self.edges[node, 0] = (GradientEdge(key, (PASS,) * len(self.claims.axes)),)
            self._expected(node)
            return
        origin = self.claims.nodes.get(f"placeholder:{node.target}")
        if origin is None:
            self.fault(node, "", "the model's graph has no such input")
            return
        self.held[node, 0] = LocalValue((origin, 0), self.claims.inputs[str(node.target)])
        self._shape(node)

    def _expected(self, node: fx.Node) -> None:
        """What arrives from another stage must be what the node says it is."""
        arrives, said = self.held[node, 0], declared(node, self.claims)
        if arrives is not None and said is not None and arrives.value != said.value:
            self.fault(node, "", "another value arrives from the stage before than is read here")

    def _parameter(self, node: fx.Node) -> None:
        origin = self.claims.nodes.get(f"get_attr:{node.target}")
        if origin is None:
            self.fault(node, "", "the model's graph reads no such tensor")
            return
        types = self.claims.parameters.get(str(node.target), (I,) * len(self.claims.axes))
        self.held[node, 0] = LocalValue((origin, 0), types)
        self._shape(node)

    def _shape(self, node: fx.Node) -> None:
        held, infos = self.held[node, 0], infos_of(node)
        if held is not None and infos[0] is not None:
            wanted = self.claims.shapes(held.value, held.types)[-1]
            if tuple(infos[0].shape) != wanted:
                self.fault(node, "", f"a rank is said to have {list(infos[0].shape)} of it, and has {list(wanted)}")

    # -- calls ---------------------------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        try:
            made = self._make(self, node)
            self.proved += 1
        except Unproved as why:
            self.unproved.append(Finding(self.place(node), "", str(why)))
            made = self._believed(node)
        except Contradiction as fault:
            self.fault(node, "", str(fault))
            made = self._believed(node)
        except Exception as error:  # a fault of the check is none of the program
            self.unproved.append(Finding(self.place(node), "", f"the check itself failed: {type(error).__name__}: {error}"))
            made = self._believed(node)
        for index, (held, edges) in enumerate(zip(made.results, made.edges, strict=True)):
            self.held[node, index], self.edges[node, index] = held, edges

    def _believed(self, node: fx.Node) -> Made:
        """What a node says of itself, and for its operands the gradients that they say they get."""
        count = len(infos_of(node))
        several = isinstance(facts(node).info, tuple)
        edges = tuple(GradientEdge(key_of(a), self._said(a)) for a in dict.fromkeys(operands(node)))
        return Made(tuple(declared(node, self.claims, i if several else None) for i in range(count)), (edges,) * count)

    def _said(self, node: fx.Node) -> tuple[GradientStep, ...]:
        part = facts(node).part_of
        types = {axis: t[min(part.index, len(t) - 1)] for axis, _, t in part.typed if t} if part is not None else {}
        pending = (isinstance(types.get(a.name, I), Replicate) for a in self.claims.axes)
        return tuple(GradientStep(None, PARTIAL if one else WHOLE) for one in pending)

    # -- what it returns -----------------------------------------------------------------------------------------------------------------

    def _output(self, node: fx.Node, returned: Sequence[int | None]) -> list[LocalKey | None]:
        found: list[LocalKey | None] = []
        values = node.args[0]
        assert isinstance(values, (tuple, list))
        for value, which in zip(values, returned, strict=True):
            key = key_of(value) if isinstance(value, fx.Node) else None
            found.append(key)
            if which is not None and key is not None:
                self.outputs.append((key, which, node))
                self._returned(node, key, which)
        return found

    def _returned(self, node: fx.Node, key: LocalKey, which: int) -> None:
        held, wanted = self.held.get(key), self.claims.returned[which]
        if held is None or not isinstance(wanted, fx.Node):
            return
        if held.value != key_of(wanted):
            self.fault(key[0], "", f"it is returned as value {which} of the model, and is another one")
        for axis, has, needs in zip(self.claims.axes, held.types, self.claims.outputs[which], strict=True):
            if not _alike(has, needs, axis.size):
                self.fault(key[0], axis.name, f"it is returned as {told(needs)}, and is {told(has)}")


def _alike(a: object, b: object, ranks: int) -> bool:
    if isinstance(a, Shard) and isinstance(b, Shard):
        return a.dim == b.dim and layout_of(a, ranks) == layout_of(b, ranks)
    return a == b
