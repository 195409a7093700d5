"""The communication ledger of a lowered graph: every collective, with the bytes each device sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx

from meshpar.compile.exposure import COUNTS, exposed
from meshpar.compile.split import StageGraph
from meshpar.graph.facts import Change, Exchange, Info, facts, gives_several, info_of
from meshpar.graph.op import op_name, operands, value_info
from meshpar.ops import convolution, expert_pieces, gathered, halo, pieces, ring, scans, scored, shifts, token_pieces, vocab_parallel
from meshpar.plan import Comm
from meshpar.roles import stage_axis
from meshpar.sharding.conversions import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, conversion, wire_bytes
from meshpar.sharding.price import Price
from meshpar.sharding.types import Shard


def ledger(graph: fx.Graph, price: Price | None = None) -> tuple[Comm, ...]:
    """One entry per collective and phase of one microbatch, in program order.

    Bytes are what each device sends with ring algorithms: an all-reduce of n bytes over t ranks sends 2 n (t-1)/t. Seconds are those of
    `price`.
    """
    price = price or Price()
    return tuple(_timed(node, entry, price) for node in graph.nodes for entry in entries(node))


def _timed(node: fx.Node, entry: Comm, price: Price) -> Comm:
    seconds = price.collective(entry.nbytes)
    return replace(entry, seconds=seconds, exposed=exposed(node, entry, seconds, price))


def staged_ledger(stages: Sequence[StageGraph], ranks: Sequence[int], price: Price) -> tuple[Comm, ...]:
    """The same for the stages of a pipeline, with what they send to each other: whole values, by each device its own part.

    `ranks`: of each stage; those that meet on one rank send nothing.
    """
    found: list[Comm] = []
    for stage in stages:
        found += [replace(entry, stage=stage.index) for entry in ledger(stage.graph, price)]
        if stage.index > 0 and ranks[stage.index] != ranks[stage.index - 1]:
            found += _sent(stage)
    return tuple(found)


def _sent(stage: StageGraph) -> Iterator[Comm]:
    for node in stage.graph.nodes:
        if node.op == "placeholder" and node.name in stage.receives:
            info, module, region = info_of(node), facts(node).module or "", facts(node).region or ""
            yield Comm("send", stage_axis(), "forward", float(info.nbytes), 1, node.name, module, region, stage.index - 1)
            if info.requires_grad:
                yield Comm("send", stage_axis(), "backward", float(info.nbytes), 1, node.name, module, region, stage.index)


def entries(node: fx.Node) -> Iterator[Comm]:
    """What one node sends."""
    known = facts(node)
    if known.conversion is not None:
        yield from _converted(node, [known.conversion])
    if node.target is pieces.gathered and known.conversion is not None:
        yield from _again(node, known.conversion)
    if known.joined:
        yield from _converted(node, known.joined)
    if node.target is expert_pieces.through_experts:
        there, ends = known.inside[0].exchange, known.inside[2].info
        assert there is not None
        assert isinstance(ends, Info)
        yield from _exchanged(node, there, ends.shape[0])
    if node.target is token_pieces.on_gathered_tokens:
        for change in (known.inside[0].conversion, known.inside[-1].conversion):
            assert change is not None
            yield from _converted(node, [change])
    if known.exchange is not None:
        yield from _exchanged(node, known.exchange, value_info((node, 1)).shape[0] if gives_several(node) else 0)
    if node.target in (ring.ring_attention, halo.halo_attention, scored.scored_halo_attention):
        yield from _between_parts(node)
    if node.target is convolution.halo_convolution:
        yield from _around(node)
    if node.target is shifts.halo_shifted:
        yield from _before(node)
    if node.target is scans.cumulated:
        yield from _totals(node)
    if node.target is gathered.gathered_attention:
        yield from _gathered(node)
    if node.target is vocab_parallel.cross_entropy:
        target: Any = node.args[1]
        where: dict[str, Any] = node.kwargs
        tokens, smoothing = prod(info_of(target).shape), where.get("label_smoothing", 0.0)
        for sent in vocab_parallel.cross_entropy_traffic(tokens, info_of(node).dtype, where["size"], label_smoothing=smoothing):
            yield _comm(node, ALL_REDUCE, known.axis or "", sent.phase, float(sent.nbytes))


def _again(node: fx.Node, change: Change) -> Iterator[Comm]:
    """What is gathered once more in backward, for the gradients of weights."""
    weights: Any = node.args[1]
    if any(info_of(weight).requires_grad for weight in weights):
        yield _comm(node, ALL_GATHER, change.axis, "backward", wire_bytes(ALL_GATHER, change.whole.nbytes, change.size))


def _between_parts(node: fx.Node) -> Iterator[Comm]:
    """Keys and values that go round, or those before a rank's own positions, of the rank that sends most; backward their gradients too."""
    key, value = (info_of(n) for n in operands(node)[1:3])
    where: dict[str, Any] = node.kwargs
    sent, size = float(key.nbytes + value.nbytes), where["size"]
    if node.target is ring.ring_attention:
        name, forward, backward = "ring", sent * (size - 1), sent * (2 * size - 1)
    else:
        near = halo.before_each(Shard(*node.args[-3:]), where["window"], size)  # type: ignore[arg-type]
        name, forward = "halo", sent * near.most_sent() / key.shape[2]
        backward = forward
    for phase, count in (("forward", forward), ("backward", backward)):
        yield _comm(node, name, facts(node).axis or "", phase, count)


