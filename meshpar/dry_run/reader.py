"""From rehearsed stages to the planner's `Workload`: kernels summed by kind and phase, collectives by axis, what a step has once apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from meshpar import roles
from meshpar._torch import resolve_process_group
from meshpar.compile.exposure import covers, messages
from meshpar.compile.ledger import entries
from meshpar.compile.program import Program
from meshpar.dry_run.rehearsal import Rehearsed
from meshpar.dry_run.tape import Sounding
from meshpar.graph.captured import Captured
from meshpar.graph.cost import flops
from meshpar.graph.facts import Info, facts, info_of
from meshpar.mesh import mesh_sizes
from meshpar.pipeline.order import Schedule
from meshpar.plan import Comm
from meshpar.planner import AxisSpan, Collective, Layer, Operator, StageLoad, Workload
from meshpar.planner.workload import Phase
from meshpar.sharding.beside import WAITED, Covers
from meshpar.sharding.conversions import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, wire_bytes

PHASES: Mapping[str, Phase] = {"forward": "forward", "recompute": "recompute", "backward": "input", "weight": "weight"}
"""Of a tape -> of the planner. Where weight gradients are not put off, backward is one phase."""


PLANNERS: Mapping[roles.Divides, str] = {"stages": "pp", "sequence": "cp", "experts": "ep", "weights": "tp"}
"""What an axis divides -> the planner's name for it."""
DATA, ALONE = "dp", "edp"
"""All axes whose ranks have batches of their own, and those of them that do not divide experts."""


@dataclass(frozen=True)
class Groups:
    """The process groups of a mesh, by the planner's axes."""

    mesh: DeviceMesh

    def spans(self) -> dict[str, AxisSpan]:
        """Every axis of the mesh by the planner's name for it, and the data axes together, with experts and without."""
        names = tuple(mesh_sizes(self.mesh))
        found = {axis: self._span(roles.dividing(what, names)) for what, axis in PLANNERS.items()}
        found |= {name: self._span((name,)) for name in names}
        return {
            **found,
            DATA: self._span(roles.with_own_batches(names)),
            ALONE: self._span(roles.with_own_batches(names, without="experts")),
        }

    def axis_of(self, group: str) -> str:
        """The planner's axis over which a group communicates."""
        sizes = {name: size for name, size in mesh_sizes(self.mesh).items() if size > 1}
        ranks = dist.get_process_group_ranks(resolve_process_group(group))
        at = [(self.mesh.mesh == rank).nonzero()[0].tolist() for rank in ranks]
        spanned = {name for dim, name in enumerate(self.mesh.mesh_dim_names or ()) if len({place[dim] for place in at}) > 1}
        if len(spanned) == 1 and (axis := PLANNERS.get(roles.ROLES[next(iter(spanned))].divides)) is not None:
            return axis
        if spanned and spanned == set(roles.with_own_batches(sizes)):
            return DATA
        return ALONE if spanned == set(roles.with_own_batches(sizes, without="experts")) else next(iter(spanned), PLANNERS["weights"])

    def _span(self, names: tuple[str, ...]) -> AxisSpan:
        """An axis made of some: as many ranks as they have together, as far apart as on the innermost of them."""
        sizes = mesh_sizes(self.mesh)
        order, count = list(sizes), 1
        for name in names:
            count *= sizes[name]
        stride = 1
        for name in reversed(order):
            if name in names and sizes[name] > 1:
                break
            stride *= sizes[name]
        return AxisSpan(names[0] if names else "", count, stride if count > 1 else 1)


def workload(
    stages: Sequence[Rehearsed],
    program: Program,
    mesh: DeviceMesh,
    schedule: Schedule | None,
    microbatches: int,
    *,
    fused: bool,
    regathers: bool,
) -> Workload:
    """The step of every rank as the planner takes it. `fused`: elementwise operators in a row count as one kernel.

    `regathers`: what was gathered over an axis is kept as this rank's part, as stacks do that gather again in backward.
    """
    groups = Groups(mesh)
    axes = groups.spans()
    place = schedule.order(1, backward=False).place if schedule is not None else (0,)
    ranks = schedule.ranks if schedule is not None else 1
    options = program.plan.options
    step = model_flops(program.captured, program.graph)
    tokens = tokens_of(program.captured)
    return Workload(
        tuple(_stage(one, groups, fused=fused, regathers=regathers) for one in stages),
        ranks,
        schedule.name if schedule is not None else "1f1b",
        microbatches,
        axes,
        send=float(max(one.sent for one in stages)),
        data_parallel=str(options["data_parallel"]),
        gpus=mesh.size(),
        tokens=float(tokens * microbatches),
        info={name: count / tokens for name, count in step.items()},
        place=place,
    )


