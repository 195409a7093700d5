"""What ranks hold, send and compute twice, in words."""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import fx

from meshpar.graph.cost import flops, nbytes
from meshpar.graph.facts import Info, facts
from meshpar.graph.op import op_name
from meshpar.pipeline.schedule import Order
from meshpar.plan import AxisPlan, Comm, ParameterPlan, Plan
from meshpar.report.parameters import bracketed, differentiable, enumerated, pattern_of, unit_of
from meshpar.report.text import count, table
from meshpar.roles import ROLES, copying
from meshpar.sharding.types import Shard, local_shape

SHARED = {
    "zero3": "parameters, gradients and optimizer state are shared out, parameters gathered block by block",
    "zero2": "gradients and optimizer state are shared out, parameters gathered once per step",
    "zero1": "optimizer state is shared out, gradients are summed after the last microbatch",
    "replicate": "every data rank holds everything, gradients are summed after the last microbatch",
}
"""What data parallelism shares out, by its name."""


def data_size(plan: Plan) -> int:
    """How many ranks have samples of their own."""
    return prod(size for name, size in plan.mesh if ROLES[name].own_batches)


def residual(plan: Plan, graph: fx.Graph) -> list[str]:
    """How the values lie that blocks hand to one another."""
    return [line for axis in _tensor_axes(plan) for line in _residual_on(axis, graph, plan.options.get("sequence_parallel"))]


def _tensor_axes(plan: Plan) -> list[AxisPlan]:
    return [axis for axis in plan.axes if ROLES[axis.axis].divides == "weights"]


def _residual_on(axis: AxisPlan, graph: fx.Graph, asked: object) -> list[str]:
    handed = {t for one in axis.nodes.values() for t in one.handed if isinstance(t, Shard)}
    found: Counter[str] = Counter()
    for node in graph.nodes:
        info, region = facts(node).info, facts(node).region
        if node.op != "call_function" or not isinstance(info, Info) or not info.requires_grad or len(info.shape) < 2:
            continue
        if any(user.op == "call_function" and facts(user).region not in (region, None) for user in node.users):
            found[f"{bracketed(info.shape)} {_held(node, info, handed, axis)}"] += 1
    texts = "; ".join(f"{text} ({n} of them)" for text, n in found.most_common())
    return [f"Blocks hand on, on a {axis.axis} rank: {texts}", *_asked(asked)] if found else []


def _asked(sequence: object) -> list[str]:
    """How it was decided whether streams are cut."""
    return ['  sequence_parallel="auto": each stream is cut along its sequence where that costs less'] if sequence == "auto" else []


def _held(node: fx.Node, info: Info, handed: Collection[Shard], axis: AxisPlan) -> str:
    """How a value lies that leaves its block: one of the shards that the plan hands on, or whole."""
    change = facts(node).conversion
    if change is not None and change.axis == axis.axis:
        dims = {change.after.dim} if isinstance(change.after, Shard) else set()
    elif axis.axis in facts(node).cut:
        dims = {t.dim for t in handed if t.dim < len(info.shape) and t.local_length(axis.size, 0) == info.shape[t.dim]}
    else:
        return "whole"
    if len(dims) != 1:
        return "cut" if dims else "whole"
    dim = dims.pop()
    return f"cut along dim {dim}, " + ("the sequence" if dim < len(info.shape) - 1 else "the features")


