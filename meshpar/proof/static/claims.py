"""What the check is told: the model's graph, and how inputs, parameters and outputs are declared to lie. Everything else it derives."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from meshpar.graph.facts import PartOf, facts, info_of
from meshpar.graph.op import Value, operands, value_of
from meshpar.mesh import Axis
from meshpar.plan import Plan
from meshpar.roles import ROLES
from meshpar.sharding.types import I, Replicate, Type, local_shape, plain

Types = tuple[Type, ...]
"""The type of a value on each of the axes, in their order. The same on all ranks is `I`, whatever its gradient."""


@dataclass(frozen=True, slots=True)
class LocalValue:
    """What a local value is: which value of the model's graph, and how it lies on each axis."""

    value: Value
    types: Types

    def at(self, level: int, type_: Type) -> LocalValue:
        """The same with another type on one axis."""
        return LocalValue(self.value, (*self.types[:level], type_, *self.types[level + 1 :]))


@dataclass(frozen=True)
class Claims:
    """What a program is to compute, and on what."""

    graph: fx.Graph
    """The model's graph, at global shapes."""
    axes: tuple[Axis, ...]
    """Those with more than one rank, in the order in which values are cut."""
    inputs: Mapping[str, Types]
    parameters: Mapping[str, Types]
    outputs: tuple[Types, ...]
    """The types of what the graph returns."""
    gradients: tuple[tuple[bool, ...], ...]
    """For each of them and each axis, whether the gradient that it is handed is whole, rather than a pending sum."""
    summed: tuple[frozenset[str], ...] = ()
    """For each axis, the parameters whose gradients data parallelism adds up over it after backward."""

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The nodes of the model's graph by name; parameters, buffers and inputs by their own too."""
        found = {n.name: n for n in self.graph.nodes}
        return found | {f"{n.op}:{n.target}": n for n in self.graph.nodes if n.op in ("placeholder", "get_attr")}

    @cached_property
    def returned(self) -> tuple[Any, ...]:
        """What the model's graph returns."""
        values: Any = next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0]
        return tuple(values)

    @cached_property
    def calls(self) -> Mapping[tuple[Any, tuple[Value, ...]], list[fx.Node]]:
        """The calls of the model's graph by operator and operands."""
        found: dict[tuple[Any, tuple[Value, ...]], list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem:
                found.setdefault((node.target, tuple(value_of(a) for a in operands(node))), []).append(node)
        return found

    @cached_property
    def kinds(self) -> Mapping[fx.Node, Any]:
        """What calls have in common that obey the same rule in the same way."""
        numbers: dict[Any, int] = {}
        return {n: numbers.setdefault(_kind(n), len(numbers)) for n in self.graph.nodes if n.op == "call_function"}

    @cached_property
    def dispatches(self) -> Mapping[Value, fx.Node]:
        """Values that hold rows sorted by expert -> the call that sorted them."""
        found: dict[Value, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            infos = facts(node).info if isinstance(facts(node).info, tuple) else (facts(node).info,)
            before = next((found[value_of(a)] for a in operands(node) if value_of(a) in found), node)
            found.update({(node, i): before for i, info in enumerate(infos) if getattr(info, "rows", False)})  # type: ignore[arg-type]
        return found

    def shapes(self, value: Value, types: Types) -> list[tuple[int, ...]]:
        """The shape of a value as it is whole on each axis and cut on those before; last, that of what a rank holds."""
        info = facts(value[0]).info
        shape = tuple((info[value[1]] if isinstance(info, tuple) else info).shape)  # type: ignore[union-attr]
        found = self._shapes.get((shape, types))
        if found is None:
            found = self._shapes[shape, types] = [shape]
            for axis, type_ in zip(self.axes, types, strict=True):
                found.append(local_shape(found[-1], type_, axis.size, max(axis.rank, 0)))
        return found

    @cached_property
    def _shapes(self) -> dict[tuple[tuple[int, ...], Types], list[tuple[int, ...]]]:
        return {}


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What a call is, whatever the values it is given."""
    places: dict[fx.Node, int] = {}
    text = written((node.args, node.kwargs), places)
    return node.target, text, tuple([facts(n).info for n in places]), facts(node).info


def written(value: Any, places: dict[fx.Node, int]) -> Any:
    """An argument with the number of a node in its place; numbers with their types (1 is neither 1.0 nor True)."""
    if isinstance(value, fx.Node):
        return fx.Node, places.setdefault(value, len(places))
    if isinstance(value, (list, tuple)):
        return tuple([written(v, places) for v in value])
    if isinstance(value, dict):
        return tuple([(k, written(v, places)) for k, v in value.items()])
    return type(value), value


def claims_of(graph: fx.Graph, plan: Plan, axes: Iterable[Axis], *, batch_dims: Mapping[str, int], loss: int | None, mutations: int,
              summed: Mapping[str, frozenset[str]]) -> Claims:  # fmt: skip
    """What a plan declares of parameters and outputs, and the roles of the axes of inputs. `summed`: axis -> parameters whose gradients
    the runtime adds up over it."""
    used = tuple(a for a in axes if a.size > 1)
    returned: Any = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    whole = {i for i in range(len(returned)) if i == loss or i >= len(returned) - mutations}
    found = [plan.axis(a.name) for a in used]
    outputs, gradients = [], []
    for i in range(len(returned)):
        declared = [I if i in whole or one is None else one.outputs[i] for one in found]
        outputs.append(tuple(same(t) for t in declared))
        gradients.append(tuple(not isinstance(t, Replicate) for t in declared))
    return Claims(
        graph,
        used,
        {str(n.target): _input(n, used, batch_dims) for n in graph.nodes if n.op == "placeholder"},
        {name: tuple(same(p.placements.get(a.name, I)) for a in used) for name, p in plan.parameters.items()},
        tuple(outputs),
        tuple(gradients),
        tuple(summed.get(a.name, frozenset()) for a in used),
    )


def _input(node: fx.Node, axes: Iterable[Axis], batch_dims: Mapping[str, int]) -> Types:
    """Axes whose ranks get batches of their own cut the dim of samples, one after the other."""
    if str(node.target) not in batch_dims or facts(node).info is None:
        return tuple(I for _ in axes)
    dim, found = batch_dims[str(node.target)], list[Type]()
    size = info_of(node).shape[dim]
    for axis in axes:
        own = ROLES[axis.name].own_batches
        found.append(plain(dim, size) if own else I)
        size = size // axis.size if own else size
    return tuple(found)


def same(type_: Type) -> Type:
    """A declared type without what it says of gradients."""
    return I if isinstance(type_, Replicate) else type_


def declared(node: fx.Node, claims: Claims, index: int | None = None) -> LocalValue | None:
    """What a node of a lowered graph is said to hold; None where nothing is said."""
    part = facts(node).part_of
    if part is None and not claims.axes:
        part = PartOf(node.name)  # where no axis cuts values a graph is a copy of the model's
    if part is None or part.origin not in claims.nodes:
        return None
    at = part.index if index is None else index
    types = {axis: tuple(types) for axis, _, types in part.typed}
    found = tuple(same(types[a.name][at if at < len(types[a.name]) else 0]) if a.name in types else I for a in claims.axes)
    origin = claims.nodes[part.origin]
    value = value_of(origin)
    return LocalValue((value[0], at) if origin is value[0] else value, found)