def _around(node: fx.Node) -> Iterator[Comm]:
    """Positions around those of other ranks; backward their gradients. Of the rank that sends most."""
    x, weight = (info_of(n) for n in operands(node)[:2])
    cut, where = Shard(*node.args[3:6]), node.kwargs  # type: ignore[arg-type]
    results, size = Shard(cut.dim, 1, where["out"]), where["size"]  # type: ignore[arg-type]
    near = convolution.around(cut, results, weight.shape[-1], where["left"], where["stride"], where["dilation"], size)  # type: ignore[arg-type]
    nbytes = float(near.most_sent() * x.nbytes // x.shape[-1])
    for phase in ("forward", "backward") if x.requires_grad else ("forward",):
        yield _comm(node, "halo", facts(node).axis or "", phase, nbytes)


def _before(node: fx.Node) -> Iterator[Comm]:
    """Positions of other ranks that come to lie here; backward their gradients. Of the rank that sends most."""
    x, cut = info_of(operands(node)[0]), Shard(*node.args[1:4])  # type: ignore[arg-type]
    near = shifts.before(cut, node.kwargs["by"], node.kwargs["size"])  # type: ignore[arg-type]
    for phase in ("forward", "backward") if x.requires_grad else ("forward",):
        yield _comm(node, "halo", facts(node).axis or "", phase, float(near.most_sent() * x.nbytes // x.shape[cut.dim]))


def _totals(node: fx.Node) -> Iterator[Comm]:
    """What each piece comes to, to all ranks; backward the sums of their gradients."""
    info, (dim, _, segments), size = info_of(node), node.args[3:6], node.kwargs["size"]
    every = info.nbytes // info.shape[dim] * len(segments) * size  # type: ignore[arg-type, index, operator]
    for phase, kind in (("forward", ALL_GATHER), ("backward", REDUCE_SCATTER)):
        yield _comm(node, kind, facts(node).axis or "", phase, wire_bytes(kind, every, size))  # type: ignore[arg-type]


def _gathered(node: fx.Node) -> Iterator[Comm]:
    """Keys and values together, once more in backward; then their gradients. Each rank sends its part on size - 1 times."""
    key, value = (info_of(n) for n in operands(node)[1:3])
    where: dict[str, Any] = node.kwargs
    sent = float(key.nbytes + value.nbytes) * (where["size"] - 1)
    for kind, phase in ((ALL_GATHER, "forward"), (ALL_GATHER, "backward"), (REDUCE_SCATTER, "backward")):
        yield _comm(node, kind, facts(node).axis or "", phase, sent)


def _exchanged(node: fx.Node, exchange: Exchange, told: int) -> Iterator[Comm]:
    """Rows of experts: a share (size - 1) / size of them stays not here. Before them their numbers, 4 bytes for each of `told` experts."""
    axis, size, rows = exchange.axis, exchange.size, exchange.rows
    share = (size - 1) / size
    if told:
        yield replace(_comm(node, ALL_TO_ALL, axis, "forward", 4.0 * size * told * share), node=COUNTS)
    for phase in ("forward", "backward") if rows.requires_grad else ("forward",):
        yield _comm(node, ALL_TO_ALL, axis, phase, rows.nbytes * share)


def _converted(node: fx.Node, members: Sequence[Change]) -> Iterator[Comm]:
    """The collectives of one conversion, or of several that travel as one."""
    first = members[0]
    found = conversion(first.before, first.after)
    assert found is not None
    for phase, kind in (("forward", found.forward), ("backward", found.backward if first.whole.requires_grad else None)):
        if kind is not None:
            yield _comm(node, kind, first.axis, phase, wire_bytes(kind, sum(one.whole.nbytes for one in members), first.size))


def _comm(node: fx.Node, kind: str, axis: str, phase: str, nbytes: float) -> Comm:
    name = op_name(node.target).rpartition(".")[2]
    return Comm(kind, axis, phase, nbytes, 1, name, facts(node).module or "", facts(node).region or "")