def communication(plan: Plan, order: Order | None) -> list[str]:
    """The table of what a rank sends, block by block, and what data parallelism adds."""
    by_region: dict[tuple[int, str], list[Comm]] = defaultdict(list)
    for comm in plan.ledger:
        by_region[comm.stage, _sent_to(comm) or comm.region].append(comm)
    if not by_region:
        return ["Communication: none within a forward and backward"]
    alike: dict[tuple[int, str, _Traffic], list[str]] = defaultdict(list)
    for (stage, region), comms in by_region.items():
        alike[stage, pattern_of(region), _traffic(comms)].append(region)
    several = len(plan.stages) > 1
    cells = [(*(("stage",) if several else ()), "block", "axis", "phase", "collective", "times", "sent by a rank")]
    shared = Counter((stage, pattern) for stage, pattern, _ in alike)
    for (stage, pattern, traffic), regions in sorted(alike.items(), key=lambda item: item[0][0]):
        label = regions[0] or "outside of blocks"
        if len(regions) > 1:
            label = f"{pattern if shared[stage, pattern] == 1 else enumerated(regions)}, each of {len(regions)}"
        for axis, phase, kind, times, size in traffic:
            row = (label, axis, phase, kind.replace("_", "-"), str(times), count(size, "B"))
            cells.append((str(stage), *row) if several else row)
            label = ""
    totals: Counter[int] = Counter()
    for comm in plan.ledger:
        totals[plan.stages[comm.stage].rank if several else 0] += int(comm.count * comm.nbytes)
    by = "the rank that sends most" if several else "a rank"
    heading = f"Communication of one microbatch: {count(max(totals.values()), 'B')} sent by {by}"
    return [heading, *table(cells, right=(5, 6) if several else (4, 5)), *waited_for(plan.ledger), *_data_parallel(plan, order)]


def waited_for(ledger: Sequence[Comm]) -> list[str]:
    """Axis by axis, for how much of its communication a rank waits, by the constants of the plan."""
    lines = []
    for axis in dict.fromkeys(comm.axis for comm in ledger if comm.seconds):
        own = [comm for comm in ledger if comm.axis == axis]
        took, waits = sum(comm.count * comm.seconds for comm in own), sum(comm.count * comm.exposed for comm in own)
        sent, alone = sum(comm.count * comm.nbytes for comm in own), sum(comm.count * comm.exposed_bytes for comm in own)
        lines.append(
            f"  {axis}: {_ms(took)} of communication, {_ms(took - waits)} of it beside computation; {_ms(waits)} are waited for "
            f"({100 * waits / took:.0f} %; {count(alone, 'B')} of {count(sent, 'B')})"
        )
    return [*lines, "    (times by the constants of an accelerator of today, unless the configuration names the hardware)"] if lines else []


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _sent_to(comm: Comm) -> str:
    """Where a stage sends to, in words; empty for what is no send between stages."""
    if comm.kind != "send":
        return ""
    return f"to stage {comm.stage + (1 if comm.phase == 'forward' else -1)}"


_Traffic = tuple[tuple[str, str, str, int, float], ...]
"""(axis, phase, kind, how often, bytes)."""


def _traffic(comms: Sequence[Comm]) -> _Traffic:
    times: Counter[tuple[str, str, str]] = Counter()
    sizes: dict[tuple[str, str, str], float] = defaultdict(float)
    for comm in comms:
        where = (comm.axis, comm.phase, comm.kind)
        times[where] += comm.count
        sizes[where] += comm.count * comm.nbytes
    return tuple((*where, times[where], sizes[where]) for where in sorted(times, key=lambda w: (w[0], w[1] != "forward", w[2])))


def _data_parallel(plan: Plan, order: Order | None) -> list[str]:
    """What FSDP2 sends in a step: it is not part of the graph."""
    sizes = dict(plan.mesh)
    data = prod(size for name, size in sizes.items() if ROLES[name].sums)
    in_graph = any((not c.axis or ROLES[c.axis].sums) and c.node.startswith("i_to_r") and c.phase == "backward" for c in plan.ledger)
    mode, microbatches = str(plan.options.get("data_parallel", "")), int(plan.options.get("microbatches", 1))
    if data == 1 or mode not in SHARED or in_graph:
        return []
    ranks = {stage.rank for stage in plan.stages} or {0}
    held = max((_rank_bytes(plan, sizes, rank) for rank in ranks), key=lambda own: own.whole)
    copies = data if mode == "replicate" else prod(sizes[n] for n in copying(sizes))
    shares = data // copies
    defers = order is not None and order.defers()
    gathered = {"zero3": held.whole if defers else microbatches * held.twice, "replicate": 0}.get(mode, held.whole)
    sums = microbatches if mode in ("zero3", "zero2") and not plan.stages else 1
    summed = sums * held.trained * (shares - 1) / shares + 2 * held.trained / shares * (copies - 1) / copies
    sent = f"{count(gathered * (shares - 1) / shares, 'B')} of parameters gathered, {count(summed, 'B')} of gradients summed"
    return [f"  and per step over the data ranks ({mode}): {sent}"]


