"""How long a step of a workload takes on a cluster: layers from rates, the pipeline simulated, what of communication stays visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import log2

from meshpar.planner.comm import Fabric, RankGroup, place
from meshpar.planner.constants import Constants
from meshpar.planner.hardware import Hardware
from meshpar.planner.measured import Measured, MeasuredFabric
from meshpar.planner.schedule import Times, length
from meshpar.planner.stack import Stack
from meshpar.planner.workload import Collective, Layer, Operator, StageLoad, Workload

PARTS = ("matrices", "attention", "elementwise", "host", "tp", "cp", "ep", "dp")
"""Where a layer's time goes; the names of axes are visible communication."""
COMPUTE = 4
"""The first so many parts are computation."""
_AXIS_PART = {"tp": 4, "etp": 4, "cp": 5, "ep": 6, "dp": 7, "edp": 7, "dp_shard": 7, "dp_replicate": 7}
IDLE = {"zero-bubble": 1 / 3, "zbv": 0.1, "dualpipev": 0.5}
"""Roughly, what is idle / (p-1)/v of a microbatch, where weight gradients are put off (arXiv 2401.10241); the simulated order decides."""
OPTIMIZER_BYTES = 30
"""Adam with a master copy per parameter: gradient read, three fp32 states read and written, 16-bit parameter written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and where they go. Parts are those of the busiest pipeline rank and add up to the total."""

    seconds: float
    parts: Mapping[str, float]

    @property
    def bubble(self) -> float:
        """Idle time of the busiest rank / the time it is not idle in the pipeline."""
        busy = sum(self.parts[name] for name in PARTS)
        return self.parts["bubble"] / busy if busy else 0.0


@dataclass(frozen=True)
class PhaseTime:
    """Sums over a layer's operators in one phase."""

    matrix: tuple[tuple[str, float], ...]
    """`(dtype, flops)` of products."""
    grouped: tuple[tuple[str, float], ...]
    attention: float
    products: float
    """Bytes of products."""
    traffic: float
    """Bytes of the rest."""
    starts: float
    """Products started."""
    kernels: float
    host: float
    collectives: tuple[Collective, ...]
    operators: tuple[Operator, ...]

    def per_flop(self, seconds: float) -> float:
        """Of the `seconds` of its products, those of one FLOP; 0 where there are none."""
        flops = sum(f for _, f in (*self.matrix, *self.grouped))
        return seconds / flops if flops else 0.0


@dataclass(frozen=True)
class Rates:
    """Constants turned into rates of one accelerator under one stack. Make with `rates`."""

    hardware: Hardware
    stack: Stack
    constants: Constants
    power: float
    attention: float
    memory: float
    elementwise: float
    fabric: Fabric | MeasuredFabric
    slower: float = 1.0
    """Of a measured machine: how much slower a rank computes because others do."""

    def matrix(self, dtype: str) -> float:
        """FLOP/s of products."""
        return self.hardware.peak(dtype) * self.constants.matrix(self.hardware.family, dtype) * self.power


def rates(part: Hardware, stack: Stack, constants: Constants) -> Rates:
    """The rates of an accelerator: data-sheet values times the constants of its family; of a measured machine, what was measured."""
    if part.measured is not None:
        own = part.measured
        stack, constants = own.stack(stack), own.constants(constants)
        return Rates(part, stack, constants, 1.0, 1.0, part.bandwidth, 1.0, MeasuredFabric(own, own.ranks))
    power = min(1.0, part.power / part.family_power) ** constants["power"]
    peak16 = part.peaks.get("bf16", part.peaks.get("fp16", 0.0))
    share = 1.0 if stack.attention == "unfused" else constants.attention(part.family, stack.attention) * part.softmax
    eager = 1.0 if stack.fused else constants["elementwise eager"]
    return Rates(
        *(part, stack, constants, power, peak16 * share * power, part.bandwidth * constants["memory"]),
        elementwise=constants["elementwise"] * eager,
        fabric=Fabric(
            part.link * constants["link"], part.nic * constants["nic"], constants["collective start"], part.hop, stack.adapters == "one"
        ),
    )


@dataclass(frozen=True)
class Memo:
    """Times already found, by identity: of layers and stages that many mappings of one job on one cluster share. It keeps them alive."""

    layers: dict[int, tuple[Layer, LayerTimes]] = field(default_factory=dict)
    stages: dict[int, tuple[StageLoad, LayerTimes]] = field(default_factory=dict)