def _stage(one: Rehearsed, groups: Groups, *, fused: bool, regathers: bool) -> StageLoad:
    blocks = one.blocks
    steady = _collectives(one.middle.calls, groups)
    if one.middle is one.first and one.last is not one.first:
        steady &= _collectives(one.last.calls, groups)
    once = (_collectives(one.first.calls, groups) - steady) + (_collectives(one.last.calls, groups) - steady)
    if one.first is one.last:
        once = Counter({key: n for key, n in steady.items() if key[1] in _DATA})
        steady = steady - once
    kept = one.middle.forward.scattered if regathers else one.middle.forward.rest
    known = None if regathers else _beside(one.graph, groups)
    layer = Layer(
        f"a {blocks}th of stage {one.index}",
        tuple(_operators(one.middle.calls, fused=fused, parts=blocks)),
        tuple(made for key, n in steady.items() for made in _collective(key, n / blocks, known)),
        one.elements / blocks,
        one.expert_elements / blocks,
        (kept + one.received) / blocks,
        max(0, one.middle.backward_peak - one.middle.forward.total) / 1.0,
    )
    return StageLoad(
        ((layer, blocks),),
        tuple(made for (kind, axis, _, size), n in once.items() for made in _collective((kind, axis, "step", size), n)),
        one.tensors,
    )


CollectiveKey = tuple[str, str, Phase, float]
KnownBeside = Mapping[CollectiveKey, Counter[Covers]]
"""What runs beside calls of a kind, and how many of them have that beside them."""
_DATA = (DATA, ALONE, *(name for name, role in roles.ROLES.items() if role.divides == "samples"))
BEHIND: Mapping[str, str] = {"tp": "matrix"}
"""Axis -> what its collectives may hide behind, where the stack does."""


def _collectives(calls: Iterable[Sounding], groups: Groups) -> Counter[CollectiveKey]:
    """Kind, axis, phase and bytes -> how often."""
    axes: dict[str, str] = {}
    found: Counter[CollectiveKey] = Counter()
    for call in calls:
        k = call.kernel
        if k.collective:
            if k.group not in axes:
                axes[k.group] = groups.axis_of(k.group)
            found[k.collective, axes[k.group], PHASES[call.phase], float(k.moved)] += 1
    return found


def _beside(graph: fx.Graph, groups: Groups) -> KnownBeside:
    """What the graph of a stage computes beside its collectives over `tp`, and how many of each kind have that beside them."""
    found: dict[CollectiveKey, Counter[Covers]] = {}
    axis = PLANNERS["weights"]
    size = groups.spans()[axis].size
    for node in graph.nodes:
        for sent in entries(node):
            if sent.axis in roles.ROLES and PLANNERS.get(roles.ROLES[sent.axis].divides) == axis:
                for kind, whole, known in _calls(node, sent, size):
                    key = (kind, axis, PHASES[sent.phase], float(int(whole)))
                    found.setdefault(key, Counter())[known] += sent.count
    return found


def _calls(node: fx.Node, sent: Comm, size: int) -> Iterable[tuple[str, float, Covers]]:
    """The calls that a collective over `size` ranks is: kind, bytes as a tape has them, and what runs beside each."""
    if sent.kind not in (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE):
        return
    whole, known, count = sent.nbytes / wire_bytes(sent.kind, 1.0, size), covers(node, sent), messages(node, sent)
    if count == 1:
        yield sent.kind, whole, known
        return
    total = known[-1][1]
    last = known[0][1] if len(known) > 1 else total / count
    kind, each = (ALL_REDUCE, whole) if sent.kind == ALL_REDUCE else (ALL_TO_ALL, sent.nbytes * size / (size - 1))
    for work in (*[(total - last) / (count - 1)] * (count - 1), last):
        yield kind, each / count, ((1.0, work),)


