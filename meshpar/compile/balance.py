"""How many pieces of a sequence each rank gets, where attention passes over what a mask of the batch hides: told by an example.

    four documents, 2 ranks     |0 0 0 0|0 0 1 1|1 1 1 2|2 2 3 3|     two pieces a rank: one has those at the ends, the other the middle
    pairs of a rank             counted in the tiles that would be computed (`ops/uneven.py`): none is

Of 2, 4, 8, ... pieces a rank the fewest are taken that bring the rank with most within 1.05 of the mean, or the best there are; if what
that saves is more than what it costs (a halo is fetched for each piece).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod

import torch
from torch import Tensor, fx

from meshpar._torch import OpOverload, without_modes
from meshpar.errors import PlanError
from meshpar.graph.facts import Info, facts, info_of
from meshpar.graph.op import Op, operands, read
from meshpar.graph.operators import operator_of
from meshpar.ops.scored import scored_attention
from meshpar.ops.tiles import hiding, shown_by
from meshpar.ops.uneven import Visible, pairs
from meshpar.plan import AxisPlan
from meshpar.sharding.attention import said_form
from meshpar.sharding.extents import dealt_out
from meshpar.sharding.local import steps_of
from meshpar.sharding.policy import Request, chunk_counts
from meshpar.sharding.solve import Solved, solved
from meshpar.sharding.types import Shard, plain

WITHIN = 1.05
"""The rank with most may compute so many times the mean."""
LEAST = 32
"""The fewest positions of a piece: tiles of fewer queries are mostly overhead."""
MOST = 2**31
"""Masks that are made of values of more bytes are not looked at."""
_TOUCHED = 120.0
"""Bytes of memory that a score is read from and written to: in float32, about ten times forward and twenty backward."""
_MATTERS = 0.01
"""The share of a step that more pieces must save."""


@dataclass(frozen=True)
class ExampleBatch:
    """A batch to look at: of one microbatch, the tensors by the names of the graph's placeholders, and the graph's constants."""

    inputs: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]


def in_pieces(graph: fx.Graph, request: Request, first: Solved, example: ExampleBatch) -> Solved:
    """The solution with as many pieces of sequences a rank as pay for the example, and why. `first`: that with as many as usual."""
    attentions = _in_tiles(graph, request, first.plan, _Masks(graph, example))
    if not any(one.shown.any_of is not None for one in attentions):
        return first
    before = attentions[0].pieces
    shares = {n: _Share.of(attentions, n, request.size) for n in dict.fromkeys([*_counts(attentions, request.size), before])}
    best = fewest({n: share.uneven for n, share in shares.items() if n >= before})
    saved = shares[before].most - shares[best].most
    if best == before:
        return first if shares[before].uneven <= WITHIN else _told(first, shares, before, "others do no better")
    if saved < _MATTERS * first.seconds:
        return _told(first, shares, before, f"in {pieces(best)} it would save little of a step")
    try:
        found = solved(graph, replace(request, chunks=best))
    except PlanError as error:
        return _told(first, shares, before, f"in {pieces(best)} they cannot be had: {error}")
    if found.seconds - first.seconds > saved:
        return _told(first, shares, before, f"in {pieces(best)} they would cost more than they save")
    return _told(found, shares, best, f"in {pieces(before)} {shares[before].uneven:.2f} times")


def fewest(uneven: Mapping[int, float]) -> int:
    """Of numbers of pieces, with the most that a rank computes against the mean: the fewest within 1.05, or the most even.

    >>> fewest({1: 1.9, 2: 1.4, 4: 1.04, 8: 1.01}), fewest({1: 1.9, 2: 1.4})
    (4, 2)
    """
    return next((n for n in sorted(uneven) if uneven[n] <= WITHIN), min(uneven, key=lambda n: uneven[n]))


def as_before(graph: fx.Graph, request: Request, chunks: int) -> Request:
    """The request with as many pieces as an earlier program has, or as many of those as divide the positions of this one."""
    lengths = {info_of(operands(node)[0]).shape[-2] for node in graph.nodes if _is_attention(node)}
    common = [n for n in range(1, chunks + 1) if all(n in chunk_counts(length, request.size) for length in lengths)]
    return replace(request, chunks=common[-1]) if common and common[-1] > 1 else request


def _told(found: Solved, shares: Mapping[int, _Share], chunks: int, why: str) -> Solved:
    said = f"Positions are dealt out in {pieces(chunks)} a rank: the one with most computes {shares[chunks].uneven:.2f} times the mean"
    return replace(found, plan=replace(found.plan, chunks=chunks, pieces=f"{said} of the tiles that the example's masks leave; {why}"))


def as_asked(found: AxisPlan, graph: fx.Graph, chunks: int) -> AxisPlan:
    """The plan, with the reason why there are so many pieces, if there is attention at all."""
    said = f"Positions that attention is uneven along are dealt out in {pieces(chunks)} a rank, as was asked for"
    return replace(found, pieces=said) if any(map(_is_attention, graph.nodes)) else found


def pieces(count: int) -> str:
    """In words."""
    return "one piece" if count == 1 else f"{count} pieces"


@dataclass(frozen=True)
class _Attention:
    """Attention that is computed in tiles."""

    shown: Visible
    length: int
    """How many queries there are."""
    ring: bool
    pieces: int
    """Of the queries, a rank."""
    seconds: float
    """Of a pair of a query and a key, for all samples and heads, forward and backward."""


def _is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_of(node.target).sequences


def _in_tiles(graph: fx.Graph, request: Request, plan: AxisPlan, masks: _Masks) -> list[_Attention]:
    found = []
    for node in graph.nodes:
        if not _is_attention(node):
            continue
        op, cut, form = read(node), plan.nodes[node.name].uses[0], said_form(plan.nodes[node.name].why)
        if not isinstance(cut, Shard) or cut.dim != len(op.shapes[0]) - 2:
            continue
        if form == "ring" or (form is None and node.target is scored_attention):
            (*outer, length, width), keys = op.shapes[0], op.shapes[1][-2]
            rows = prod(outer)  # of samples and heads; two products, and five in backward
            seconds = request.price.compute(7.0 * rows * (width + op.shapes[2][-1]), _TOUCHED * rows)
            window = op.arguments.get("window")
            causal = bool(op.arguments.get("is_causal", window is not None))
            shown = Visible(keys, causal, window, masks.of(op, length))
            found.append(_Attention(shown, length, form == "ring", len(cut.segments), seconds))
    return found


def _counts(attentions: list[_Attention], size: int) -> list[int]:
    """The numbers of pieces that may be taken."""
    lengths = {one.length for one in attentions}
    every = (1, 2, 4, 8, 16, 32, 64, 128)
    return [n for n in every if all(n in chunk_counts(length, size) and length >= n * size * LEAST for length in lengths)]


@dataclass(frozen=True)
class _Share:
    """Seconds that ranks compute attention."""

    most: float
    uneven: float
    """The most against the mean."""

    @staticmethod
    def of(attentions: list[_Attention], chunks: int, size: int) -> _Share:
        known: dict[tuple[object, ...], list[int]] = {}
        ranks = [0.0] * size
        for one in attentions:
            cut = plain(0, one.length) if chunks == 1 else Shard(0, 1, dealt_out(one.length, chunks))
            key = id(one.shown.any_of), one.shown.causal, one.shown.window, one.length, one.shown.keys, one.ring
            if key not in known:
                known[key] = pairs(one.shown, cut, size, ring=one.ring)
            ranks = [seconds + count * one.seconds for seconds, count in zip(ranks, known[key], strict=True)]
        return _Share(max(ranks), max(ranks) * size / (sum(ranks) or 1.0))


class _Masks:
    """The masks of an example."""

    def __init__(self, graph: fx.Graph, example: ExampleBatch) -> None:
        self.graph, self.example = graph, example
        self.known: dict[tuple[tuple[fx.Node, str], ...], Callable[[int, int], Tensor] | None] = {}

    def of(self, op: Op, queries: int) -> Callable[[int, int], Tensor] | None:
        """What any sample and head sees, of what the operands of an attention hide; None where that is not known."""
        steps = op.arguments["steps"] if op.node.target is scored_attention else steps_of(op)
        hide = tuple(dict.fromkeys((op.operands[3:][place], by) for place, by in hiding(steps)))
        shape = queries, op.shapes[1][-2]
        if hide not in self.known:
            seen = [one for node, by in hide if (one := self._seen(node, by, shape)) is not None]
            self.known[hide] = partial(_any_of, reduce(torch.logical_and, seen)) if seen else None
        return self.known[hide]

    def _seen(self, mask: fx.Node, by: str, shape: tuple[int, int]) -> Tensor | None:
        needed = self._needed(mask)
        if needed is None or info_of(mask).shape[-2:] != shape:
            return None
        seen = shown_by(self._computed(mask, needed), by)
        return seen.flatten(0, -3).any(0) if seen.dim() > 2 else seen

    def _needed(self, mask: fx.Node) -> list[fx.Node] | None:
        """What a mask is computed from, if that is the batch, constants and numbers, and no larger than can be looked at."""
        found: set[fx.Node] = set()
        todo, of_batch = [mask], False
        while todo:
            node = todo.pop()
            if node in found:
                continue
            found.add(node)
            if node.op == "placeholder" and node.target in self.example.inputs:
                of_batch = True
            elif node.op == "call_function" and _is_plain(node):
                todo += operands(node)
            elif node.op != "get_attr" or node.target not in self.example.constants:
                return None
        return [node for node in self.graph.nodes if node in found] if of_batch else None

    def _computed(self, mask: fx.Node, needed: list[fx.Node]) -> Tensor:
        values: dict[fx.Node, Tensor] = {}
        last = {one: node for node in needed for one in operands(node)}
        device = next(iter(self.example.inputs.values())).device
        with without_modes(), torch.no_grad():
            for node in needed:
                if node.op == "placeholder":
                    values[node] = self.example.inputs[str(node.target)].to(device)
                elif node.op == "get_attr":
                    values[node] = self.example.constants[str(node.target)].to(device)
                else:
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                    values[node] = node.target(*args, **({**kwargs, "device": device} if "device" in kwargs else kwargs))  # type: ignore[operator]
                for one in operands(node):
                    if last[one] is node:
                        del values[one]
        return values[mask]


def _any_of(mask: Tensor, low: int, high: int) -> Tensor:
    return mask[low:high].any(0)


def _is_plain(node: fx.Node) -> bool:
    """Whether an operator can be run here: one of torch's, on no more than can be looked at, that draws nothing."""
    info = facts(node).info
    plain_ = isinstance(node.target, OpOverload) and node.target.namespace == "aten" and facts(node).seed is None
    small = node.target is torch.ops.aten.expand.default or (isinstance(info, Info) and info.nbytes <= MOST)
    return plain_ and small and isinstance(info, Info) and not info.requires_grad
