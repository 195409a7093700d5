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
from meshpar.graph.op import Op, Value, operands, read, value_info, value_of
from meshpar.mesh import Axis
from meshpar.ops import collectives, context, expert_all_to_all, halo, ring, vocab_parallel
from meshpar.ops.each_rank import each_rank
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.conversions import CONVERSIONS, conversion
from meshpar.sharding.types import Owned, Partial, Ragged, Shard, Type, local_shape
from meshpar.sharding.views import slice_bounds

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
        if any(isinstance(t, (Shard, Ragged)) for t in (*plan.uses, *plan.outs)):
            LOCAL.get(call.op.name, _unchanged)(call)
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


# -- how single operators speak of local sizes -------------------------------------------------------------------------------------------


@dataclass
class LocalCall:
    """One call being lowered: what it was, how it is typed, and the call it becomes."""

    op: Op
    plan: NodePlan
    axis: Axis
    rank: int
    target: Any
    args: list[Any]
    kwargs: dict[str, Any]
    scale: float | None = None
    """A factor applied to the result."""

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """The local shape of a result."""
        out = self.op.outs[index]
        assert out is not None
        return local_shape(out.shape, self.plan.outs[index], self.axis.size, self.rank)

    def in_shape(self, index: int = 0) -> tuple[int, ...]:
        """The local shape of an operand."""
        return local_shape(self.op.infos[index].shape, self.plan.uses[index], self.axis.size, self.rank)

    def out_shard(self) -> Shard | None:
        """The shard of the first result, if it is one."""
        found = self.plan.outs[0]
        return found if isinstance(found, Shard) else None

    def in_shard(self, index: int = 0) -> Shard | None:
        """The shard of an operand, if it is one."""
        found = self.plan.uses[index]
        return found if isinstance(found, Shard) else None

    def sizes(self) -> list[int]:
        """The local shape of the result as a reshape wants it: -1 for the cut dim, which may differ between ranks, or for the rows."""
        cut, rows = self.out_shard(), self.op.out.rows
        free = 0 if rows else cut.dim if cut else -1
        return [-1 if d == free else n for d, n in enumerate(self.out_shape())]

    def set(self, name: str, value: Any) -> None:
        """Set an argument by its schema name."""
        for place, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if place < len(self.args):
                    self.args[place] = value
                else:
                    self.kwargs[name] = value
                return
        raise KeyError(name)

    def where(self) -> dict[str, Any]:
        """The axis as keyword arguments of our own operators."""
        return {"group": self.axis.group, "size": self.axis.size, "rank": self.axis.rank}


def _unchanged(call: LocalCall) -> None:
    """Most operators read their sizes off their operands."""


def _reshape(call: LocalCall) -> None:
    call.target, call.args, call.kwargs = aten.reshape.default, [call.args[0], call.sizes()], {}


def _squeeze(call: LocalCall) -> None:
    """Only the dims of the whole value that go: a rank may hold a single element of others."""
    shape, chosen = call.op.infos[0].shape, call.op.dims()
    call.target, call.args, call.kwargs = aten.squeeze.dims, [call.args[0], [d for d in chosen if shape[d] == 1]], {}


def _expand(call: LocalCall) -> None:
    out, before = call.out_shape(), call.in_shape()
    shift = len(out) - len(before)
    call.set("size", [-1 if d >= shift and before[d - shift] == n else n for d, n in enumerate(out)])


def _created(call: LocalCall) -> None:
    call.set("size", list(call.out_shape()))


def _split(call: LocalCall) -> None:
    dim = call.op.dim()
    widths = [call.out_shape(k)[dim] for k in range(len(call.op.outs))]
    call.target, call.args, call.kwargs = aten.split_with_sizes.default, [call.args[0], widths, dim], {}


def _slice(call: LocalCall) -> None:
    """The bounds of a slice among what this rank holds of the dim."""
    dim, cut = call.op.dim(), call.in_shard()
    if cut is None or cut.dim != dim:
        return
    bounds = slice_bounds(call.op)
    assert bounds is not None
    held = cut.ranges(call.axis.size, call.rank)
    start, stop = (sum(max(0, min(high, b) - low) for low, high in held) for b in bounds)
    whole = call.op.out.shape[dim] == call.op.infos[0].shape[dim]
    call.target, call.args, call.kwargs = aten.slice.Tensor, [call.args[0], dim, start, 2**63 - 1 if whole else stop], {}


