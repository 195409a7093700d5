"""The plan of a new shape from those of known ones: the same types, of which only sizes differ.

    16 positions on two ranks      20 positions                   23 positions
    S(1, [16])                     S(1, [20])                     not even: planned anew, and the next odd length is made of that plan

Placements never change with the shape. What depends on it, and is compared with the known shapes: how each operator's dims belong together
(`Signature`), whether every cut is even, whether nobody is left with nothing, and that every cut is as long as its dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from meshpar.compile.shapes.fitted import Fitted
from meshpar.compile.shapes.numbers import Differs, NewNumbers, Number
from meshpar.compile.shapes.written import written
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Facts, Info, facts, infos_of
from meshpar.graph.op import kind_of, operands, read, value_info, value_of
from meshpar.graph.text import fingerprint, inputs_of
from meshpar.mesh import Axis
from meshpar.passes.lower import Lower
from meshpar.plan import AxisPlan, NodePlan, Plan
from meshpar.sharding.infer import signature_of
from meshpar.sharding.types import Shard, Type

KEPT = 4
"""Plans that new ones are made of, of one kind, at most."""
KINDS = 16
"""Kinds of plans that are kept."""


@dataclass
class _KnownPlan:
    """A plan, and the numbers of its graph and its types, axis by axis."""

    plan: Plan
    graphs: list[list[Number]]
    types: list[list[Number]]


@dataclass
class _Alike:
    """Plans of which only sizes differ."""

    what: list[Any]
    types: list[Any]
    known: list[_KnownPlan]


class Plans:
    """The plans made so far, for one set of parameters."""

    def __init__(self) -> None:
        self._alike: dict[Hashable, list[_Alike]] = {}
        self.made = 0
        """Plans that were made of others."""

    def at(self, captured: Captured, like: Hashable) -> Plan | None:
        """The plan of `captured`, if those of other shapes tell it. `like`: what it was asked for besides the graph."""
        for alike in self._alike.get(like, ()):
            try:
                plan = _made(alike, captured) if len(alike.known) > 1 else None
            except Differs:
                continue
            if plan is not None:
                self.made += 1
                return plan
        return None

    def learn(self, captured: Captured, like: Hashable, plan: Plan) -> None:
        """Keep a plan that was decided."""
        what, types, known = _read(captured.graph, plan)
        several = self._alike.setdefault(like, [])
        for alike in several:
            if alike.what == what and alike.types == types:
                alike.known = [*alike.known[-KEPT + 1 :], known]
                return
        several.insert(0, _Alike(what, types, [known]))
        del several[KINDS:]


def _read(graph: fx.Graph, plan: Plan) -> tuple[list[Any], list[Any], _KnownPlan]:
    what, types = list[Any](), list[Any]()
    known = _KnownPlan(plan, [], [])
    for axis in plan.axes:
        here, numbers = _graph(graph)
        kinds, own = _types(axis)
        what.append(here)
        types.append(kinds)
        known.graphs.append(numbers)
        known.types.append(own)
        graph = _lowered(graph, axis, plan)
    return what, types, known


def _made(alike: _Alike, captured: Captured) -> Plan | None:
    latest, graph, axes = alike.known[-1].plan, captured.graph, list[AxisPlan]()
    for at, axis in enumerate(latest.axes):
        here, now = _graph(graph)
        if here != alike.what[at]:
            return None
        numbers = NewNumbers([known.graphs[at] for known in alike.known], now)
        sizes = [numbers.now(key) for key in zip(*(known.types[at] for known in alike.known), strict=True)]
        axes.append(_axis(axis, iter(sizes)))
        if _types(axes[-1])[0] != alike.types[at] or not _fits(graph, axes[-1]):
            return None
        graph = _lowered(graph, axes[-1], latest)
    return replace(latest, graph=fingerprint(captured), axes=tuple(axes), inputs=inputs_of(captured), ledger=())


def _lowered(graph: fx.Graph, axis: AxisPlan, plan: Plan) -> fx.Graph:
    """What the next axis is typed on."""
    return graph if axis.axis == plan.axes[-1].axis else Lower(axis, Axis(axis.axis, axis.size, 0, axis.axis))(graph)


def _graph(graph: fx.Graph) -> tuple[list[Any], list[Number]]:
    """What decides about types but for numbers, and the numbers."""
    what, arguments, sizes = written(graph, _about)
    known: dict[Any, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            what.append(_signature(node, known))
    return what, [*arguments, *sizes]


def _about(known: Facts) -> Hashable:
    return known.region, known.stage, known.expert_stack, known.nature, known.cut


def _signature(node: fx.Node, known: dict[Any, Any]) -> Any:
    if not all(isinstance(info, Info) for operand in operands(node) for info in [facts(operand).info]):
        return None
    kind = kind_of(node)
    if kind not in known:
        found = signature_of(read(node))
        known[kind] = found and replace(found, sizes=dict.fromkeys(found.sizes, 0))
    return known[kind]


def _types(axis: AxisPlan) -> tuple[list[Any], list[Number]]:
    """The types of an axis but for sizes, and the sizes. (Why a parameter lies where it does is not compared.)"""
    numbers: list[Number] = []
    kinds = [
        (name, [_kind(type_, axis.size, numbers) for type_ in (*plan.uses, None, *plan.outs, None, *plan.handed)], plan.uses and plan.why)
        for name, plan in axis.nodes.items()
    ]
    return [axis.axis, axis.size, kinds, [_kind(type_, axis.size, numbers) for type_ in axis.outputs]], numbers


def _kind(type_: Type | None, size: int, numbers: list[Number]) -> Any:
    if not isinstance(type_, Shard):
        return type_
    numbers.append(type_.repeat)
    for units, each in type_.segments:
        numbers += (units, each)
    least = min(type_.local_length(size, rank) for rank in (0, size - 1))
    return type_.dim, len(type_.segments), type_.is_even(size), least > 0


AxisShard = tuple[Shard, int]
"""A type that cuts, and among how many ranks."""


def cuts_of(plan: Plan) -> tuple[list[Any], list[AxisShard], list[AxisShard]]:
    """The types of a plan but for sizes; those of all its values that cut; those of its outputs that cut."""
    kinds = [_types(axis)[0] for axis in plan.axes]
    outputs = [(type_, axis.size) for axis in plan.axes for type_ in axis.outputs if isinstance(type_, Shard)]
    inner = (
        (type_, axis.size)
        for axis in plan.axes
        for node in axis.nodes.values()
        for type_ in (*node.uses, *node.outs, *node.handed)
        if isinstance(type_, Shard)
    )
    return kinds, [*inner, *outputs], outputs


def cut_again(several: Sequence[AxisShard], fitted: Fitted) -> Shard:
    """A type at new sizes, from what it was at known ones. Raises Differs where it would not cut evenly what was cut evenly."""
    size = several[0][1]
    read = [list[Number]() for _ in several]
    kinds = [_kind(type_, size, numbers) for (type_, _), numbers in zip(several, read, strict=True)]
    found = _again(several[0][0], iter([fitted.now(values) for values in zip(*read, strict=True)]))
    assert isinstance(found, Shard)
    if any(kind != kinds[0] for kind in (*kinds, _kind(found, size, []))):
        raise Differs("a dim is not cut evenly any more, or is")
    return found


def with_outputs(plan: Plan, outputs: Iterator[Shard], key: str) -> Plan:
    """The plan of a program that is another one at new sizes, as far as it says what leaves it. `key`: tells it from others."""
    axes = [
        replace(axis, nodes={}, outputs=tuple([next(outputs) if isinstance(type_, Shard) else type_ for type_ in axis.outputs]))
        for axis in plan.axes
    ]
    return replace(plan, graph=f"{plan.graph} {key}", axes=tuple(axes), ledger=())


def _axis(axis: AxisPlan, sizes: Iterator[Number]) -> AxisPlan:
    def again(types: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([_again(type_, sizes) for type_ in types])

    nodes = {name: NodePlan(again(one.uses), again(one.outs), one.why, again(one.handed)) for name, one in axis.nodes.items()}
    return replace(axis, nodes=nodes, outputs=again(axis.outputs))


def _again(type_: Type | None, sizes: Iterator[Number]) -> Type | None:
    if not isinstance(type_, Shard):
        return type_
    repeat = next(sizes)
    return replace(type_, repeat=int(repeat), segments=tuple([(int(next(sizes)), int(next(sizes))) for _ in type_.segments]))


def _fits(graph: fx.Graph, axis: AxisPlan) -> bool:
    """Whether every cut is as long as the dim that it cuts."""
    for node in graph.nodes:
        plan = axis.nodes.get(node.name)
        if plan is None:
            continue
        pairs = list(zip(infos_of(node), plan.outs, strict=False))
        if node.op == "call_function" and len(plan.uses) == len(given := operands(node)):
            pairs += [(value_info(value_of(one)), type_) for one, type_ in zip(given, plan.uses, strict=True)]
        if any(isinstance(t, Shard) and isinstance(i, Info) and i.shape[t.dim] != t.length for i, t in pairs):
            return False
    return True
