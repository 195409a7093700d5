"""Faults to plant in a lowered graph: each changes one place of a copy, and says which nodes it touched.

drop("p_to_i", 0)        the first all-reduce is left out: what reads it reads the pending sum
group("p_to_i", 0)       it runs in the group of another axis
operand("linear", 3)     the fourth linear reads an earlier value of the same shape
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Info, facts, set_facts
from meshpar.graph.op import op_name
from meshpar.ops import collectives

Groups = Sequence[tuple[str, int, int]]
"""The axes of the mesh: group, size and rank."""


class NoPlace(Exception):
    """A graph has no place for a fault."""


@dataclass(frozen=True)
class Fault:
    """One change of a graph."""

    name: str
    change: Callable[[fx.Graph, Groups], list[fx.Node]]


FROM_THE_END = False
"""Whether the first place of a fault is the last one in the graph: layers repeat, and the check remembers what it derived of the first."""


def sites(graph: fx.Graph, *names: str) -> list[fx.Node]:
    """The calls of these operators, in order."""
    return [
        n
        for n in (reversed(graph.nodes) if FROM_THE_END else graph.nodes)
        if n.op == "call_function" and op_name(n.target).rpartition(".")[2] in names
    ]


def _site(graph: fx.Graph, at: int, *names: str) -> fx.Node:
    found = sites(graph, *names)
    if not found:
        raise NoPlace(" or ".join(names))
    return found[at % len(found)]


def drop(op: str, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        if op == "i_to_r_many":
            items = list(node.users)
            for item in items:
                item.replace_all_uses_with(node.args[item.args[1]])  # type: ignore[index, arg-type]
                graph.erase_node(item)
            touched = [a for a in node.args if isinstance(a, fx.Node)]
        else:
            touched = [node.args[0]]  # type: ignore[list-item]
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
        return touched

    return Fault(f"drop {op}", change)


def double(op: str, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        with graph.inserting_after(node):
            again = graph.call_function(node.target, (node, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
        set_facts(again, facts(node))
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        return [node, again]

    return Fault(f"double {op}", change)


def swap(op: str, other: str, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        node.target = getattr(collectives, other)
        return [node]

    return Fault(f"{other} for {op}", change)


def group(op: str, at: int = 0) -> Fault:
    """The group, size and rank of another axis."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        others = [g for g in groups if g[0] != node.kwargs["group"]]
        if not others:
            raise NoPlace("another axis")
        node.kwargs = {**node.kwargs, **dict(zip(("group", "size", "rank"), others[0], strict=True))}
        return [node]

    return Fault(f"{op} over another axis", change)


def segments(op: str, at: int = 0) -> Fault:
    """A contiguous layout for one in two stretches, or the other way round."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = next((n for n in sites(graph, op)[at:] if _cut_in_two(n) is not None), None)
        if node is None:
            raise NoPlace(op)
        node.args = _cut_in_two(node)  # type: ignore[assignment]
        return [node]

    return Fault(f"{op} of other segments", change)


def turned(op: str) -> Fault:
    """The last pieces of a layout in many dealt out the other way round."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op):
            for at, one in enumerate(node.args):
                if isinstance(one, tuple) and len(one) > 2 and all(isinstance(row, tuple) and len(row) == 2 for row in one):
                    last = tuple((-units, size) for units, size in one[-2:])  # type: ignore[misc, operator]
                    node.args = (*node.args[:at], (*one[:-2], *last), *node.args[at + 1 :])
                    return [node]
        raise NoPlace(op)

    return Fault(f"{op} of pieces in another order", change)


