"""Which form attention has in every layer where an axis cuts the sequence, and what it sends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx

from meshpar.compile.ledger import entries
from meshpar.graph.cost import flops
from meshpar.graph.facts import facts, info_of, infos_of
from meshpar.graph.op import op_name
from meshpar.graph.operators import operator_of
from meshpar.ops import context, convolution, gathered, halo, ring, scans, scored
from meshpar.ops.random import draw
from meshpar.plan import AxisPlan, Plan
from meshpar.report.text import count, table
from meshpar.roles import ROLES
from meshpar.sharding.types import Shard

_FORMS = {
    context.causal_attention: "gather",
    gathered.gathered_attention: "gather",
    ring.ring_attention: "ring",
    halo.halo_attention: "halo",
    scored.scored_halo_attention: "halo",
    scored.scored_attention_of_a_part: "gather",
}
_SAYS = {
    "gather": "a rank's queries meet all keys and values",
    "heads": "a rank has some of the heads, of all positions",
    "ring": "keys and values go round",
    "halo": "the keys and values just before a rank's own are fetched",
    "whole": "every rank computes all of it",
}


def attention(plan: Plan, graph: fx.Graph) -> list[str]:
    """One line for each kind of layer: its form, and the bytes a rank sends for it in a forward."""
    return [line for axis in plan.axes if ROLES[axis.axis].divides == "sequence" for line in _over(axis, graph)]


def _over(axis: AxisPlan, graph: fx.Graph) -> list[str]:
    found: Counter[tuple[str, str, str, int]] = Counter()
    for node in graph.nodes:
        module = re.sub(r"\d+", "*", facts(node).module or "the model")
        if (form := _form(node, axis)) is not None:
            sent = sum(e.nbytes for one in _before(node) for e in entries(one) if e.axis == axis.axis and e.phase == "forward")
            found[module, form, _why_not(node, axis), int(sent)] += 1
        elif (form := _written_out(node, axis)) is not None:
            found[module, form, facts(node).unrecognised or "", 0] += 1
    rows = [
        (f"  {module}", f"x{times}", form, _SAYS[form] + f" ({why})" * bool(why), count(sent, "B") if sent or form in _SENDING else "")
        for (module, form, why, sent), times in found.items()
    ]
    heading = f"Attention over {axis.axis}={axis.size}; the last column is sent by a rank in a forward"
    pieces = [f"  {axis.pieces}"] if axis.pieces else []
    return [heading, *table(rows, right=(4,)), *pieces, *_uneven(axis, graph)] if rows else []


def _uneven(axis: AxisPlan, graph: fx.Graph) -> list[str]:
    """A line where causal attention grows along parts that are in one piece each."""
    for node in graph.nodes:
        if _FORMS.get(node.target, "halo") != "halo" and node.kwargs.get("causal", True):
            segments: Any = node.args[5 if node.target is context.causal_attention else 6]
            if len(segments) == 1 and node.kwargs.get("window") is None:
                most, length = (2 * axis.size - 1) / axis.size, segments[0][0]
                why = f"{2 * axis.size} does not divide the {length} positions: they" if length % (2 * axis.size) else "Positions"
                return [f"  {why} are cut in one piece each, and the last rank has {most:.3g} times the mean of the causal attention"]
    return []


def others(plan: Plan, graph: fx.Graph) -> list[str]:
    """One line for each kind of convolution, scan or recurrence where an axis cuts the sequence: what it is cut along instead."""
    return [line for axis in plan.axes if ROLES[axis.axis].divides == "sequence" for line in _others_over(axis, graph)]


def _others_over(axis: AxisPlan, graph: fx.Graph) -> list[str]:
    found: Counter[tuple[str, str, str]] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or operator_of(node.target).kind not in _ACROSS or facts(node).part_of is None:
            continue
        if not any(info is not None and info.requires_grad for info in infos_of(node)):
            continue
        module = re.sub(r"\d+", "*", facts(node).module or "the model")
        found[module, op_name(node.target).rpartition(".")[2], _other(node, axis)] += 1
    rows = [(f"  {module}", f"x{times}", name, says) for (module, name, says), times in found.items()]
    return [f"Convolutions, scans and recurrences over {axis.axis}={axis.size}", *table(rows)] if rows else []


def _other(node: fx.Node, axis: AxisPlan) -> str:
    """What a rank has of a convolution, scan or recurrence, in words."""
    if axis.axis not in facts(node).cut:
        return _SAYS["whole"]
    if node.target in _NEAR:
        sent = sum(e.nbytes for e in entries(node) if e.axis == axis.axis and e.phase == "forward")
        return f"a rank has its own positions, and {_NEAR[node.target]}: {count(sent, 'B')} forward"
    part = facts(node).part_of
    outs = next((outs for name, _, outs in part.typed if name == axis.axis), ()) if part is not None else ()
    along = outs and isinstance(outs[0], Shard) and operator_of(node.target).kind == "convolution" and outs[0].dim > 1
    return "a rank has its own positions" if along else "a rank has some channels, heads or samples, of all positions (all-to-all)"


_NEAR = {
    convolution.halo_convolution: "fetches those around them",
    scans.cumulated: "is told what those before come to",
}
_ACROSS = ("convolution", "scan", "recurrent")


def _form(node: fx.Node, axis: AxisPlan) -> str | None:
    """The form of a node that is attention."""
    if node.op != "call_function":
        return None
    if node.target in _FORMS:
        return _FORMS[node.target]
    drawn = node.target is draw and node.args  # with dropout
    if not operator_of(node.args[0] if drawn else node.target).sequences:
        return None
    part = facts(node).part_of
    outs = next((outs for name, _, outs in part.typed if name == axis.axis), ()) if part is not None else ()
    if not outs or not isinstance(outs[0], Shard):
        return "whole"
    return "gather" if outs[0].dim == len(info_of(node).shape) - 2 else "heads"


def _why_not(node: fx.Node, axis: AxisPlan) -> str:
    """Why attention has not the form that was asked for."""
    part = facts(node).part_of
    plan = axis.nodes.get(part.origin) if part is not None else None
    return "" if plan is None else plan.why.partition(": ")[2]


def _written_out(node: fx.Node, axis: AxisPlan) -> str | None:
    """The form of a softmax of scores that a model computes itself."""
    if node.op != "call_function" or operator_of(node.target).kind != "softmax" or not operator_of(node.target).weighs:
        return None
    shape, one, part = info_of(node).shape, node.all_input_nodes[0], facts(node).part_of
    while one.op == "call_function" and operator_of(one.target).kind in ("elementwise", "copy", "view", "join", "collective"):
        one = one.all_input_nodes[0]
    if len(shape) < 3 or one.op != "call_function" or op_name(one.target) not in _OF_PAIRS or part is None:
        return None
    outs = next((outs for name, _, outs in part.typed if name == axis.axis), ())
    cut = outs[0].dim if outs and isinstance(outs[0], Shard) else None
    return _WRITTEN["whole" if cut is None else "gather" if cut == len(shape) - 2 else "heads"]


_OF_PAIRS = ("matmul", "bmm", "baddbmm", "einsum")
_WRITTEN = {form: f"products and a softmax, {form}" for form in ("gather", "heads", "whole")}
_SENDING = frozenset(_SAYS)
_SAYS |= {said: f"not recognised as attention: {_SAYS[form]}" for form, said in _WRITTEN.items()}


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what brings it its queries, keys and values: back to the products that make them."""
    yield node
    todo, seen = list(node.all_input_nodes[:3]), {node}
    while todo:
        one = todo.pop()
        if one in seen or one.op != "call_function" or flops(one) > 0:
            continue
        seen.add(one)
        yield one
        todo += one.all_input_nodes
