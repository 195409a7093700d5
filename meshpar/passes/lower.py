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

from meshpar.graph.captured import Info
from meshpar.graph.op import Value, operands, read, value_of
from meshpar.graph.operators import operator_of
from meshpar.mesh import Axis
from meshpar.ops import collectives, expert_all_to_all
from meshpar.ops.each_rank import each_rank
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.conversions import conversion
from meshpar.sharding.local import LocalCall
from meshpar.sharding.types import Owned, Partial, Ragged, Shard, Type, local_shape

aten = torch.ops.aten
DISPATCH, COMBINE = torch.ops.meshpar.dispatch.default, torch.ops.meshpar.combine.default


@dataclass(frozen=True)
class Lower:
    """Lower a graph on one axis. `axis` says which rank this is; simulated ranks (-1) share the graph of rank 0.

    `node.meta` of the result: "origin", the name of the captured node whose value it holds, and "typed", (axis, size, types of its results)
    for every axis so far ("index" says which result, of a conversion of one of several): what it takes to compare the two.
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
        info = node.meta["info"]
        infos = info if isinstance(info, tuple) else (info,)
        local = tuple(None if i is None else self._local(i, t) for i, t in zip(infos, plan.outs, strict=True))
        new.meta = {**node.meta, "info": local if isinstance(info, tuple) else local[0]}
        if "conversion" in node.meta and isinstance(info, Info) and local[0] is not None:
            *where, sent = node.meta["conversion"]  # on an outer axis: it sends what this rank has on this one
            new.meta["conversion"] = (*where, _share(sent, info, local[0]))
        new.meta["origin"] = node.meta.get("origin", node.name)
        new.meta["typed"] = (*node.meta.get("typed", ()), (self.axis.name, self.axis.size, plan.outs))
        new.meta["cut"] = tuple(
            sorted(
                {*node.meta.get("cut", ()), *([self.axis.name] if any(isinstance(t, (Shard, Partial, Ragged)) for t in plan.outs) else [])}
            )
        )
        for index, type_ in enumerate(plan.outs):
            value = (node, index)
            self.types[value] = type_
            self.home[value] = _unit(node)
            if not isinstance(info, tuple):
                self.held[value] = new
        if isinstance(info, tuple):
            self._items(node, new, local)
        for index, handed in enumerate(plan.handed):
            if handed is not None and (node, index) in self.held:
                self._as(self._value_node(node, index), handed)

    def _items(self, node: fx.Node, new: fx.Node, local: tuple[Info | None, ...]) -> None:
        used = {u.args[1] for u in node.users if u.target is operator.getitem}
        for index, info in enumerate(local):
            if info is not None and index in used:
                item = self.new.call_function(operator.getitem, (new, index))
                item.meta = {k: v for k, v in new.meta.items() if k not in _OF_THE_CALL} | {"info": info}
                self.held[node, index] = item

    def _value_node(self, node: fx.Node, index: int) -> fx.Node:
        if not isinstance(node.meta["info"], tuple):
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
            self.converted[key] = self._convert(start, operand.meta["info"], before, type_)
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
        node.meta = {k: v for k, v in self.current.meta.items() if k in ("region", "module", "source")}
        node.meta.update(info=self._local(info, after), conversion=(self.axis.name, self.axis.size, before, after, info))
        node.meta["cut"] = start.meta.get("cut", ())
        if "origin" in start.meta:
            other = tuple(after if out == before else out for out in start.meta["typed"][-1][2])
            node.meta["origin"] = start.meta["origin"]
            node.meta["index"] = start.args[1] if start.target is operator.getitem else start.meta.get("index", 0)
            node.meta["typed"] = (*start.meta["typed"][:-1], (self.axis.name, self.axis.size, other))
        return node

    def _where(self) -> dict[str, Any]:
        return {"group": self.axis.group, "size": self.axis.size, "rank": self.axis.rank}

    # -- nodes ---------------------------------------------------------------------------------------------------------------------------

    def _output(self, node: fx.Node) -> None:
        returned: Any = node.args[0]
        values = [self._as(v, t) if isinstance(v, fx.Node) else v for v, t in zip(returned, self.plan.outputs, strict=True)]
        self.new.output(tuple(values)).meta = dict(node.meta)

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
            new.meta = _unplaced(node.meta) | {"info": self._local(call.op.out, plan.outs[0])}
            new = self.new.call_function(aten.mul.Tensor, (new, call.scale))
        self._made(node, new, plan)
        if call.target is not node.target:
            new.meta["axis"] = self.axis.name

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
        if self.axis.rank >= 0 or all(t.is_even(self.axis.size) for t in cut) or "group" in call.kwargs or "seed" in node.meta:
            return mine
        calls = [self._localised(node, call.plan, rank, args, kwargs) for rank in range(self.axis.size)]
        return each_rank, (call.target, *((tuple(one.args), one.kwargs) for one in calls)), {"group": self.axis.group}

    # -- experts -------------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, node: fx.Node, plan: NodePlan) -> None:
        """Rows are sorted by expert here, and those of other ranks' experts are sent there.

        x, ends, perm = dispatch(h, index, E)      x', ends', *route = send_rows(x, ends, group=..., size=2, rank=0)
        """
        args = (*(self._as(a, t) for a, t in zip(operands(node), plan.uses, strict=True)), *node.args[2:])
        x, ends, perm = node.meta["info"]
        sorted_, cut = self.new.call_function(DISPATCH, args), plan.outs[2]
        here = (replace(x, shape=(self._local(perm, cut).shape[0], *x.shape[1:])), ends, self._local(perm, cut))
        sorted_.meta = _unplaced(node.meta) | {"info": here, "cut": (*node.meta.get("cut", ()), self.axis.name)}
        at_home = [self._item(sorted_, k, info) for k, info in enumerate(here)]
        sent = self.new.call_function(expert_all_to_all.send_rows, tuple(at_home[:2]), self._where() | _dropping(node))
        number = replace(perm, rows=False, dtype=torch.int64)
        route = (replace(number, shape=(2, self.axis.size + 1)), *[replace(number, shape=here[2].shape)] * 2)
        infos = (self._local(x, Ragged()), self._local(ends, Ragged()), *route)
        sent.meta = {**sorted_.meta, "info": infos, "exchange": (self.axis.name, self.axis.size, here[0])}
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
        here = self.held[perm].meta["info"].shape[0]
        back.meta = {k: v for k, v in node.meta.items() if k in ("region", "module", "source", "stage")}
        info = rows.meta["info"]
        back.meta["info"] = replace(info, shape=(here, *info.shape[1:]))
        back.meta.update(cut=rows.meta.get("cut", ()), exchange=(self.axis.name, self.axis.size, back.meta["info"]))
        return back

    def _item(self, node: fx.Node, index: int, info: Info) -> fx.Node:
        item = self.new.call_function(operator.getitem, (node, index))
        item.meta = {k: v for k, v in node.meta.items() if k not in _OF_THE_CALL} | {"info": info}
        return item


_OF_THE_CALL = ("seed", "exchange")
"""What is said of a call, not of each of its results."""


def _share(sent: Info, whole: Info, local: Info) -> Info:
    """What a conversion of an outer axis sends, of a value of which this rank holds `local` of `whole`."""
    shape = (n * part // n_whole if n_whole else n for n, n_whole, part in zip(sent.shape, whole.shape, local.shape, strict=True))
    return replace(sent, shape=tuple(shape))


def _dropping(dispatch: fx.Node) -> dict[str, Any]:
    """How rows are exchanged: all of them, or only those that some expert is to have."""
    return {"dropping": True} if len(dispatch.args) > 3 and dispatch.args[3] else {}


def _unplaced(meta: dict[str, Any]) -> dict[str, Any]:
    """What is said of a node, for one that does not hold its value."""
    return {key: value for key, value in meta.items() if key not in ("origin", "typed", "index")}


ConversionUnit = tuple[str | None, int | None]
"""A block, on a stage of the pipeline: what shares the conversions it asks for."""


def _unit(node: fx.Node) -> ConversionUnit:
    return node.meta.get("region"), node.meta.get("stage")


def _map(value: Any, change: Callable[[fx.Node], fx.Node]) -> Any:
    """Replace every node among nested arguments, in the order of `operands`."""
    if isinstance(value, fx.Node):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value
