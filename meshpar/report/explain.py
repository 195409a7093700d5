"""A parallel model in words: how parameters lie, what is communicated, what is repeated on every rank, and why."""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from meshpar.config import UNREAD
from meshpar.graph.cost import flops, nbytes
from meshpar.graph.facts import Info, facts, infos_of
from meshpar.graph.op import op_name
from meshpar.graph.operators import operator_of
from meshpar.pipeline.schedule import Order
from meshpar.pipeline.timing import Costs, bubble, simulate
from meshpar.plan import AxisPlan, Comm, ParameterPlan, Plan
from meshpar.report.context import attention
from meshpar.report.text import Readable, count, table
from meshpar.roles import ROLES, copying, dividing
from meshpar.sharding.types import Shard, Type, local_shape


def explain(
    plan: Plan,
    graph: fx.Graph,
    *,
    inlined: Mapping[str, str] | None = None,
    averaged: Sequence[str] = (),
    within: Sequence[str] = (),
    dropped: Sequence[str] = (),
    unrecognised: Mapping[str, str] | None = None,
    order: Order | None = None,
) -> Readable:
    """What a plan says, for people.

    `graph` is the lowered graph of the plan. `inlined`: blocks that run in the root, with the reason; `averaged`: terms of the loss that
    are means over microbatches; `within`: modules that take statistics of a microbatch; `dropped`: outputs of the model that are left out;
    `unrecognised`: modules that look like layers of experts and are none, with the reason. `order`: that of a pipeline.
    """
    sections = [_mesh(plan), [] if order is None else _stages(plan, order), _parameters(plan, graph), _residual(plan, graph)]
    sections += [_communication(plan, order), attention(plan, graph), _repeated(plan, graph)]
    sections.append(_remarks(inlined or {}, averaged, within, dropped, unrecognised or {}))
    return Readable("\n\n".join("\n".join(lines) for lines in sections if lines))


# ---- mesh ------------------------------------------------------------------------------------------------------------------------------


def _mesh(plan: Plan) -> list[str]:
    sizes = dict(plan.mesh)
    data = prod(size for name, size in sizes.items() if ROLES[name].own_batches)
    options = plan.options
    lines = [
        f"Mesh {' x '.join(f'{n}={s}' for n, s in sizes.items())}: {prod(sizes.values())} ranks, {data} of them with samples of their own"
    ]
    mode = str(options.get("data_parallel", ""))
    if data > 1 and mode in _SHARED:
        lines.append(f"  data parallel {mode}: {_SHARED[mode]}")
    lines.append(
        f"  a step is {options.get('microbatches', 1)} microbatch(es) per rank; recomputed in backward: {options.get('recompute', 'none')}"
    )
    return lines


_SHARED = {
    "zero3": "parameters, gradients and optimizer state are shared out, parameters gathered block by block",
    "zero2": "gradients and optimizer state are shared out, parameters gathered once per step",
    "zero1": "optimizer state is shared out, gradients are summed after the last microbatch",
    "replicate": "every data rank holds everything, gradients are summed after the last microbatch",
}


# ---- stages ------------------------------------------------------------------------------------------------------------------------------


def _stages(plan: Plan, order: Order) -> list[str]:
    """Where stages begin and what they hold, what their order costs, and what several of them share."""
    shares = [stage.share or 1 / len(plan.stages) for stage in plan.stages]
    found = bubble(simulate(order, Costs(shares, shares, shares)), order.ranks)
    equal = bubble(simulate(order), order.ranks)
    cells = [("stage", "on rank", "begins at", "cost", "parameters", "hands on", "gets back", "in flight")]
    for index, stage in enumerate(plan.stages):
        numel = sum(prod(p.shape) for p in plan.parameters.values() if index in p.stages)
        sent = [sum(c.nbytes for c in plan.ledger if c.kind == "send" and (c.stage, c.phase) == at) for at in _around(index)]
        flying = max(held[index] for held in order.in_flight(stage.rank))
        forward, back = (count(n, "B") for n in sent)
        if index + 1 == len(plan.stages):
            forward, back = "", ""
        elif plan.stages[index + 1].rank == stage.rank:
            forward, back = "(same rank)", ""
        cells.append((str(index), str(stage.rank), stage.begins, f"{100 * stage.share:.1f}%", f"{numel:,}", forward, back, str(flying)))
    lines = [
        f"Stages: {order.stages} on {order.ranks} ranks of pp, {plan.stages[-1].why}; bytes and microbatches in flight are those of a rank",
        *table(cells, right=(3, 4, 5, 6, 7)),
        f"  schedule {order.schedule}, {order.microbatches} microbatches: idle for {100 * found:.1f}% of the time it computes with stages "
        f"that cost this much, {100 * equal:.1f}% with equal ones (backward twice a forward, sends free)",
    ]
    for name, one in plan.parameters.items():
        if len(one.stages) > 1:
            held = f"stages {', '.join(map(str, one.stages))}"
            lines.append(f"  {name} is used by {held}: each has a copy; gradients are summed over them once per step")
    if plan.options.get("data_parallel") == "zero3" and _data_size(plan) > 1 and order is not None and order.defers():
        lines.append("  data parallel zero3: parameters stay gathered until the end of the step, for weight gradients are put off")
    idle = [
        r for r in range(order.ranks) if not any(p.trainable and set(order.stages_of(r)) & set(p.stages) for p in plan.parameters.values())
    ]
    if idle:
        lines.append(
            f"  rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of pp: nothing to train there; optimizers take it as "
            'AdamW([{"params": pm.parameters()}])'
        )
    return lines


