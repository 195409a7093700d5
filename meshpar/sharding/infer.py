"""Read a graph once: the signature of every operator, and which dims of which values are the same extent."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import Op, Value, kind_of, read, value_of
from meshpar.graph.operators import OPERATORS, operator_of
from meshpar.sharding.extents import Extents, Pattern, beside, join, nest
from meshpar.sharding.notation import Dim, Dims, Signature

Axes = tuple[int | None, ...]
"""The extent of every dim of a value; None for dims of size 1."""


@dataclass(frozen=True)
class BoundOp:
    """One operator call with its signature and the extent behind each of its names."""

    op: Op
    signature: Signature | None
    names: Mapping[str, int]
    rows: tuple[int, ...]
    """The extents of its dims that are rows of segments."""
    kind: tuple[object, ...]
    """Equal for calls that differ in nothing but the values they are given (see `op.kind_of`)."""


@dataclass(frozen=True)
class Inference:
    """What the rules say about a whole graph."""

    extents: Extents
    dims: Mapping[Value, Axes]
    calls: Mapping[fx.Node, BoundOp]


def infer(graph: fx.Graph) -> Inference:
    """Bind every rule and unify extents along the graph, in time linear in its size."""
    extents = Extents()
    dims: dict[Value, Axes] = {}
    calls: dict[fx.Node, BoundOp] = {}
    signatures: dict[tuple[object, ...], Signature | None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if facts(node).info is not None:
                dims[node, 0] = _fresh(extents, info_of(node).shape)
        elif node.op == "call_function" and node.target is not operator.getitem:
            call = _call(extents, dims, node, signatures)
            calls[node] = call
    for node, call in calls.items():
        if operator_of(node.target).kind in ("product", "convolution"):
            for operand in call.op.operands:
                if operand.op == "get_attr":
                    for one in dims[operand, 0]:
                        if one is not None:
                            extents.fuse(one)
    return Inference(extents, dims, calls)


def signature_of(op: Op) -> Signature | None:
    """What the rule of an operator says of a call, or None where it has none and must run on invariant values."""
    rule = operator_of(op.node.target).rule
    if rule is None or (op.name not in OPERATORS and _only_forward(op)):
        return None
    if "dim" in op.arguments and op.infos and not op.infos[0].shape:
        return None  # along the dim that a number is taken to have: nothing to cut
    found = rule(op)
    return found if found is not None and _fits(found, op) else None


def _only_forward(op: Op) -> bool:
    """Whether torch's tag, by which an operator without a row is known, speaks of its forward alone."""
    return not op.infos or (op.nature is not None and not op.nature.elementwise)


def _fits(found: Signature, op: Op) -> bool:
    return (
        len(found.inputs) == len(op.infos)
        and all(_spells(dims, i.shape, found) for dims, i in zip(found.inputs, op.infos, strict=True))
        and len(found.outputs) >= sum(o is not None for o in op.outs)
        and all(o is None or _spells(dims, o.shape, found) for dims, o in zip(found.outputs, op.outs, strict=False))
    )


def _spells(dims: Dims, shape: Sequence[int], found: Signature) -> bool:
    """Whether the names of every dim make up its size."""
    return len(dims) == len(shape) and all(
        not dim or sum(prod(found.sizes[name] for name in segment) for segment in dim) == n for dim, n in zip(dims, shape, strict=True)
    )


def _fresh(extents: Extents, shape: tuple[int, ...]) -> Axes:
    return tuple(extents.new(n) if n > 1 else None for n in shape)


def _call(extents: Extents, dims: dict[Value, Axes], node: fx.Node, signatures: dict[tuple[object, ...], Signature | None]) -> BoundOp:
    op, kind = read(node), kind_of(node)
    if kind not in signatures:
        signatures[kind] = signature_of(op)
    signature = signatures[kind]
    names: dict[str, int] = {}
    if signature is not None:
        for operand, labels in zip(op.operands, signature.inputs, strict=True):
            for dim, one in zip(labels, dims[value_of(operand)], strict=True):
                if len(dim) == 1 and len(dim[0]) == 1 and one is not None:
                    _meet(extents, names, dim[0][0], one)
        for operand, labels in zip(op.operands, signature.inputs, strict=True):
            for dim, one in zip(labels, dims[value_of(operand)], strict=True):
                if dim and one is not None and not (len(dim) == 1 and len(dim[0]) == 1):
                    extents.unify(one, _build(extents, names, dim, signature))
    for index, info in enumerate(op.outs):
        if info is None:
            continue
        if signature is None:
            dims[node, index] = _fresh(extents, info.shape)
        else:
            dims[node, index] = _result(extents, names, signature, index, info.shape)
    rows = [] if signature is None else _rows(dims, op, signature)
    return BoundOp(op, signature, names, tuple(rows), kind)


def _rows(dims: Mapping[Value, Axes], op: Op, signature: Signature) -> list[int]:
    """The extents of the dims that a signature reads as segments."""
    values = [*(value_of(operand) for operand in op.operands), *((op.node, index) for index in range(len(op.outs)))]
    labelled = zip(values, (*signature.inputs, *signature.outputs), strict=False)
    return [one for value, labels in labelled for dim, one in zip(labels, dims.get(value, ())) if len(dim) > 1 and one is not None]


def _result(extents: Extents, names: dict[str, int], signature: Signature, index: int, shape: tuple[int, ...]) -> Axes:
    """The extents of one result: built from its names where it has any."""
    found: list[int | None] = []
    for dim, n in zip(signature.outputs[index], shape, strict=True):
        if n <= 1:
            found.append(None)
        else:
            found.append(_build(extents, names, dim, signature) if dim else extents.new(n))
    return tuple(found)


def _meet(extents: Extents, names: dict[str, int], name: str, one: int) -> None:
    if name in names:
        extents.unify(names[name], one)
    else:
        names[name] = one


def _build(extents: Extents, names: dict[str, int], dim: Dim, signature: Signature) -> int:
    def named(name: str) -> int:
        if name not in names:
            names[name] = extents.new(signature.sizes[name])
        return names[name]

    segments = [extents.product([named(n) for n in segment]) for segment in dim]
    return extents.row(segments)


def pattern_in(call: BoundOp, extents: Extents, dim: Dim, group: frozenset[str], factor: int) -> Pattern | None:
    """How `factor` lies in a dim of an operand when exactly the names of `group` are cut, or None when that is impossible."""
    found: list[Pattern] = []
    assert call.signature is not None
    sizes = call.signature.sizes
    held = _held(call, extents, group, factor)
    for segment in dim:
        hits = [i for i, n in enumerate(segment) if n in group]
        if len(hits) != 1:
            return None
        at = hits[0]
        inner = held.get(segment[at])
        if inner is None:
            return None
        outer = 1
        for n in segment[:at]:
            outer *= sizes[n]
        rest = 1
        for n in segment[at + 1 :]:
            rest *= sizes[n]
        found.append(nest(outer, inner, rest))
    return join(found)


def _held(call: BoundOp, extents: Extents, group: frozenset[str], factor: int) -> Mapping[str, Pattern | None]:
    """How a factor lies in each name of a group; fellow segments of what a matrix computes are cut `beside` it."""
    names = sorted(name for name in group if name in call.names)
    patterns = [extents.pattern(call.names[name], factor) for name in names]
    if any(extents.is_fused(row) for row in call.rows):
        patterns = beside(patterns, [extents.size(call.names[name]) for name in names])
    return dict(zip(names, patterns, strict=True))