def step_time(work: Workload, part: Hardware, stack: Stack, constants: Constants) -> StepTime:
    """Seconds of a step. The pipeline's order is simulated with the times of every stage, and transfers between ranks."""
    return timed(work, rates(part, stack, constants), Memo())


def timed(work: Workload, speed: Rates, memo: Memo, *, simulate: bool = True, pipeline: Callable[[Times], float] | None = None) -> StepTime:
    """As `step_time`. Without `simulate` a pipeline takes its microbatches on the busiest rank, and (p-1)/v of a mean one.

    `pipeline`: how long the pipeline of these times takes, for an order of its own.
    """
    if (machine := speed.hardware.measured) is not None:
        speed = _crowded(speed, machine, work)
    groups = {name: place(axis, speed.hardware.domain) for name, axis in work.axes.items()}
    different = {id(one): _stage_times(one, speed, groups, memo) for one in set(work.stages)}
    tables = [different[id(one)] for one in work.stages]
    send, blocking = _transfer(work, speed)
    extra = 0.0 if machine is None else speed.slower * machine.runtime["action" if work.ranks > 1 else "microbatch"] / 2
    times = Times(
        tuple(t.sums[0] + blocking + extra for t in tables),
        tuple(t.sums[1] + blocking + extra for t in tables),
        tuple(t.sums[2] for t in tables),
        send,
    )
    by_rank = [sum(t.sums[3] for t in work.pick(tables, r)) for r in range(work.ranks)]
    busiest = by_rank.index(max(by_rank))
    if pipeline is not None:
        lasts = pipeline(times)
    elif simulate:
        lasts = length(work.schedule, work.ranks, work.microbatches, times)
    else:
        idle = (work.ranks - 1) / work.virtual * sum(by_rank) / work.ranks
        lasts = times.busy(work.ranks, work.schedule) * work.microbatches + idle * IDLE.get(work.schedule, 1.0)
    if machine is not None and work.ranks > 1 and pipeline is None:
        lasts = max(lasts, _work_of_all(work, times) / machine.cores)
    mine = [sum(column) * work.microbatches for column in zip(*(t.all for t in work.pick(tables, busiest)))]
    parts = dict(zip(PARTS, mine))
    parts["host"] += 2 * extra * work.microbatches * work.virtual
    parts["pp"] = 2 * blocking * work.microbatches * work.virtual
    parts["bubble"] = max(0.0, lasts - sum(mine) - parts["pp"] - 2 * extra * work.microbatches * work.virtual)
    parts["dp"] += _data_parallel(work, times, speed, groups)
    parts["optimizer"] = _update(work, speed)
    parts["step"] = speed.constants["step"]
    before = sum(parts.values())
    parts["scale"] = before * ((1 + speed.constants["doubling"] * log2(work.gpus)) * speed.hardware.scale - 1)
    return StepTime(before + parts["scale"], parts)


@dataclass(frozen=True)
class LayerTimes:
    """Seconds per part and phase, of a layer or a stage. The gradient of the input includes what is computed again."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]

    @cached_property
    def all(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward, self.backward, self.weight)))

    @cached_property
    def sums(self) -> tuple[float, float, float, float]:
        """Seconds of forward, backward, weight, and all three."""
        return sum(self.forward), sum(self.backward), sum(self.weight), sum(self.all)


def _stage_times(one: StageLoad, speed: Rates, groups: Mapping[str, RankGroup], memo: Memo) -> LayerTimes:
    if id(one) not in memo.stages:
        rows = []
        for layer, times in one.layers:
            if id(layer) not in memo.layers:
                memo.layers[id(layer)] = layer, layer_times(layer, speed, groups)
            rows.append((memo.layers[id(layer)][1], times))
        columns = (
            tuple(sum(getattr(t, name)[i] * n for t, n in rows) for i in range(len(PARTS))) for name in ("forward", "backward", "weight")
        )
        memo.stages[id(one)] = one, LayerTimes(*columns)
    return memo.stages[id(one)][1]


def _crowded(speed: Rates, machine: Measured, work: Workload) -> Rates:
    """Rates among all ranks of a measured machine. In a pipeline ranks wait for each other, so that fewer compute at a time."""
    busy = work.gpus if work.ranks == 1 else min(work.gpus, machine.cores)
    return replace(speed, fabric=MeasuredFabric(machine, work.gpus), slower=machine.slower(busy))


def layer_times(layer: Layer, speed: Rates, groups: Mapping[str, RankGroup]) -> LayerTimes:
    """Seconds of a layer by part: forward, backward of the input with recompute before it, gradient of the weights."""
    forward, again, backward, weight = (_phase_times(p, speed, groups) for p in phases(layer))
    return LayerTimes(forward, tuple(a + b for a, b in zip(again, backward)), weight)


@lru_cache(maxsize=50_000)
def phases(layer: Layer) -> tuple[PhaseTime, PhaseTime, PhaseTime, PhaseTime]:
    """A layer's operators summed: forward, recompute, input, weight."""
    return tuple(_phase(layer, name) for name in ("forward", "recompute", "input", "weight"))  # type: ignore[return-value]