def _around(stage: int) -> tuple[tuple[int, str], tuple[int, str]]:
    """Where the ledger has what goes from a stage to the next, and what comes back."""
    return (stage, "forward"), (stage + 1, "backward")


def _data_size(plan: Plan) -> int:
    return prod(size for name, size in plan.mesh if ROLES[name].own_batches)


# ---- parameters ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """Parameters that differ in nothing but the numbers in their names."""

    pattern: str
    names: tuple[str, ...]
    plan: ParameterPlan
    why: str


def _parameters(plan: Plan, graph: fx.Graph) -> list[str]:
    axes = [a.axis for a in plan.axes if not ROLES[a.axis].sums]
    sizes = dict(plan.mesh)
    rows = _rows(plan, graph)
    heading = ("parameter", "", "shape", *(("on a rank", *(f"over {a}" for a in axes), "because") if axes else ()))
    cells = [heading]
    for row in rows:
        times = f"x{len(row.names)}" if len(row.names) > 1 else ""
        rest: tuple[str, ...] = ()
        if axes:
            words = (_words(row.plan.shape, row.plan.placements.get(a)) for a in axes)
            rest = (_local(row.plan, axes, sizes), *words, row.why)
        cells.append((row.pattern, times, _shape(row.plan.shape), *rest))
    numel = sum(prod(p.shape) for p in plan.parameters.values())
    lines = [
        f"Parameters: {numel:,} in {len(plan.parameters)} tensors (rows and columns are those of the tensor: rows are dim 0)",
        *table(cells),
    ]
    for axis in axes:
        whole = sum(prod(p.shape) for p in plan.parameters.values() if not isinstance(p.placements.get(axis), Shard))
        lines.append(f"  whole on every {axis} rank: {100 * whole / max(1, numel):.2g}% of all parameters")
    return lines


def _rows(plan: Plan, graph: fx.Graph) -> list[_Row]:
    reasons = _reasons(plan, graph)
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, one in plan.parameters.items():
        groups[_pattern(name), one.shape, one.dtype, one.trainable, tuple(one.placements.items()), reasons[name]].append(name)
    patterns: Counter[str] = Counter(str(key[0]) for key in groups)
    layers: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for key, names in groups.items():
        for name in names:
            layers[_pattern(name, 1)].add(key)
    rows = []
    for key, names in groups.items():
        for pattern, members in _by_pattern(names, 0 if patterns[str(key[0])] == 1 else 1).items():
            label = members[0] if len(members) == 1 else pattern if len(layers[pattern]) < 2 else _enumerated(members)
            rows.append(_Row(label, tuple(members), plan.parameters[members[0]], str(key[-1])))
    return rows


def _by_pattern(names: Sequence[str], numbers: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[_pattern(name, numbers)].append(name)
    return found


def _pattern(name: str, numbers: int = 0) -> str:
    """The name with its first `numbers` numbers (0: all) as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=numbers)


def _enumerated(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: "layers.{0-2,5}.weight".

    >>> _enumerated(["layers.0.weight", "layers.1.weight", "layers.3.weight"])
    'layers.{0-1,3}.weight'
    """
    parts = [name.split(".") for name in names]
    joined = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda v: (len(v), v))
        joined.append(values[0] if len(values) == 1 else "{" + ",".join(_ranges([int(v) for v in values])) + "}")
    return ".".join(joined)


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    start = last = numbers[0]
    for n in [*numbers[1:], None]:
        if n is not None and n == last + 1:
            last = n
            continue
        yield str(start) if start == last else f"{start}-{last}"
        if n is not None:
            start = last = n


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _local(plan: ParameterPlan, axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    """The shape on a rank; where ranks differ, the largest and the smallest."""
    first, last = plan.shape, plan.shape
    for axis in axes:
        type_ = plan.placements.get(axis)
        if isinstance(type_, Shard):
            first, last = local_shape(first, type_, sizes[axis], 0), local_shape(last, type_, sizes[axis], sizes[axis] - 1)
    return "[" + ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(first, last, strict=True)) + "]"


