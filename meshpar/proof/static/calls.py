"""A call of a lowered graph as a call of torch's own operator: what lowering puts in the place of operators is read back.

vocab_parallel.embedding(ids, w, 0, 0, 1, ((131, 1),), group=...)     ->     embedding(w, ids, 0), rows of w cut
draw(op, x, 0.1, key=..., number=3, shards=...)                       ->     op(x, 0.1), drawn anew on the axes of `shards`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.op import op_name
from meshpar.ops.convolution import convolved
from meshpar.ops.scored import scored_attention
from meshpar.ops.shifts import shifted

aten = torch.ops.aten


@dataclass(frozen=True)
class PlainCall:
    """A call of an operator, and what is special about how it is done."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    way: str = ""
    """How it is done on the axis of `group`: "vocabulary", "queries" (of a causal attention), "gathered", "ring", "halo",
    "near" (with what lies around a part), "prefix" (with what lies before it); else empty."""
    group: str = ""
    cut: tuple[Any, ...] = ()
    """The shard (dim, repeat, segments) that a special way is told."""
    shards: tuple[tuple[str, int, int], ...] | None = None
    """Of a random operator: the axes on which its ranks draw numbers of their own."""
    draw: tuple[Any, int] | None = None
    """Of a random operator: its key and its number."""
    transposed: bool = False
    """Whether its second operand is the transpose of what it is handed."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a special way is told that the operator is not."""

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operands."""
        found: list[fx.Node] = []
        fx.map_arg((self.args, dict(self.kwargs)), lambda n: found.append(n))
        return tuple(found)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            return dict(self.kwargs)
        found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        found.update({a.name: v for a, v in zip(schema.arguments, self.args, strict=False)})
        return {**found, **self.kwargs}


def plain_call(node: fx.Node, origin: Any) -> PlainCall:
    """What a node calls. `origin`: the operator of the model's graph that it is said to stand for, or None."""
    read = _READ.get(op_name(node.target))
    if read is not None:
        return read(node.args, dict(node.kwargs), origin)
    return PlainCall(node.target, node.args, dict(node.kwargs))