def _cut_in_two(node: fx.Node) -> tuple[Any, ...] | None:
    found = list(node.args)
    for i in reversed(range(len(found))):
        layout = found[i]
        if isinstance(layout, tuple) and layout and isinstance(layout[0], tuple):
            length = sum(abs(units) * size for units, size in layout)
            ranks = int(node.kwargs["size"])  # type: ignore[arg-type]
            if len(layout) > 1:
                found[i] = ((length, 1),)
            elif length % (2 * ranks) == 0:
                found[i] = ((length // 2, 1), (length // 2, 1))
            else:
                return None
            return tuple(found)
    return None


def other_dim(op: str, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        shape = _shape(node.args[0])
        dim = int(node.args[1])  # type: ignore[arg-type]
        new = next((d for d in range(len(shape)) if d != dim and shape[d] % int(node.kwargs["size"]) == 0), None)  # type: ignore[arg-type]
        if new is None:
            raise NoPlace("another dim")
        node.args = (node.args[0], new, 1, ((shape[new] * (int(node.kwargs["size"]) if op[0] == "s" else 1), 1),))  # type: ignore[arg-type]
        return [node]

    return Fault(f"{op} along another dim", change)


def _shape(value: Any) -> tuple[int, ...]:
    info = facts(value).info
    if not isinstance(info, Info):
        raise NoPlace("a tensor")
    return info.shape


def late(op: str, at: int = 0) -> Fault:
    """The collective after what reads it: a sum is taken of what was added to it as well."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = next((n for n in sites(graph, op)[at:] if len(n.users) == 1 and op_name(next(iter(n.users)).target) == "add"), None)
        if node is None:
            raise NoPlace(op)
        (user,) = node.users
        user.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
        with graph.inserting_after(user):
            moved = graph.call_function(node.target, (user, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
        set_facts(moved, facts(node))
        user.replace_all_uses_with(moved, delete_user_cb=lambda one: one is not moved)
        graph.erase_node(node)
        return [user, moved]

    return Fault(f"{op} after the sum it belongs before", change)


def extra(op: str, on: str, at: int = 0) -> Fault:
    """A collective too many, on what `on` gives."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, on)
        where = dict(zip(("group", "size", "rank"), groups[-1], strict=True))
        with graph.inserting_after(node):
            more = graph.call_function(getattr(collectives, op), (node,), where)
        set_facts(more, facts(node))
        node.replace_all_uses_with(more, delete_user_cb=lambda one: one is not more)
        return [node, more]

    return Fault(f"{op} too many, on {on}", change)


def factor(at: int = 0, times: float = 2.0) -> Fault:
    """A product with a number that is another one."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        found = [n for n in sites(graph, "mul", "div") if len(n.args) > 1 and isinstance(n.args[1], float)]
        if not found:
            raise NoPlace("a number")
        node = found[at % len(found)]
        node.args = (node.args[0], node.args[1] * times, *node.args[2:])  # type: ignore[operator]
        return [node]

    return Fault(f"a factor {times} too large", change)


def bounds(at: int = 0) -> Fault:
    """A slice of the other end."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, "slice")[at:]:
            shape, dim = _shape(node.args[0]), int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            start, stop, _ = slice(*node.args[2:4]).indices(shape[dim])  # type: ignore[arg-type]
            moved = shape[dim] - stop, shape[dim] - start
            if moved != (start, stop) and stop > start:
                node.args = (*node.args[:2], *moved)
                return [node]
        raise NoPlace("slice")

    return Fault("a slice of the other end", change)


def argument(op: str, place: int, value: Any, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        if len(node.args) <= place or node.args[place] == value:
            raise NoPlace(f"argument {place}")
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
        return [node]

    return Fault(f"{op} with argument {place} = {value}", change)


def keyword(op: str, name: str, value: Any, at: int = 0) -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, op)
        if name not in node.kwargs or node.kwargs[name] == value:
            raise NoPlace(name)
        node.kwargs = {**node.kwargs, name: value}
        return [node]

    return Fault(f"{op} with {name} = {value}", change)


def other_keys(at: int = 0) -> Fault:
    """Keys and values are put together as if ranks had them one after the other."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, "gathered_attention")
        length = sum(abs(units) * size for units, size in node.kwargs["keys"])  # type: ignore[union-attr, misc, str-unpack]
        if node.kwargs["keys"] == ((length, 1),):
            raise NoPlace("keys")
        node.kwargs = {**node.kwargs, "keys": ((length, 1),)}
        return [node]

    return Fault("keys gathered in another order", change)


def exchanged(op: str, a: int, b: int, at: int = 0) -> Fault:
    """Two operands of one call in each other's place."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op)[at:]:
            args = list(node.args)
            if len(args) <= max(a, b) or not all(isinstance(args[i], fx.Node) for i in (a, b)) or args[a] is args[b]:
                continue
            if facts(args[a]).info == facts(args[b]).info:
                args[a], args[b] = args[b], args[a]
                node.args = tuple(args)
                return [node]
        raise NoPlace(op)

    return Fault(f"operands {a} and {b} of {op} exchanged", change)


def operand(op: str, at: int = 0, place: int = 0) -> Fault:
    """An earlier value of the same shape: what another layer, or another step, left."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op)[at:]:
            if len(node.args) <= place or not isinstance(node.args[place], fx.Node):
                continue
            right = node.args[place]
            for other in graph.nodes:
                if other is node:
                    break
                same = facts(other).info == facts(right).info and facts(other).cut == facts(right).cut  # type: ignore[arg-type]
                if other is not right and other.op == right.op and same and isinstance(facts(other).info, Info):  # type: ignore[union-attr]
                    args = list(node.args)
                    args[place] = other
                    node.args = tuple(args)
                    return [node]
        raise NoPlace(op)

    return Fault(f"{op} reads an earlier value at {place}", change)


def parameter(at: int = 0) -> Fault:
    """Two parameters of one shape in each other's place."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        found = [n for n in graph.nodes if n.op == "get_attr" and isinstance(facts(n).info, Info) and len(_shape(n)) > 1]
        for i, one in enumerate(found[at:]):
            for other in found[at + i + 1 :]:
                if facts(one).info == facts(other).info and _placed(one) == _placed(other):
                    one.target, other.target = other.target, one.target
                    return [one, other]
        raise NoPlace("parameters of one shape")

    return Fault("two parameters exchanged", change)


def _placed(node: fx.Node) -> Any:
    part = facts(node).part_of
    return part.typed if part else None


def alone_draws(at: int = 0) -> Fault:
    """Every rank draws the same for its part, or its own for what all have."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        found = [n for n in graph.nodes if "shards" in n.kwargs]
        if not found:
            raise NoPlace("a random operator")
        node = found[at % len(found)]
        shards: Any = node.kwargs["shards"]
        node.kwargs = {**node.kwargs, "shards": () if shards else tuple(groups)}
        return [node]

    return Fault("draws on the wrong axes", change)


def same_draws() -> Fault:
    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        found = [n for n in graph.nodes if "shards" in n.kwargs and "number" in n.kwargs]
        for a in found:
            for b in found:
                if a is not b and a.kwargs["key"] is b.kwargs["key"] and a.kwargs["number"] != b.kwargs["number"]:
                    b.kwargs = {**b.kwargs, "number": a.kwargs["number"]}
                    return [b]
        raise NoPlace("two random operators of one key")

    return Fault("draws the numbers of another", change)


def transposed(at: int = 0) -> Fault:
    """Other dims."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        node = _site(graph, at, "transpose")
        shape = _shape(node.args[0])
        dims = sorted(int(d) % len(shape) for d in node.args[1:])  # type: ignore[arg-type]
        for a in range(len(shape)):
            for b in range(a + 1, len(shape)):
                if [a, b] != dims:
                    node.args = (node.args[0], a, b)
                    return [node]
        raise NoPlace("transpose")

    return Fault("transpose of other dims", change)


def _stepped(node: fx.Node) -> tuple[Any, list[Any], int]:
    """The steps of a call that is several, what is known of its operands and of the steps' results, and how many operands there are."""
    steps, *given = node.args
    inside = [f.info for f in facts(node).inside]
    if op_name(node.target).endswith("computed"):
        known, results = [facts(n).info for n in given], inside  # type: ignore[arg-type]
    elif op_name(node.target).endswith("on_gathered_tokens"):  # rows and their ends are dispatched
        known, results = [*inside[2:4], *(facts(n).info for n in given[4:])], inside[5:]  # type: ignore[arg-type]
    else:  # experts in pieces: rows and their ends arrive
        known, results = [*inside[1:3], *(facts(n).info for n in given[2:])], inside[6:]  # type: ignore[arg-type]
    return steps, [*known, *results], len(known)


_SPOKEN = {
    "computed": "what is computed again",
    "through_experts": "what experts do in pieces",
    "on_gathered_tokens": "what they do beside tokens",
}


def _slot(arg: Any) -> int | None:
    """Of an operand or a result of a step, which one."""
    return int(arg[1:]) if isinstance(arg, str) and arg.startswith("%") else None


def stale_step(at: int = 0, op: str = "computed") -> Fault:
    """A step of a call that is several reads another value of the same shape, operand or result of an earlier step."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op)[at:]:
            steps, known, given = _stepped(node)
            for i, (name, args, kwargs) in enumerate(steps):
                for place, arg in enumerate(args):
                    read = _slot(arg)
                    others = [j for j in range(given + i) if read is not None and j != read and known[j] == known[read]]
                    if others:
                        step = name, (*args[:place], f"%{others[0]}", *args[place + 1 :]), kwargs
                        node.args = ((*steps[:i], step, *steps[i + 1 :]), *node.args[1:])
                        return [node]
        raise NoPlace("another value of one shape")

    return Fault(f"{_SPOKEN[op]} reads a stale value", change)


def lost_step(op: str = "computed") -> Fault:
    """What reads a step of a call that is several reads what went into that step."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op):
            steps, known, given = _stepped(node)
            for i, (_, args, _) in enumerate(steps[:-1]):
                before = _slot(args[0])
                if before is not None and known[before] == known[given + i]:
                    rest = tuple((n, tuple(f"%{before}" if a == f"%{given + i}" else a for a in some), k) for n, some, k in steps[i + 1 :])
                    node.args = ((*steps[: i + 1], *rest), *node.args[1:])
                    return [node]
        raise NoPlace("a step that leaves a shape alone")

    return Fault(f"a step of {_SPOKEN[op]} is left out", change)


def other_weights(op: str, at: int = 0) -> Fault:
    """Two matrices of one call in each other's place."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, op)[at:]:
            weights: Any = node.args[1]
            for a in range(len(weights)):
                for b in range(a + 1, len(weights)):
                    if facts(weights[a]).info == facts(weights[b]).info and _placed(weights[a]) == _placed(weights[b]):
                        turned = list(weights)
                        turned[a], turned[b] = turned[b], turned[a]
                        node.args = (node.args[0], tuple(turned), *node.args[2:])
                        return [node]
        raise NoPlace("matrices of one shape")

    return Fault(f"matrices of {op} exchanged", change)


def no_sinks(at: int = 0) -> Fault:
    """Attention without the logits that belong to no key."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        for node in sites(graph, "ring_attention", "gathered_attention", "scored_attention_of_a_part", "scored_attention")[at:]:
            steps: Any = node.kwargs.get("steps", ())
            if steps and steps[-1][0] == "sink":
                node.kwargs = {**node.kwargs, "steps": steps[:-1]}
                node.args = (*node.args[:3], [], *node.args[4:])
                return [node]
        raise NoPlace("sinks")

    return Fault("attention without its sinks", change)


def other_sinks() -> Fault:
    """The sinks of another layer."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        found = [n for n in sites(graph, "ring_attention", "scored_attention_of_a_part", "scored_attention") if n.args[3]]
        if len(found) < 2:
            raise NoPlace("two layers with sinks")
        found[1].args = (*found[1].args[:3], found[0].args[3], *found[1].args[4:])
        return [found[1]]

    return Fault("the sinks of another layer", change)


def of_sinks(fault: Callable[[fx.Graph, fx.Node, Groups], list[fx.Node]], name: str) -> Fault:
    """A fault on the way from a sink to the attention that reads it."""

    def change(graph: fx.Graph, groups: Groups) -> list[fx.Node]:
        (node,) = [n for n in sites(graph, "ring_attention", "scored_attention_of_a_part") if n.args[3]][:1] or [None]
        if node is None:
            raise NoPlace("sinks")
        return fault(graph, node.args[3][-1], groups)  # type: ignore[index]

    return Fault(name, change)


def summed_again(axis: int) -> Callable[[fx.Graph, fx.Node, Groups], list[fx.Node]]:
    """Its gradient is summed over this axis of the mesh, too."""

    def change(graph: fx.Graph, sink: fx.Node, groups: Groups) -> list[fx.Node]:
        where = dict(zip(("group", "size", "rank"), groups[axis], strict=True))
        with graph.inserting_after(sink):
            more = set_facts(graph.call_function(collectives.i_to_r, (sink,), where), facts(sink))
        sink.replace_all_uses_with(more, delete_user_cb=lambda one: one is not more)
        return [sink, more]

    return change


def doubled(graph: fx.Graph, sink: fx.Node, groups: Groups) -> list[fx.Node]:
    """Twice the value."""
    with graph.inserting_after(sink):
        more = set_facts(graph.call_function(torch.ops.aten.add.Tensor, (sink, sink)), facts(sink))
    sink.replace_all_uses_with(more, delete_user_cb=lambda one: one is not more)
    return [sink, more]


def named(fault: Fault, name: str) -> Fault:
    """A fault in words."""
    return replace(fault, name=name)