def _phase(layer: Layer, name: str) -> PhaseTime:
    operators = [o for o in layer.operators if o.phase == name]
    flops: dict[tuple[str, str], float] = {}
    for o in operators:
        flops[o.kind, o.dtype] = flops.get((o.kind, o.dtype), 0.0) + o.flops
    products = [o for o in operators if o.kind in ("matrix", "grouped")]
    rest = [o for o in operators if o.kind in ("attention", "elementwise")]
    return PhaseTime(
        tuple((dtype, f) for (kind, dtype), f in flops.items() if kind == "matrix"),
        tuple((dtype, f) for (kind, dtype), f in flops.items() if kind == "grouped"),
        sum(o.flops for o in operators if o.kind == "attention"),
        sum(o.bytes for o in products),
        sum(o.bytes for o in rest),
        sum(o.calls for o in products),
        sum(o.calls for o in rest),
        sum(o.calls for o in operators if o.kind == "host"),
        tuple(c for c in layer.collectives if c.phase == name),
        tuple(operators),
    )


def _phase_times(phase: PhaseTime, speed: Rates, groups: Mapping[str, RankGroup]) -> tuple[float, ...]:
    machine = speed.hardware.measured
    matrices, attention, elementwise, host = _of_sheet(phase, speed) if machine is None else _of_machine(phase, speed, machine)
    parts = [matrices, attention, elementwise, host, 0.0, 0.0, 0.0, 0.0]
    behind = {"matrix": matrices, "attention": attention, "compute": matrices + attention + elementwise, "": 0.0}
    waiting: dict[tuple[str, int], float] = {}
    for c in phase.collectives:
        took = speed.fabric.seconds(c.kind, groups[c.axis], c.bytes, c.copies)
        if c.beside and machine is None:
            parts[_AXIS_PART[c.axis]] += c.count * _rest(c.beside, took, phase.per_flop(matrices), speed)
        elif took:
            key = (c.behind, _AXIS_PART[c.axis])
            waiting[key] = waiting.get(key, 0.0) + c.count * took
    for (cover, part), took in waiting.items():
        parts[part] += _visible(cover, part, took, behind[cover], speed)
    return tuple(parts)


def _of_sheet(phase: PhaseTime, speed: Rates) -> tuple[float, float, float, float]:
    """Seconds of computation from rates: products, attention, the rest, the host."""
    k = speed.constants
    matrices = sum(f / speed.matrix(dtype) for dtype, f in phase.matrix)
    matrices += sum(f / (speed.matrix(dtype) * k["grouped"]) for dtype, f in phase.grouped)
    matrices += phase.products / speed.memory + phase.starts * k["matrix start"]
    elementwise = phase.traffic * speed.elementwise / speed.memory + phase.kernels * k["kernel start"]
    host = phase.host * k[speed.stack.moe] + (k["layer"] if phase.starts else 0.0)
    return matrices, phase.attention / speed.attention, elementwise, host


def _of_machine(phase: PhaseTime, speed: Rates, machine: Measured) -> tuple[float, float, float, float]:
    """The same as measured; the host is what the runtime takes beside each kernel and collective."""
    matrices, attention, elementwise = (speed.slower * seconds for seconds in machine.seconds(phase.operators))
    calls = sum(o.calls for o in phase.operators) + sum(c.count for c in phase.collectives)
    host = calls * machine.runtime["call"]
    host += sum(c.count for c in phase.collectives if _AXIS_PART[c.axis] == _AXIS_PART["dp"]) * machine.runtime["data"]
    return matrices, attention, elementwise, speed.slower * host