def _words(shape: Sequence[int], type_: Type | None) -> str:
    if not isinstance(type_, Shard):
        return "whole"
    where = "split" if len(shape) == 1 else ("rows", "columns")[type_.dim] if len(shape) == 2 else f"dim {type_.dim}"
    units = [f"{u}" if z == 1 else f"{u} x {z}" for u, z in type_.segments]
    if len(units) == 1 and type_.repeat == 1:
        return where if type_.segments[0][1] == 1 else f"{where} ({units[0]})"
    return f"{where} of {'each of ' + str(type_.repeat) + ' parts ' if type_.repeat > 1 else ''}{'|'.join(units)}"


def _reasons(plan: Plan, graph: fx.Graph) -> dict[str, str]:
    """Parameter -> who decided, and what for."""
    matrices = {str(n.target): _matrix(n) for n in graph.nodes if n.op == "get_attr"}
    blocks = _block_sizes(plan)
    return {
        name: _reason(one, matrices.get(name, ()), prod(one.shape) / max(1, blocks[_block(name)])) for name, one in plan.parameters.items()
    }


def _reason(plan: ParameterPlan, matrix: tuple[str, ...], share: float) -> str:
    types = (plan.placements.get(name) for name in dividing("weights"))
    type_ = next((type_ for type_ in types if isinstance(type_, Shard)), None)
    if plan.why in _DECIDERS:
        return _DECIDERS[plan.why]
    if type_ is not None:
        return _CUT[matrix[type_.dim]] if type_.dim < len(matrix) else "cut like the values it is used with"
    if len(plan.shape) < 2:
        return "a vector: little to gain"
    return f"cutting it costs more than it saves ({100 * share:.1g}% of its block)"


_DECIDERS = {"rule": "your rule", "pinned": "as it was placed before", "data": "", "not used by the graph": "the forward does not use it"}

_CUT = {
    "outputs": "each rank computes its share of the outputs",
    "inputs": "each rank sums over its share of the inputs",
    "rows": "each rank looks up its share of the rows",
    "features": "each rank looks up its share of the features",
    "experts": "each rank holds its share of the experts",
}
"""What it means to cut a dim, by what the dim is to the operator."""


def _matrix(node: fx.Node) -> tuple[str, ...]:
    """What the dims of a parameter are to the operator that consumes it, seen through conversions and views."""
    seen = node
    while (user := next((u for u in seen.users if u.op == "call_function"), None)) is not None:
        row = operator_of(user.target)
        if row.matrix:
            return row.matrix
        if facts(user).joined:  # several values at once: go on with this one's result
            index = user.args.index(seen)
            user = next((u for u in user.users if u.args[1] == index), user)
        elif facts(user).conversion is None and row.kind not in ("view", "copy"):
            return ()
        seen = user
    return ()


def _block(name: str) -> str:
    found = re.match(r"(.*?\.\d+)\.", name)
    return found.group(1) if found else ""


def _block_sizes(plan: Plan) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for name, one in plan.parameters.items():
        sizes[_block(name)] += prod(one.shape)
    return sizes


# ---- activations and communication -----------------------------------------------------------------------------------------------------


def _residual(plan: Plan, graph: fx.Graph) -> list[str]:
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
            found[f"{_shape(info.shape)} {_held(node, info, handed, axis)}"] += 1
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


def _communication(plan: Plan, order: Order | None) -> list[str]:
    by_region: dict[tuple[int, str], list[Comm]] = defaultdict(list)
    for comm in plan.ledger:
        by_region[comm.stage, _sent_to(comm) or comm.region].append(comm)
    if not by_region:
        return ["Communication: none within a forward and backward"]
    alike: dict[tuple[int, str, _Traffic], list[str]] = defaultdict(list)
    for (stage, region), comms in by_region.items():
        alike[stage, _pattern(region), _traffic(comms)].append(region)
    several = len(plan.stages) > 1
    cells = [(*(("stage",) if several else ()), "block", "axis", "phase", "collective", "times", "sent by a rank")]
    shared = Counter((stage, pattern) for stage, pattern, _ in alike)
    for (stage, pattern, traffic), regions in sorted(alike.items(), key=lambda item: item[0][0]):
        label = regions[0] or "outside of blocks"
        if len(regions) > 1:
            label = f"{pattern if shared[stage, pattern] == 1 else _enumerated(regions)}, each of {len(regions)}"
        for axis, phase, kind, times, size in traffic:
            row = (label, axis, phase, kind.replace("_", "-"), str(times), count(size, "B"))
            cells.append((str(stage), *row) if several else row)
            label = ""
    totals: Counter[int] = Counter()
    for comm in plan.ledger:
        totals[plan.stages[comm.stage].rank if several else 0] += int(comm.count * comm.nbytes)
    by = "the rank that sends most" if several else "a rank"
    heading = f"Communication of one microbatch: {count(max(totals.values()), 'B')} sent by {by}"
    lines = [heading, *table(cells, right=(5, 6) if several else (4, 5)), *_data_parallel(plan, order)]
    return [*lines, *(f"  {name} is {why}" for name, why in UNREAD.items())]


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
    if data == 1 or mode not in _SHARED or in_graph:
        return []
    ranks = {stage.rank for stage in plan.stages} or {0}
    whole, trained = max((_held_bytes(plan, sizes, rank, False), _held_bytes(plan, sizes, rank, True)) for rank in ranks)
    copies = data if mode == "replicate" else prod(sizes[n] for n in copying(sizes))
    shares = data // copies
    gathers = {"zero3": 1 if order is not None and order.defers() else 2 * microbatches, "replicate": 0}.get(mode, 1)
    sums = microbatches if mode in ("zero3", "zero2") and not plan.stages else 1
    gathered = gathers * whole * (shares - 1) / shares
    summed = sums * trained * (shares - 1) / shares + 2 * trained / shares * (copies - 1) / copies
    sent = f"{count(gathered, 'B')} of parameters gathered, {count(summed, 'B')} of gradients summed"
    return [f"  and per step over the data ranks ({mode}): {sent}"]