def _ratio(call: LocalCall) -> None:
    out, before = call.out_shape(), call.in_shape()
    shift = len(out) - len(before)
    call.set("repeats", [n // max(1, before[d - shift]) if d >= shift else n for d, n in enumerate(out)])


def _interleave(call: LocalCall) -> None:
    dim = call.op.dim()
    call.args, call.kwargs = [call.args[0], call.out_shape()[dim] // max(1, call.in_shape()[dim]), dim], {}


def _mean(call: LocalCall) -> None:
    """A mean over a cut dim is the sum of the rank's part over the global count."""
    if not isinstance(call.plan.outs[0], Partial) or call.in_shard() is None:
        return
    count = 1
    for d in call.op.dims():
        count *= call.op.infos[0].shape[d]
    keep, dtype = bool(call.op.arguments.get("keepdim", False)), call.op.arguments.get("dtype")
    call.target = aten.sum.dim_IntList
    call.args, call.kwargs = [call.args[0], list(call.op.dims()), keep], {"dtype": dtype} if dtype else {}
    call.scale = 1.0 / count


def _embedding(call: LocalCall) -> None:
    cut = call.in_shard(0)
    if cut is None or cut.dim != 0:
        return
    padding = call.op.arguments.get("padding_idx", -1)
    call.target = vocab_parallel.embedding
    call.args = [call.args[1], call.args[0], padding, cut.dim, cut.repeat, cut.segments]
    call.kwargs = call.where()


def _cross_entropy(call: LocalCall) -> None:
    cut, logits = call.in_shard(0), call.op.infos[0].shape
    class_dim = 0 if len(logits) == 1 else 1
    if cut is None or cut.dim != class_dim:
        return
    a = call.op.arguments
    call.target = vocab_parallel.cross_entropy
    weight = call.args[2] if len(call.args) > 2 else call.kwargs.get("weight")
    call.kwargs = {
        "reduction": "sum" if a["reduction"] == 2 else "none",
        "ignore_index": a["ignore_index"],
        "label_smoothing": a["label_smoothing"],
        **call.where(),
    }
    call.args = [*call.args[:2], weight, cut.dim, cut.repeat, cut.segments]


def _convolution(call: LocalCall) -> None:
    groups = int(call.op.arguments.get("groups", 1))
    weight = call.in_shard(1)
    if groups > 1 and weight is not None and weight.dim == 0:
        call.set("groups", call.in_shape(1)[0])


def _attention(call: LocalCall) -> None:
    """Queries that are cut are not the first ones: what they may see follows from their positions."""
    cut, a = call.in_shard(), call.op.arguments
    window, causal = a.get("window"), a.get("is_causal", True)
    if cut is None or cut.dim != len(call.op.infos[0].shape) - 2 or (call.plan.why not in ("ring", "halo") and not causal):
        return
    call.args = [*call.args[:3], cut.dim, cut.repeat, cut.segments]
    call.kwargs = {"window": window, "scale": a["scale"], "enable_gqa": a["enable_gqa"], **call.where()}
    call.target = {"halo": halo.halo_attention, "ring": ring.ring_attention}.get(call.plan.why, context.causal_attention)
    if call.plan.why == "ring":
        call.kwargs["causal"] = causal


def _exchanged_again(call: LocalCall) -> None:
    """A conversion of an outer axis whose dims this axis cuts inside of their parts: it moves what this rank has of each."""
    for at in range(1, len(call.args) - 2, 3):
        dim = call.args[at]
        (whole, local), *_ = sorted(
            ((call.op.infos[0].shape[dim], call.in_shape()[dim]), (call.op.out.shape[dim], call.out_shape()[dim])), reverse=True
        )
        if whole != local:
            ((units, each),) = call.args[at + 2]
            call.args[at + 2] = ((units * each * local // whole, 1),)


LOCAL: dict[str, Callable[[LocalCall], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn"), _created),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "slice": _slice,
    "repeat": _ratio,
    "repeat_interleave": _interleave,
    "mean": _mean,
    "embedding": _embedding,
    "cross_entropy_loss": _cross_entropy,
    **dict.fromkeys((f"meshpar.ops.collectives.{one.op}" for one in CONVERSIONS.values()), _exchanged_again),
    **dict.fromkeys(("scaled_dot_product_attention", "meshpar.ops.halo.windowed_attention"), _attention),
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), _convolution),
}