def _visible(cover: str, part: int, took: float, room: float, speed: Rates) -> float:
    """What of a communication a rank waits for, plus what it slows the computation that it hides behind."""
    k = speed.constants
    if part == _AXIS_PART["ep"] and not speed.stack.hides_ep:
        return k["exposed ep fused" if speed.stack.permutations < 4 else "exposed ep"] * took
    if cover == "matrix":
        return took * (k["exposed tp"] if speed.stack.hides_tp else 1.0)
    if cover in ("attention", "compute"):
        hidden = min(took, k["overlap window"] * room)
        return took - hidden + k["overlap slowdown"] * hidden
    return took


def _rest(beside: tuple[tuple[float, float], ...], took: float, per_flop: float, speed: Rates) -> float:
    """The same where it is known what runs beside which share of it."""
    k = speed.constants
    shown = max(0.0, *(share * took - k["overlap window"] * flops * per_flop for share, flops in beside))
    return shown + k["overlap slowdown"] * (took - shown)


def _work_of_all(work: Workload, times: Times) -> float:
    """Seconds of a step's computation on one core, of all ranks of a machine."""
    return sum(map(sum, (times.forward, times.input, times.weight))) * work.microbatches * work.gpus / work.ranks


def _transfer(work: Workload, speed: Rates) -> tuple[float, float]:
    """Seconds until a stage's result is on the next rank, and how long both ranks are busy with it."""
    if work.ranks == 1:
        return 0.0, 0.0
    inside = work.axes["pp"].stride * 2 <= speed.hardware.domain if "pp" in work.axes else False
    took = speed.fabric.transfer(work.send, inside=inside)
    return took, 0.0 if speed.stack.hides_p2p else took


def _data_parallel(work: Workload, times: Times, speed: Rates, groups: Mapping[str, RankGroup]) -> float:
    """Visible time of summing gradients and gathering parameters on the worst rank; later ranks have slack: their backward ends first."""
    gathers, sums = {}, {}
    extra = 0.0 if (machine := speed.hardware.measured) is None else speed.slower * machine.runtime["data"]
    for one in set(work.stages):
        seconds = [
            (c.kind == "all_gather", c.count * (speed.fabric.seconds(c.kind, groups[c.axis], c.bytes) + extra)) for c in one.collectives
        ]
        gathers[id(one)] = sum(t for gather, t in seconds if gather)
        sums[id(one)] = sum(t for gather, t in seconds if not gather)
    worst = slack = 0.0
    for rank in range(work.ranks):
        gather = sum(gathers[id(one)] for one in work.of_rank(rank))
        total = sum(sums[id(one)] for one in work.of_rank(rank))
        if speed.stack.hides_dp:
            forward = sum(work.pick(times.forward, rank))
            backward = sum(work.pick(times.input, rank)) + sum(work.pick(times.weight, rank))
            shown = _visible("compute", 7, gather, forward, speed) + _visible("compute", 7, total, backward, speed)
        else:
            shown = gather + total
        worst = max(worst, shown - slack)
        slack += times.input[rank] + times.weight[rank]
    return worst


def _update(work: Workload, speed: Rates) -> float:
    """Seconds of the optimizer, and of clearing and measuring gradients, on the rank with most parameters."""
    if (machine := speed.hardware.measured) is not None:
        return _measured_update(work, machine)
    most = 0.0
    for rank in range(work.ranks):
        total = 0.0
        for axis, size in (
            ("dp", sum(one.parameters for one in work.of_rank(rank))),
            ("edp", sum(one.expert_parameters for one in work.of_rank(rank))),
        ):
            parts = work.axes[axis].size if work.data_parallel != "replicate" else 1
            total += size * (
                OPTIMIZER_BYTES / parts + 2 * speed.stack.gradient / (parts if work.data_parallel in ("zero2", "zero3") else 1)
            )
        most = max(most, total)
    return most / speed.memory


def _measured_update(work: Workload, machine: Measured) -> float:
    """The same on a measured machine: every rank steps its tensors, of which data parallelism leaves it a part."""
    most = 0.0
    for rank in range(work.ranks):
        stages = work.of_rank(rank)
        elements = 0.0
        for axis, size in (("dp", sum(one.parameters for one in stages)), ("edp", sum(one.expert_parameters for one in stages))):
            elements += size / (work.axes[axis].size if work.data_parallel != "replicate" else 1)
        tensors = sum(one.tensors for one in stages)
        most = max(most, elements * machine.runtime["element"] + tensors * machine.runtime["tensor"])
    return most * machine.slower(work.gpus)