def _held_bytes(plan: Plan, sizes: Mapping[str, int], rank: int, trained: bool) -> int:
    """Bytes of the parameters of a rank of the pipeline, without data parallelism."""
    own = {index for index, stage in enumerate(plan.stages) if stage.rank == rank} or {0}
    return sum(_local_bytes(p, sizes) for p in plan.parameters.values() if own & set(p.stages) and (p.trainable or not trained))


def _local_bytes(plan: ParameterPlan, sizes: Mapping[str, int]) -> int:
    shape = plan.shape
    for axis, type_ in plan.placements.items():
        if isinstance(type_, Shard):
            shape = local_shape(shape, type_, sizes.get(axis, 1), 0)
    return prod(shape) * getattr(torch, plan.dtype).itemsize


def _repeated(plan: Plan, graph: fx.Graph) -> list[str]:
    """What every rank of an axis that cuts weights or the sequence computes although another one does too."""
    axes = [axis for axis in plan.axes if ROLES[axis.axis].divides in ("weights", "sequence")]
    return [line for axis in axes if axis.size > 1 for line in _repeated_on(axis, plan, graph)]


def _repeated_on(axis: AxisPlan, plan: Plan, graph: fx.Graph) -> list[str]:
    work, moved = Counter[bool](), Counter[bool]()
    ops: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for node in graph.nodes:
        if node.op != "call_function" or facts(node).info is None or not _differentiable(node):
            continue
        if facts(node).conversion is not None or facts(node).joined or node.target is operator.getitem:
            continue
        whole = axis.axis not in facts(node).cut
        cost, size = flops(node), nbytes(node)
        work[whole] += int(cost)
        moved[whole] += int(size)
        if whole:
            entry = ops[op_name(node.target)]
            entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + cost, entry[2] + size
    lines = [
        f"Repeated on all {axis.size} {axis.axis} ranks: {_percent(work)} of a rank's arithmetic, {_percent(moved)} of the memory it reads "
        f"and writes (forward)"
    ]
    missing = {note.split(" ")[0] for note in plan.notes if " has no rule" in note}
    for name, (n, cost, size) in sorted(ops.items(), key=lambda item: -item[1][1] - item[1][2]):
        if name in missing:
            lines.append(
                f"  {name} has no sharding rule: {n:.0f} calls run whole, {count(cost)} operations, {count(size, 'B')} read and written"
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


def _differentiable(node: fx.Node) -> bool:
    return any(i is not None and i.requires_grad for i in infos_of(node))


def _percent(found: Counter[bool]) -> str:
    return f"{100 * found[True] / max(1, found[True] + found[False]):.2g}%"


def _remarks(
    inlined: Mapping[str, str], averaged: Sequence[str], within: Sequence[str], dropped: Sequence[str], unrecognised: Mapping[str, str]
) -> list[str]:
    lines = [f"  {path} runs outside of blocks: {reason}" for path, reason in inlined.items()]
    lines += [f"  a term of the loss in {name or 'the model'} is the mean over microbatches, not over the whole batch" for name in averaged]
    lines += [f"  {name or 'the model'} takes samples together: those of a microbatch, not of the batch" for name in within]
    lines += [f"  not returned: {path} (its type is unknown to pytree)" for path in dropped]
    lines += [f"  {path or 'the model'} is not recognised as experts, and runs as written: {why}" for path, why in unrecognised.items()]
    return ["Remarks", *lines] if lines else []
