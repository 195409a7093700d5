"""Attention, written in another way than the model does it, or of parts of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isclose
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import info_of
from meshpar.graph.op import Op, Value, op_name, value_info, value_of
from meshpar.proof.static.calls import PlainCall
from meshpar.proof.static.forms import PARTIAL, WHOLE, Outcome, told
from meshpar.proof.static.layout import layout_of
from meshpar.proof.static.masks import Masks
from meshpar.proof.static.report import Contradiction
from meshpar.sharding.types import Shard, Type

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_OWN = (
    "meshpar.ops.context.grouped_attention",
    "meshpar.ops.halo.windowed_attention",
    "meshpar.ops.scored.scored_attention",
)


def is_attention(op: Op) -> bool:
    """Whether a call of the model's graph is attention as a whole."""
    return op.node.target is SDPA or op.name in _OWN


def aligned(op: Op, call: PlainCall, values: Sequence[Value], masks: Masks) -> Op:
    """The model's attention with the operands that the call reads: without a causal mask, without copies of grouped heads.

    Raises Contradiction where it is not the same.
    """
    wanted = [value_of(a) for a in op.operands]
    here, there = call.arguments, op.arguments
    if values[0] != wanted[0]:
        raise Contradiction("its queries are not those of the model")
    short = [_ungrouped(a) for a in op.operands[1:3]]
    grouped = [v for v in short if v is not None]
    if list(values[1:3]) != wanted[1:3]:
        if list(values[1:3]) != grouped:
            raise Contradiction("its keys and values are not those of the model")
        if not here["enable_gqa"]:
            raise Contradiction("heads of keys and values are grouped, and it is not told so")
    if len(values) == 3 and len(wanted) == 4:
        if not here["is_causal"]:
            raise Contradiction("the model's mask is left out")
        masks.check_causal(op.operands[3], op.shapes[0][-2], op.shapes[1][-2])
    elif len(values) != len(wanted) or list(values[3:]) != wanted[3:]:
        raise Contradiction("its mask is not that of the model")
    elif bool(here["is_causal"]) != bool(there.get("is_causal")):
        raise Contradiction("one of the two is causal, the other is not")
    return _as_called(op, call, values)


def _as_called(op: Op, call: PlainCall, values: Sequence[Value]) -> Op:
    here, there = call.arguments, op.arguments
    scales = [a if a is not None else op.shapes[0][-1] ** -0.5 for a in (here.get("scale"), there.get("scale"))]
    if not isclose(*scales, rel_tol=1e-9) or (here.get("dropout_p") or 0.0) != (there.get("dropout_p") or 0.0):
        raise Contradiction("its scale or its dropout is not that of the model")
    infos = tuple(value_info(v) for v in values)
    nodes = tuple(v[0] for v in values)
    return replace(op, operands=nodes, infos=infos, arguments={**there, "is_causal": here["is_causal"], "enable_gqa": here["enable_gqa"]})


def _ungrouped(repeated: fx.Node) -> Value | None:
    """`k [b, g, s, e]` where a value is k with each head n times in a row."""
    if repeated.target is torch.ops.aten.repeat_interleave.self_int and isinstance(original := repeated.args[0], fx.Node):
        heads = len(repeated.args) > 2 and repeated.args[2] in (1, -3) and len(info_of(repeated).shape) == 4
        return value_of(original) if heads else None
    if op_name(repeated.target) not in ("reshape", "view", "_unsafe_view"):
        return None
    copied = repeated.args[0]
    while isinstance(copied, fx.Node) and op_name(copied.target) == "clone":
        copied = copied.args[0]
    wide = copied.args[0] if isinstance(copied, fx.Node) and op_name(copied.target) == "expand" else None
    if not isinstance(wide, fx.Node) or op_name(wide.target) != "unsqueeze" or not isinstance(wide.args[0], fx.Node):
        return None
    assert isinstance(copied, fx.Node)
    before, between, after = info_of(wide.args[0]).shape, info_of(copied).shape, info_of(repeated).shape
    repeats = between == (*before[:2], between[2], *before[2:]) and wide.args[1] in (2, -3)
    return value_of(wide.args[0]) if repeats and after == (before[0], before[1] * between[2], *before[2:]) else None


def on_its_axis(op: Op, call: PlainCall, types: Sequence[Type], ranks: int) -> Outcome:
    """Attention of the queries that a rank holds, on the axis that cuts them."""
    query = types[0]
    if not isinstance(query, Shard) or query.dim != len(op.shapes[0]) - 2:
        raise Contradiction(f"it takes a part of the queries, which are {told(query)}")
    if Shard(*call.cut).dim != query.dim or layout_of(Shard(*call.cut), ranks) != layout_of(query, ranks):
        raise Contradiction(f"it is told that ranks have the positions {Shard(*call.cut)}, they have {query}")
    _check_pattern(op, call)
    if call.way in ("gathered", "ring"):
        return _of_all_keys(op, call, types, ranks)
    if call.way == "queries":
        if any(isinstance(t, Shard) for t in types[1:3]):
            raise Contradiction("it takes all keys and values, and is handed a part")
        return Outcome((query,), (WHOLE, PARTIAL, PARTIAL, *_added(op, types, ranks)))
    for one in types[1:3]:
        if not isinstance(one, Shard) or one.dim != query.dim or layout_of(one, ranks) != layout_of(query, ranks):
            raise Contradiction(f"keys and values are {told(one)}, it takes the parts of the positions of the queries")
    if any(shape[-1:] not in ((), (1,)) for shape in op.shapes[3:]):
        raise Contradiction("what is added to its scores depends on keys, of which it meets a few")
    return Outcome((query,), (WHOLE, WHOLE, WHOLE, *_added(op, types, ranks)))


def _of_all_keys(op: Op, call: PlainCall, types: Sequence[Type], ranks: int) -> Outcome:
    """Keys and values of all ranks are met inside; their gradients come back as parts. A mask is that of the queries."""
    query = types[0]
    assert isinstance(query, Shard)
    keys = Shard(query.dim, 1, tuple(call.told["keys"]))
    for one in types[1:3]:
        if not isinstance(one, Shard) or one.dim != query.dim or layout_of(one, ranks) != layout_of(keys, ranks):
            raise Contradiction(f"keys and values are {told(one)}, it gathers {keys}")
    return Outcome((query,), (WHOLE, WHOLE, WHOLE, *_added(op, types, ranks)))


def _added(op: Op, types: Sequence[Type], ranks: int) -> tuple[Any, ...]:
    """Of each operand that is added to scores, what its gradient is. Its queries are those of the rank."""
    query, found = types[0], list[Any]()
    assert isinstance(query, Shard)
    for mask, shape in zip(types[3:], op.shapes[3:], strict=True):
        rows = len(shape) - 2
        if not isinstance(mask, Shard) and (rows < 0 or shape[rows] == 1):
            found.append(PARTIAL)
        elif not isinstance(mask, Shard) or mask.dim != rows or layout_of(mask, ranks) != layout_of(query, ranks):
            raise Contradiction(f"its mask is {told(mask)}, the queries are {query}")
        else:
            found.append(WHOLE)
    return tuple(found)


def _check_pattern(op: Op, call: PlainCall) -> None:
    window = op.arguments.get("window")
    causal = bool(op.arguments.get("is_causal", window is not None)) or window is not None
    if call.told["window"] != window or (window is None and bool(call.told["causal"]) != causal):
        raise Contradiction("which keys a query sees is not what the model says")