def _embedding(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    ids, weight, padding, *cut = args
    return PlainCall(aten.embedding.default, (weight, ids, padding), {}, "vocabulary", kwargs["group"], tuple(cut))


def _cross_entropy(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    logits, target, weight, *cut = args
    reduction = {"sum": 2, "none": 0}[kwargs["reduction"]]
    rest = (logits, target, weight, reduction, kwargs["ignore_index"], kwargs["label_smoothing"])
    return PlainCall(aten.cross_entropy_loss.default, rest, {}, "vocabulary", kwargs["group"], tuple(cut))


def _attention(way: str) -> Callable[[Sequence[Any], dict[str, Any], Any], PlainCall]:
    def read(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
        told = {"window": kwargs.get("window"), "causal": kwargs.get("causal", True)}
        scale, grouped = kwargs.get("scale"), kwargs.get("enable_gqa", False)
        call = (*args[:3], None, 0.0, bool(told["causal"]))
        return PlainCall(aten.scaled_dot_product_attention.default, call, {"scale": scale, "enable_gqa": grouped}, way, kwargs["group"],
                         tuple(args[3:6]), told=told)  # fmt: skip

    return read


def _near(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    said = {name: kwargs[name] for name in ("left", "stride", "dilation", "groups")}
    operands = tuple(a for a in args[:3] if a is not None)
    return PlainCall(convolved, operands, said, "near", kwargs["group"], tuple(args[3:6]), told={"out": kwargs["out"]})


def _prefix(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    x, how, dtype, *cut = args
    named = {} if how == "logcumsumexp" else {"dtype": dtype}
    return PlainCall(getattr(aten, how).default, (x, cut[0]), named, "prefix", kwargs["group"], tuple(cut))


def _shifted(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    x, *cut = args
    return PlainCall(shifted, (x,), {name: kwargs[name] for name in ("dim", "by")}, "prefix", kwargs["group"], tuple(cut))


def _gathered(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    told = {"window": kwargs.get("window"), "causal": bool(kwargs.get("causal", False)), "keys": kwargs["keys"]}
    named = {"scale": kwargs.get("scale"), "enable_gqa": kwargs.get("enable_gqa", False)}
    call = (*args[:4], 0.0, told["causal"])
    return PlainCall(aten.scaled_dot_product_attention.default, call, named, "gathered", kwargs["group"], tuple(args[4:7]), told=told)


def _scored(way: str) -> Callable[[Sequence[Any], dict[str, Any], Any], PlainCall]:
    """Attention of a part with steps of scores; in a ring torch's own too, whose mask is the only one."""

    def read(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
        added, cut = args[3], args[4:7]
        told = {"window": kwargs.get("window"), "causal": bool(kwargs.get("causal", way == "halo")), "keys": cut[2]}
        named = {"scale": kwargs.get("scale"), "enable_gqa": kwargs.get("enable_gqa", False)}
        if origin is scored_attention:
            named |= {"steps": kwargs["steps"], "is_causal": told["causal"], "window": told["window"]}
            call, target = (*args[:3], added), scored_attention
        else:
            call, target = (*args[:3], *(added or [None]), 0.0, told["causal"]), aten.scaled_dot_product_attention.default
        return PlainCall(target, call, named, way, kwargs["group"], tuple(cut), told=told)

    return read


def _drawn(target: Any) -> Callable[[Sequence[Any], dict[str, Any], Any], PlainCall]:
    def read(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
        given = dict(kwargs)
        key, number, shards = given.pop("key"), given.pop("number"), tuple(given.pop("shards", ()))
        if (part := given.pop("part", None)) is not None:  # drawn whole, of which the rank takes its part: ranks differ
            shards = (*shards, tuple(part[3:6]))
        op, rest = (args[0], tuple(args[1:])) if target is None else (target, tuple(args))
        return PlainCall(op, rest, given, shards=shards, draw=(key, number))

    return read


def _linear(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    given = tuple(args[:3]) if len(args) > 2 and args[2] is not None else tuple(args[:2])
    return PlainCall(aten.linear.default, given)


def _matmul(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    x, weight, added = args[0], args[1], args[2] if len(args) > 2 else None
    if added is not None:
        return PlainCall(aten.addmm.default, (added, x, weight))
    return PlainCall(origin if op_name(origin) == "mm" else aten.matmul.default, (x, weight))


def _grouped(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    return PlainCall(torch.ops.meshpar.grouped_mm.default, tuple(args[:3]), transposed=bool(args[3]))


def _grouped_beside(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    return PlainCall(torch.ops.meshpar.grouped_mm.default, tuple(args[:3]))


def _dispatch(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    return PlainCall(torch.ops.meshpar.dispatch.default, (*args[:3], *args[4:]))


def _first_rank(args: Sequence[Any], kwargs: dict[str, Any], origin: Any) -> PlainCall:
    (given, named), target = args[1], args[0]
    read = _READ.get(op_name(target))
    call = PlainCall(target, tuple(given), dict(named)) if read is None else read(given, dict(named), origin)
    return replace(call, told={**call.told, "each": kwargs["group"]})


_READ: Mapping[str, Callable[[Sequence[Any], dict[str, Any], Any], PlainCall]] = {
    "meshpar.ops.vocab_parallel.embedding": _embedding,
    "meshpar.ops.vocab_parallel.cross_entropy": _cross_entropy,
    "meshpar.ops.context.causal_attention": _attention("queries"),
    "meshpar.ops.gathered.gathered_attention": _gathered,
    "meshpar.ops.ring.ring_attention": _scored("ring"),
    "meshpar.ops.scored.scored_attention_of_a_part": _scored("queries"),
    "meshpar.ops.scored.scored_halo_attention": _scored("halo"),
    "meshpar.ops.halo.halo_attention": _attention("halo"),
    "meshpar.ops.convolution.halo_convolution": _near,
    "meshpar.ops.scans.cumulated": _prefix,
    "meshpar.ops.shifts.halo_shifted": _shifted,
    "meshpar.ops.random.draw": _drawn(None),
    "meshpar.ops.random.dropout": _drawn(aten.dropout.default),
    "meshpar.ops.random.native_dropout": _drawn(aten.native_dropout.default),
    "meshpar.ops.deferred.linear": _linear,
    "meshpar.ops.deferred.matmul": _matmul,
    "meshpar.ops.deferred.grouped_mm": _grouped,
    "meshpar.ops.products.linear": _linear,
    "meshpar.ops.products.matmul": _matmul,
    "meshpar.ops.products.grouped_mm": _grouped_beside,
    "meshpar.ops.load.dispatch": _dispatch,
    "meshpar.ops.each_rank.each_rank": _first_rank,
}