def _collective(key: CollectiveKey, count: float, known: KnownBeside | None = None) -> Iterable[Collective]:
    """Calls of one kind, apart where other things run beside them. `known`: of all calls over `tp`; a stack may tell, for want of it."""
    kind, axis, phase, size = key
    behind = "compute" if axis in _DATA else BEHIND.get(axis, "")
    name = "parameters and gradients" if axis in _DATA and size > 64 else "values"
    ways: Counter[Covers] = Counter({(): 1})
    if known is not None and axis == PLANNERS["weights"]:
        ways = known.get((kind, axis, phase, float(int(size)))) or Counter({WAITED: 1})
    for beside, part in ways.items():
        yield Collective(name, kind, axis, phase, size, count * part / ways.total(), behind, beside=beside)


def _operators(calls: Sequence[Sounding], *, fused: bool, parts: int) -> list[Operator]:
    """Every kernel with how often it runs, an equal part of that."""
    often = Counter(_joined(calls) if fused else _each(calls))
    return [
        Operator(name, kind, PHASES[phase], work * n / parts, moved * n / parts, dtype, n / parts)
        for (name, kind, phase, dtype, work, moved), n in often.items()
    ]


KernelKey = tuple[str, str, str, str, float, float]
"""Name, kind, phase, precision, FLOPs, bytes."""


def _each(calls: Iterable[Sounding]) -> Iterable[KernelKey]:
    for call in calls:
        k = call.kernel
        if not k.collective:
            yield k.name, k.kind, call.phase, k.dtype, k.flops, float(k.bytes)


def _joined(calls: Sequence[Sounding]) -> Iterable[KernelKey]:
    """The same where elementwise operators in a row are one kernel: it reads what others made, and writes what others read."""
    last_read: dict[int, int] = {n: i for i, call in enumerate(calls) for n in call.reads}
    row: list[int] = []
    for i, call in enumerate([*calls, None]):
        if call is not None and call.kernel.kind == "elementwise" and (not row or calls[row[0]].phase == call.phase):
            row.append(i)
            continue
        if row:
            yield _one_kernel(calls, row, last_read)
        row = []
        if call is None or call.kernel.collective:
            continue
        if call.kernel.kind == "elementwise":
            row = [i]
        else:
            yield call.kernel.name, call.kernel.kind, call.phase, call.kernel.dtype, call.kernel.flops, float(call.kernel.bytes)


def _one_kernel(calls: Sequence[Sounding], row: Sequence[int], last_read: Mapping[int, int]) -> KernelKey:
    made: set[int] = set()
    moved, end = 0.0, row[-1]
    for i in row:
        call = calls[i]
        outside = [n for n in call.reads if n not in made]
        moved += call.kernel.read * len(outside) / max(1, len(call.reads))
        made.update(call.writes)
        if any(last_read.get(n, end + 1) > end for n in call.writes):  # read later, or never: then it is a result
            moved += call.kernel.written
    return "elementwise", "elementwise", calls[row[0]].phase, calls[row[0]].kernel.dtype, 0.0, moved


# ---- what the model itself computes ------------------------------------------------------------------------------------------------------


def model_flops(captured: Captured, lowered: fx.Graph) -> dict[str, float]:
    """FLOPs of forward and backward of one microbatch over all ranks, by convention (`planner.CONVENTIONS`)."""
    found = {"causal": 0.0, "noncausal": 0.0, "with-recompute": 0.0}
    for node in captured.graph.nodes:
        if node.op != "call_function" or not (forward := flops(node)):
            continue
        whole = forward * (1 + min(2, _trained_operands(node)))
        found["causal"] += whole * (0.5 if _is_causal(node) else 1.0)
        found["noncausal"] += whole
        found["with-recompute"] += whole + (forward if facts(node).region else 0.0)
    return found


def _trained_operands(node: fx.Node) -> int:
    infos = [facts(source).info for source in node.all_input_nodes]
    return sum(isinstance(i, Info) and i.requires_grad and len(i.shape) > 1 for i in infos)


def _is_causal(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return False
    return bool(node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False))


def tokens_of(captured: Captured) -> int:
    """Tokens of one microbatch over all ranks: elements of the largest integer input; samples, where there is none."""
    nodes = [n for n in captured.graph.nodes if n.op == "placeholder" and isinstance(facts(n).info, Info)]
    whole = [i.shape for n in nodes if not (i := info_of(n)).dtype.is_floating_point and len(i.shape) > 1]
    if whole:
        return max(_numel(shape) for shape in whole)
    return max((info_of(n).shape[captured.batch_dims[n.name]] for n in nodes if n.name in captured.batch_dims), default=1)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
