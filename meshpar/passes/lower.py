"""Lowering: every value becomes this rank's part of it, every change of type an explicit collective.

    before, with x: I, w: S(0)            after
      y = linear(x, w)    y: S(2)           x_r = i_to_r(x, group=..., size=2, rank=0)
                                            y   = linear(x_r, w)
      z = reshape(y, [4, 12, 8, 8])         z   = reshape(y, [4, 12, -1, 8])

The pass decides nothing: it obeys the AxisPlan. It lowers one mesh axis; lowering its result again on the next axis nests the shards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Change, Exchange, Info, facts, gives_several, info_of, infos_of, set_facts
from meshpar.graph.op import Value, operands, read, value_info, value_of
from meshpar.graph.operators import operator_of
from meshpar.mesh import Axis
from meshpar.ops import collectives, expert_all_to_all
from meshpar.ops.each_rank import each_rank
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.conversions import conversion
from meshpar.sharding.local import LocalCall
from meshpar.sharding.types import Owned, Ragged, Shard, Type, local_shape

aten = torch.ops.aten
DISPATCH, COMBINE = torch.ops.meshpar.dispatch.default, torch.ops.meshpar.combine.default


@dataclass(frozen=True)
class Lower:
    """Lower a graph on one axis. `axis` says which rank this is; simulated ranks (-1) share the graph of rank 0.

    The nodes of the result know whose value they hold, and as what: what it takes to compare the two.
    """

    plan: AxisPlan
    axis: Axis

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        return _Lowering(graph, self).run()


class _Lowering:
    def __init__(self, graph: fx.Graph, options: Lower) -> None:
        self.graph, self.plan, self.axis = graph, options.plan, options.axis
        self.shape_rank = max(self.axis.rank, 0)
        self.new = fx.Graph()
        self.held: dict[Value, fx.Node] = {}
        self.types: dict[Value, Type] = {}
        self.home: dict[Value, ConversionUnit] = {}
        self.converted: dict[tuple[Value, Type, ConversionUnit], fx.Node] = {}
        self.current: fx.Node | None = None
        self.routes: dict[Value, tuple[fx.Node, ...]] = {}
        """The rows of a dispatch, by its `perm` -> which way those of other ranks' experts went."""

    def run(self) -> fx.Graph:
        for node in self.graph.nodes:
            self.current = node
            if node.op == "output":
                self._output(node)
            elif node.op == "get_attr" and not self._is_here(node):
                continue
            elif node.op != "call_function":
                copied = self.new.node_copy(node, lambda n: n)
                self._made(node, copied, self.plan.nodes[node.name])
            elif node.target is not operator.getitem:
                self._call(node)
        return self.new

    # -- values --------------------------------------------------------------------------------------------------------------------------

    def _made(self, node: fx.Node, new: fx.Node, plan: NodePlan) -> None:
        """Remember what `new` holds, and convert at once what other blocks will ask for in another type."""
        set_facts(new, facts(node).lowered(node.name, (self.axis.name, self.axis.size), plan.outs, self._local))
        for index, type_ in enumerate(plan.outs):
            value = (node, index)
            self.types[value] = type_
            self.home[value] = _unit(node)
            if not gives_several(node):
                self.held[value] = new
        if gives_several(node):
            self._items(node, new, infos_of(new))
        for index, handed in enumerate(plan.handed):
            if handed is not None and (node, index) in self.held:
                self._as(self._value_node(node, index), handed)

    def _items(self, node: fx.Node, new: fx.Node, local: tuple[Info | None, ...]) -> None:
        used = {u.args[1] for u in node.users if u.target is operator.getitem}
        for index, info in enumerate(local):
            if info is not None and index in used:
                self.held[node, index] = self._item(new, index, info)

    def _value_node(self, node: fx.Node, index: int) -> fx.Node:
        if not gives_several(node):
            return node
        return next(u for u in node.users if u.target is operator.getitem and u.args[1] == index)

    def _local(self, info: Info, type_: Type) -> Info:
        return replace(info, shape=local_shape(info.shape, type_, self.axis.size, self.shape_rank))

    def _as(self, operand: fx.Node, type_: Type) -> fx.Node:
        """The value of `operand` at `type_`: as it is, or converted, once for each block that asks."""
        value = value_of(operand)
        before = self.types[value]
        handed = self._handed(value)
        assert self.current is not None
        unit = _unit(self.current)
        if handed is not None and handed != before and unit != self.home[value]:
            before, start = handed, self.converted[value, handed, self.home[value]]
        else:
            start = self.held[value]
        if before == type_:
            return start
        key = (value, type_, unit)
        if key not in self.converted:
            self.converted[key] = self._convert(start, info_of(operand), before, type_)
        return self.converted[key]

    def _handed(self, value: Value) -> Type | None:
        plan = self.plan.nodes[value[0].name]
        return plan.handed[value[1]] if plan.handed else None

    def _convert(self, start: fx.Node, info: Info, before: Type, after: Type) -> fx.Node:
        found = conversion(before, after)
        assert found is not None and self.current is not None
        layouts: list[Any] = []
        for type_ in (before, after):
            if isinstance(type_, Shard):
                layouts += [type_.dim, type_.repeat, type_.segments]
        node = self.new.call_function(getattr(collectives, found.op), (start, *layouts), self._where())
        change = Change(self.axis.name, self.axis.size, before, after, info)
        return set_facts(node, facts(start).converted(change, self._local(info, after), at=facts(self.current)))

    def _where(self) -> dict[str, Any]:
        return {"group": self.axis.group, "size": self.axis.size, "rank": self.axis.rank}

    # -- nodes ---------------------------------------------------------------------------------------------------------------------------

    def _output(self, node: fx.Node) -> None:
        returned: Any = node.args[0]
        values = [self._as(v, t) if isinstance(v, fx.Node) else v for v, t in zip(returned, self.plan.outputs, strict=True)]
        set_facts(self.new.output(tuple(values)), facts(node))

    def _call(self, node: fx.Node) -> None:
        plan = self.plan.nodes[node.name]
        if node.target is DISPATCH and isinstance(plan.outs[0], Ragged):
            self._dispatch(node, plan)
            return
        if plan.uses and isinstance(plan.uses[0], Owned):
            self._stack_own(node, plan)
            return
        uses = iter(plan.uses)
        args, kwargs = _map((node.args, dict(node.kwargs)), lambda n: self._as(n, next(uses)))
        if node.target is COMBINE and isinstance(plan.uses[0], Ragged):
            args = (self._returned(node, args[0]), *args[1:])
        call = self._localised(node, plan, self.shape_rank, args, kwargs)
        new = self.new.call_function(*self._each_rank(call, node, args, kwargs))
        if call.scale is not None:
            set_facts(new, replace(facts(node).beside(self._local(call.op.out, plan.outs[0])), cut=facts(node).cut))
            new = self.new.call_function(aten.mul.Tensor, (new, call.scale))
        self._made(node, new, plan)
        if call.target is not node.target:
            set_facts(new, replace(facts(new), axis=self.axis.name))

    def _localised(self, node: fx.Node, plan: NodePlan, rank: int, args: Any, kwargs: Any) -> LocalCall:
        call = LocalCall(read(node), plan, self.axis, rank, node.target, list(args), dict(kwargs))
        local = operator_of(node.target).local
        if local is not None and any(isinstance(t, (Shard, Ragged)) for t in (*plan.uses, *plan.outs)):
            local(call)
        return call

    def _each_rank(self, call: LocalCall, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Target and arguments of a call; simulated ranks that hold unequal parts get those of every rank.

        (Where the arguments are equal too: torch's simulation cannot reshape tensors whose sizes differ between ranks.)
        """
        mine = (call.target, tuple(call.args), call.kwargs)
        cut = [t for t in (*call.plan.uses, *call.plan.outs) if isinstance(t, Shard)]
        if self.axis.rank >= 0 or all(t.is_even(self.axis.size) for t in cut) or "group" in call.kwargs or facts(node).seed is not None:
            return mine
        calls = [self._localised(node, call.plan, rank, args, kwargs) for rank in range(self.axis.size)]
        return each_rank, (call.target, *((tuple(one.args), one.kwargs) for one in calls)), {"group": self.axis.group}

    # -- experts -------------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, node: fx.Node, plan: NodePlan) -> None:
        """Rows are sorted by expert here, and those of other ranks' experts are sent there.

        x, ends, perm = dispatch(h, index, E)      x', ends', *route = send_rows(x, ends, group=..., size=2, rank=0)
        """
        args = (*(self._as(a, t) for a, t in zip(operands(node), plan.uses, strict=True)), *node.args[2:])
        x, ends, perm = (value_info((node, k)) for k in range(3))
        sorted_, cut = self.new.call_function(DISPATCH, args), plan.outs[2]
        here = (replace(x, shape=(self._local(perm, cut).shape[0], *x.shape[1:])), ends, self._local(perm, cut))
        set_facts(sorted_, replace(facts(node).beside(here), cut=(*facts(node).cut, self.axis.name)))
        at_home = [self._item(sorted_, k, info) for k, info in enumerate(here)]
        sent = self.new.call_function(expert_all_to_all.send_rows, tuple(at_home[:2]), self._where() | _dropping(node))
        number = replace(perm, rows=False, dtype=torch.int64)
        route = (replace(number, shape=(2, self.axis.size + 1)), *[replace(number, shape=here[2].shape)] * 2)
        infos = (self._local(x, Ragged()), self._local(ends, Ragged()), *route)
        set_facts(sent, replace(facts(sorted_), info=infos, exchange=Exchange(self.axis.name, self.axis.size, here[0])))
        items = [self._item(sent, k, info) for k, info in enumerate(infos)]
        self.routes[node, 2] = tuple(items[2:])
        for index, (held, type_) in enumerate(zip((*items[:2], at_home[2]), plan.outs, strict=True)):
            self.held[node, index], self.types[node, index], self.home[node, index] = held, type_, _unit(node)

    def _is_here(self, node: fx.Node) -> bool:
        type_ = self.plan.nodes[node.name].outs[0]
        return not isinstance(type_, Owned) or type_.rank == self.axis.rank

    def _stack_own(self, node: fx.Node, plan: NodePlan) -> None:
        """A stack of what several ranks own: each stacks its own."""
        own = [self.held[value_of(part)] for part in operands(node) if self._is_here(part)]
        self._made(node, self.new.call_function(node.target, (own,)), plan)  # type: ignore[arg-type]

    def _returned(self, node: fx.Node, rows: fx.Node) -> fx.Node:
        """The rows of this rank's tokens, back from the ranks of their experts."""
        perm = value_of(operands(node)[1])
        back = self.new.call_function(expert_all_to_all.return_rows, (rows, *self.routes[perm]), self._where() | _dropping(perm[0]))
        here = info_of(self.held[perm]).shape[0]
        info = replace(info_of(rows), shape=(here, *info_of(rows).shape[1:]))
        exchange = Exchange(self.axis.name, self.axis.size, info)
        return set_facts(back, replace(facts(node).beside(info), cut=facts(rows).cut, exchange=exchange))

    def _item(self, node: fx.Node, index: int, info: Info) -> fx.Node:
        item = self.new.call_function(operator.getitem, (node, index))
        return set_facts(item, facts(node).item(index, info))


def _dropping(dispatch: fx.Node) -> dict[str, Any]:
    """How rows are exchanged: all of them, or only those that some expert is to have."""
    return {"dropping": True} if len(dispatch.args) > 3 and dispatch.args[3] else {}


ConversionUnit = tuple[str | None, int | None]
"""A block, on a stage of the pipeline: what shares the conversions it asks for."""


def _unit(node: fx.Node) -> ConversionUnit:
    return facts(node).region, facts(node).stage


def _map(value: Any, change: Callable[[fx.Node], fx.Node]) -> Any:
    """Replace every node among nested arguments, in the order of `operands`."""
    if isinstance(value, fx.Node):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value