class _RankBytes(NamedTuple):
    """Bytes of the parameters of a rank of the pipeline, without data parallelism."""

    whole: int
    twice: int
    """Gathered for forward and again for backward, but for what is outside of blocks, which stays in between."""
    trained: int


def _rank_bytes(plan: Plan, sizes: Mapping[str, int], rank: int) -> _RankBytes:
    own = {index for index, stage in enumerate(plan.stages) if stage.rank == rank} or {0}
    bytes_ = {name: _local_bytes(p, sizes) for name, p in plan.parameters.items() if own & set(p.stages)}
    whole, again = sum(bytes_.values()), sum(size for name, size in bytes_.items() if unit_of(name))
    return _RankBytes(whole, whole + again, sum(size for name, size in bytes_.items() if plan.parameters[name].trainable))


def _local_bytes(plan: ParameterPlan, sizes: Mapping[str, int]) -> int:
    shape = plan.shape
    for axis, type_ in plan.placements.items():
        if isinstance(type_, Shard):
            shape = local_shape(shape, type_, sizes.get(axis, 1), 0)
    return prod(shape) * getattr(torch, plan.dtype).itemsize


def repeated(plan: Plan, graph: fx.Graph) -> list[str]:
    """What every rank of an axis that cuts weights or the sequence computes although another one does too."""
    axes = [axis for axis in plan.axes if ROLES[axis.axis].divides in ("weights", "sequence")]
    return [line for axis in axes if axis.size > 1 for line in _repeated_on(axis, plan, graph)]


def _repeated_on(axis: AxisPlan, plan: Plan, graph: fx.Graph) -> list[str]:
    work, moved = Counter[bool](), Counter[bool]()
    ops: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for node in graph.nodes:
        if node.op != "call_function" or facts(node).info is None or not differentiable(node):
            continue
        cost, size = flops(node), nbytes(node)
        if (facts(node).conversion is not None and not cost) or facts(node).joined or node.target is operator.getitem:
            continue
        whole = axis.axis not in facts(node).cut
        work[whole] += int(cost)
        moved[whole] += int(size)
        if whole:
            entry = ops[op_name(node.target)]
            entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + cost, entry[2] + size
    lines = [
        f"Repeated on all {axis.size} {axis.axis} ranks: {_percent(work)} of a rank's arithmetic, {_percent(moved)} of the memory it reads "
        f"and writes (forward)"
    ]
    missing = {note.split(" ")[0]: " that fits" if " that fits" in note else "" for note in plan.notes if " has no rule" in note}
    for name, (n, cost, size) in sorted(ops.items(), key=lambda item: -item[1][1] - item[1][2]):
        if name in missing:
            lines.append(
                f"  {name} has no sharding rule{missing[name]}: {n:.0f} calls run whole, {count(cost)} operations, "
                f"{count(size, 'B')} read and written"
            )
    known = {line.split(" ")[2] for line in lines[1:]}
    if ROLES[axis.axis].divides == "sequence":
        lines += _products(axis, graph)
    lines += [f"  {note}" for note in plan.notes if note.split(" ")[0] not in known]
    if missing:
        lines.append("  mp.add_rule teaches meshpar an operator")
    return lines


def _products(axis: AxisPlan, graph: fx.Graph) -> list[str]:
    """The products that every rank of an axis repeats, by the kind of module."""
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for node in graph.nodes:
        if node.op == "call_function" and axis.axis not in facts(node).cut and (cost := flops(node)):
            entry = found[op_name(node.target), re.sub(r"\d+", "*", facts(node).module or "the model")]
            entry[0], entry[1] = entry[0] + 1, entry[1] + cost
    return [f"  {name} in {module}: {n:.0f} times, {count(cost)} operations" for (name, module), (n, cost) in found.items()]


def _percent(found: Counter[bool]) -> str:
    return f"{100 * found[True] / max(1, found[True] + found[False]):.2g}%"
