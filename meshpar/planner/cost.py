"""How long a step of a workload takes on a cluster: layers from rates, the pipeline simulated, what of communication stays visible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log2

from meshpar.planner.comm import Fabric, Group, place
from meshpar.planner.constants import Constants
from meshpar.planner.hardware import Hardware
from meshpar.planner.schedule import Times, length
from meshpar.planner.stack import Stack
from meshpar.planner.workload import Collective, Layer, Stage, Workload

PARTS = ("matrices", "attention", "elementwise", "host", "tp", "cp", "ep", "dp")
"""Where a layer's time goes; the names of axes are visible communication."""
COMPUTE = 4
"""The first so many parts are computation."""
_AXIS_PART = {"tp": 4, "etp": 4, "cp": 5, "ep": 6, "dp": 7, "edp": 7}
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
class Phase:
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
    fabric: Fabric

    def matrix(self, dtype: str) -> float:
        """FLOP/s of products."""
        return self.hardware.peak(dtype) * self.constants.matrix(self.hardware.family, dtype) * self.power


def rates(part: Hardware, stack: Stack, constants: Constants) -> Rates:
    """The rates of an accelerator: data-sheet values times the constants of its family."""
    power = min(1.0, part.power / part.family_power) ** constants["power"]
    peak16 = part.peaks.get("bf16", part.peaks.get("fp16", 0.0))
    share = 1.0 if stack.attention == "unfused" else constants.attention(part.family, stack.attention) * part.softmax
    eager = 1.0 if stack.fused else constants["elementwise eager"]
    return Rates(
        *(part, stack, constants, power, peak16 * share * power, part.bandwidth * constants["memory"]),
        elementwise=constants["elementwise"] * eager,
        fabric=Fabric(part.link * constants["link"], part.nic * constants["nic"], constants["collective start"], part.hop, stack.adapters == "one"),
    )


def step_time(work: Workload, part: Hardware, stack: Stack, constants: Constants) -> StepTime:
    """Seconds of a step. The pipeline's order is simulated with the times of every stage, and transfers between ranks."""
    return _step_time(work, rates(part, stack, constants), {})


def _step_time(work: Workload, speed: Rates, known: dict[int, LayerTimes]) -> StepTime:
    groups = {name: place(axis, speed.hardware.domain) for name, axis in work.axes.items()}
    tables = [_stage_times(one, speed, groups, known) for one in work.stages]
    send, blocking = _transfer(work, speed)
    times = Times(
        tuple(sum(t.forward) + blocking for t in tables),
        tuple(sum(t.backward) + blocking for t in tables),
        tuple(sum(t.weight) for t in tables),
        send,
    )
    pipeline = length(work.schedule, work.ranks, work.microbatches, times)
    busiest = max(range(work.ranks), key=lambda r: sum(sum(t.all) for t in tables[r :: work.ranks]))
    mine = [sum(column) * work.microbatches for column in zip(*(t.all for t in tables[busiest :: work.ranks]))]
    data = max(_data_parallel(work, rank, times, speed, groups) for rank in range(work.ranks))
    updates = max(_update(work, rank, speed) for rank in range(work.ranks))
    parts = dict(zip(PARTS, mine))
    parts["pp"] = 2 * blocking * work.microbatches * work.virtual
    parts["bubble"] = pipeline - sum(mine) - parts["pp"]
    parts["dp"] += data
    parts["optimizer"] = updates
    parts["step"] = speed.constants["step"]
    before = sum(parts.values())
    parts["scale"] = before * speed.constants["doubling"] * log2(work.gpus)
    return StepTime(before + parts["scale"], parts)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds per part and phase, of a layer or a stage. The gradient of the input includes what is computed again."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]

    @property
    def all(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward, self.backward, self.weight)))


def _stage_times(one: Stage, speed: Rates, groups: Mapping[str, Group], known: dict[int, LayerTimes]) -> LayerTimes:
    rows = []
    for layer, times in one.layers:
        if id(layer) not in known:
            known[id(layer)] = layer_times(layer, speed, groups)
        rows.append((known[id(layer)], times))
    return LayerTimes(*(tuple(sum(getattr(t, name)[i] * n for t, n in rows) for i in range(len(PARTS))) for name in LayerTimes.__slots__))


def layer_times(layer: Layer, speed: Rates, groups: Mapping[str, Group]) -> LayerTimes:
    """Seconds of a layer by part: forward, backward of the input with recompute before it, gradient of the weights."""
    forward, again, backward, weight = (_phase_times(p, speed, groups) for p in phases(layer))
    return LayerTimes(forward, tuple(a + b for a, b in zip(again, backward)), weight)


@lru_cache(maxsize=50_000)
def phases(layer: Layer) -> tuple[Phase, Phase, Phase, Phase]:
    """A layer's operators summed: forward, recompute, input, weight."""
    return tuple(_phase(layer, name) for name in ("forward", "recompute", "input", "weight"))  # type: ignore[return-value]


def _phase(layer: Layer, name: str) -> Phase:
    operators = [o for o in layer.operators if o.phase == name]
    flops: dict[tuple[str, str], float] = {}
    for o in operators:
        flops[o.kind, o.dtype] = flops.get((o.kind, o.dtype), 0.0) + o.flops
    products = [o for o in operators if o.kind in ("matrix", "grouped")]
    rest = [o for o in operators if o.kind in ("attention", "elementwise")]
    return Phase(
        tuple((dtype, f) for (kind, dtype), f in flops.items() if kind == "matrix"),
        tuple((dtype, f) for (kind, dtype), f in flops.items() if kind == "grouped"),
        sum(o.flops for o in operators if o.kind == "attention"),
        sum(o.bytes for o in products),
        sum(o.bytes for o in rest),
        sum(o.calls for o in products),
        sum(o.calls for o in rest),
        sum(o.calls for o in operators if o.kind == "host"),
        tuple(c for c in layer.collectives if c.phase == name),
    )


def _phase_times(phase: Phase, speed: Rates, groups: Mapping[str, Group]) -> tuple[float, ...]:
    k = speed.constants
    matrices = sum(f / speed.matrix(dtype) for dtype, f in phase.matrix)
    matrices += sum(f / (speed.matrix(dtype) * k["grouped"]) for dtype, f in phase.grouped)
    matrices += phase.products / speed.memory + phase.starts * k["matrix start"]
    attention = phase.attention / speed.attention
    elementwise = phase.traffic * speed.elementwise / speed.memory + phase.kernels * k["kernel start"]
    host = phase.host * k[speed.stack.moe] + (k["layer"] if phase.starts else 0.0)
    parts = [matrices, attention, elementwise, host, 0.0, 0.0, 0.0, 0.0]
    behind = {"matrix": matrices, "attention": attention, "compute": matrices + attention + elementwise, "": 0.0}
    waiting: dict[tuple[str, int], float] = {}
    for c in phase.collectives:
        took = c.count * speed.fabric.seconds(c.kind, groups[c.axis], c.bytes, c.copies)
        if took:
            key = (c.behind, _AXIS_PART[c.axis])
            waiting[key] = waiting.get(key, 0.0) + took
    for (cover, part), took in waiting.items():
        parts[part] += _visible(cover, part, took, behind[cover], speed)
    return tuple(parts)


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


def _transfer(work: Workload, speed: Rates) -> tuple[float, float]:
    """Seconds until a stage's result is on the next rank, and how long both ranks are busy with it."""
    if work.ranks == 1:
        return 0.0, 0.0
    inside = work.axes["pp"].stride * 2 <= speed.hardware.domain if "pp" in work.axes else False
    took = speed.fabric.transfer(work.send, inside=inside)
    return took, 0.0 if speed.stack.hides_p2p else took


def _data_parallel(work: Workload, rank: int, times: Times, speed: Rates, groups: Mapping[str, Group]) -> float:
    """Visible time of summing gradients and gathering parameters, beyond the slack of a rank whose backward ends before the first one's."""
    took = {"forward": 0.0, "backward": 0.0}
    for one in work.of_rank(rank):
        for c in one.collectives:
            side = "forward" if c.kind == "all_gather" else "backward"
            took[side] += c.count * speed.fabric.seconds(c.kind, groups[c.axis], c.bytes)
    forward = sum(times.forward[rank :: work.ranks])
    backward = sum(times.input[rank :: work.ranks]) + sum(times.weight[rank :: work.ranks])
    slack = sum(times.input[q] + times.weight[q] for q in range(rank))
    if not speed.stack.hides_dp:
        return max(0.0, sum(took.values()) - slack)
    shown = _visible("compute", 7, took["forward"], forward, speed) + _visible("compute", 7, took["backward"], backward, speed)
    return max(0.0, shown - slack)


def _update(work: Workload, rank: int, speed: Rates) -> float:
    """Seconds of the optimizer, and of clearing and measuring gradients."""
    total = 0.0
    shared = work.data_parallel != "replicate"
    for one in work.of_rank(rank):
        for axis, size in (("dp", one.parameters), ("edp", one.expert_parameters)):
            parts = work.axes[axis].size if shared else 1
            whole = parts if work.data_parallel == "zero3" else 1
            total += size * (OPTIMIZER_BYTES / parts + 2 * speed.stack.gradient / whole)
    return total / speed.memory
