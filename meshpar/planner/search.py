"""Which mappings of a job fit, which are fastest, and why the best of every family that lost did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as Map
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import log
from typing import Any

from meshpar.errors import ConfigError
from meshpar.planner.constants import Constants
from meshpar.planner.cost import PARTS, Memo, StepTime, rates, timed
from meshpar.planner.hardware import GiB
from meshpar.planner.layers import assemble
from meshpar.planner.mapping import RECOMPUTE, V_SHAPED, Job, Mapping, complaints
from meshpar.planner.memory import PeakMemory, fullest, roughly

SIMULATED = 48
"""So many of the fastest by closed form are simulated, and of so many shapes the best, and of every family the best."""


@dataclass(frozen=True)
class Space:
    """The values a search tries. A value that cannot be for a job is left out there."""

    tp: tuple[int, ...] = (1, 2, 4, 8, 16)
    pp: tuple[int, ...] = ()
    """Empty: every divisor of the number of GPUs up to the number of layers."""
    virtual: tuple[int, ...] = ()
    """Empty: every divisor of the layers of a pipeline rank, and those that go evenly with embedding and head counted as layers."""
    cp: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    shortest: int = 4096
    """No cp that leaves a rank fewer tokens of a sample."""
    ep: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    microbatch: tuple[int, ...] = (1, 2, 4, 8)
    data_parallel: tuple[str, ...] = ("zero1", "zero2", "zero3")
    """zero2 without a pipeline only: within one it is zero1."""
    schedules: tuple[str, ...] = ("1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev")
    recompute: tuple[str, ...] = RECOMPUTE
    tp_inside_domain: bool = True
    """No tp (nor tp inside experts) over more ranks than a fast domain holds."""
    fold_experts: bool = True
    """Try experts that are whole on a rank (etp = 1) beside experts split like everything else (etp = tp)."""


@dataclass(frozen=True)
class Candidate:
    """A mapping with what it costs."""

    mapping: Mapping
    time: StepTime
    memory: PeakMemory
    simulated: bool

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def exposed(self) -> Map[str, float]:
        """Visible seconds of communication by axis."""
        return {axis: self.time.parts[axis] for axis in ("tp", "cp", "ep", "dp", "pp")}

    @property
    def family(self) -> str:
        return family(self.mapping)


def shape(mapping: Mapping) -> tuple[object, ...]:
    """The degrees, and how parameters are shared out: what is left of a mapping without microbatch, virtual stages and recompute."""
    return mapping.tp, mapping.pp, mapping.cp, mapping.ep, mapping.data_parallel


@dataclass(frozen=True)
class Lost:
    """The best of a family that is not the best of all."""

    family: str
    best: Candidate
    fits: bool
    why: str


@dataclass(frozen=True)
class Search:
    """What a search found, fastest first; `lost` has the best of each other family."""

    job: Job
    ranked: tuple[Candidate, ...]
    shapes: tuple[Candidate, ...]
    """The best of every shape."""
    lost: tuple[Lost, ...]
    tried: int
    fit: int
    seconds: float

    @property
    def best(self) -> Candidate:
        return self.ranked[0]


Watched = Callable[[Sequence[Any]], Iterable[Any]]
"""Hands on the steps of something that takes long, and tells somebody how many are done."""


def search(job: Job, space: Space | None = None, constants: Constants | None = None, *, top: int = 10, watched: Watched = iter) -> Search:
    """Every mapping in a space that the job allows, ranked by estimated time among those that fit in memory.

    All are timed in closed form; the fastest, and the best of each family, with their pipeline simulated. Of recompute, the least that
    fits is kept. Raises `ConfigError` if nothing may be run, or nothing fits: with the mapping that lacks least.

    >>> from meshpar.planner import Cluster, Transformer
    >>> model = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> found = search(Job(model, Cluster("h100", 64), seq=8192, batch=128), Space(tp=(1, 2), microbatch=(1,)))
    >>> found.best.memory.total < 80e9
    True
    """
    begun = time.perf_counter()
    constants, room = constants or Constants.default(), limit(job)
    speed, memo = rates(job.cluster.hardware, job.software, constants), Memo()
    fitting: list[Candidate] = []
    small: dict[str, tuple[Mapping, PeakMemory]] = {}  # family -> of the mappings that do not fit, the one that lacks least
    tried = 0
    for options in watched(list(candidates(job, space or Space()))):
        for mapping in options:
            tried += 1
            work = assemble(job, mapping)
            need = roughly(work, job.software, constants)
            if need.total <= room:
                fitting.append(Candidate(mapping, timed(work, speed, memo, simulate=False), need, False))
                break
            name = family(mapping)
            if name not in small or need.total < small[name][1].total:
                small[name] = mapping, need
    if not tried:
        raise ConfigError(
            f"search: no mapping of this space can be run on {job.cluster.gpus} GPUs with batch={job.batch}. Widen the space."
        )
    if not fitting:
        least, need = min(small.values(), key=lambda pair: pair[1].total)
        raise ConfigError(
            f"search: nothing fits. The least is {need.total / GiB:.0f} GiB of {room / GiB:.0f}: {least}. Take more GPUs, or larger ones."
        )
    fitting.sort(key=lambda c: c.seconds)
    ranked = _simulated(job, fitting, constants, memo, top, watched)
    lost = _lost(job, ranked, small, constants)
    shapes = {shape(one.mapping): one for one in reversed(ranked)}
    different = sorted(shapes.values(), key=_rank)
    return Search(job, tuple(ranked[:top]), tuple(different[:top]), lost, tried, len(fitting), time.perf_counter() - begun)


def family(mapping: Mapping) -> str:
    """What is parallel, without sizes.

    >>> family(Mapping(tp=4, pp=2))
    'tp pp, zero1'
    """
    axes = [name for name in ("tp", "pp", "cp", "ep") if getattr(mapping, name) > 1]
    return f"{' '.join(axes) or 'data only'}, {mapping.data_parallel}"


def estimate(job: Job, mapping: Mapping, constants: Constants | None = None) -> Candidate:
    """One mapping, simulated. Raises `ConfigError` with everything that keeps it from being run; not if it does not fit in memory."""
    found = list(complaints(job, mapping))
    if found:
        raise ConfigError("\n  ".join([f"{mapping}:", *found]))
    constants = constants or Constants.default()
    work = assemble(job, mapping)
    found_time = timed(work, rates(job.cluster.hardware, job.software, constants), Memo())
    return Candidate(mapping, found_time, fullest(work, job.software, constants), True)


def limit(job: Job) -> float:
    """Bytes of an accelerator that training can use."""
    return job.cluster.hardware.memory * job.cluster.hardware.usable


def candidates(job: Job, space: Space) -> Iterator[Iterable[Mapping]]:
    """Mappings that can be run, as groups that differ in recompute alone, least first."""
    model, gpus, part = job.model, job.cluster.gpus, job.cluster.hardware
    pps = space.pp or tuple(p for p in _divisors(gpus) if p <= model.layers + 2)
    eps = tuple(e for e in space.ep if model.experts % e == 0) if model.experts else (1,)
    for tp, pp, cp in product(space.tp, pps, space.cp):
        too_short = cp > 1 and job.seq // cp < space.shortest
        if gpus % (tp * pp * cp) or model.heads % tp or too_short or (space.tp_inside_domain and tp > part.domain):
            continue
        virtuals = space.virtual or virtual_stages(model.layers, pp)
        modes = tuple(mode for mode in space.data_parallel if mode != "zero2" or pp == 1)
        orders = {virtual: _orders(pp, virtual, space.schedules) for virtual in virtuals}
        for virtual, ep, microbatch, mode in product(virtuals, eps, space.microbatch, modes):
            for etp, order in product(_expert_tps(tp, ep, model.experts, space.fold_experts), orders[virtual]):
                first = Mapping(tp, pp, virtual, cp, ep, etp, microbatch, order, mode, space.recompute[0])
                if not any(True for _ in complaints(job, first)):
                    yield [first, *(replace(first, recompute=r) for r in space.recompute[1:])]


def _orders(pp: int, virtual: int, schedules: tuple[str, ...]) -> tuple[str, ...]:
    """The schedules to try with so many stages on a rank; "" is the usual one."""
    if pp == 1:
        return ("",)
    usual = "interleaved-1f1b" if virtual > 1 else "1f1b"
    others = {1: ("gpipe", "zero-bubble"), 2: ("looped-bfs", *V_SHAPED)}.get(virtual, ("looped-bfs",))
    return (*([""] if usual in schedules else []), *(name for name in others if name in schedules))


@lru_cache(maxsize=4096)
def virtual_stages(layers: int, pp: int) -> tuple[int, ...]:
    """Stages per rank that cut layers evenly, or layers with embedding and head counted as one each.

    >>> virtual_stages(126, 8), virtual_stages(80, 8)
    ((1, 2, 4, 8, 16), (1, 2, 5, 10))
    """
    if pp == 1:
        return (1,)
    return tuple(
        v for v in range(1, (layers + 2) // pp + 1) if v == 1 or layers % (pp * v) == 0 or (layers % pp and (layers + 2) % (pp * v) == 0)
    )


def _expert_tps(tp: int, ep: int, experts: int, fold: bool) -> tuple[int | None, ...]:
    if not experts or tp == 1:
        return (None,)
    return (tp, 1) if fold else (tp,)


@lru_cache(maxsize=256)
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _simulated(job: Job, fitting: list[Candidate], constants: Constants, memo: Memo, top: int, watched: Watched) -> list[Candidate]:
    """The promising ones once more with the pipeline simulated and memory by the order, fastest first; without those that do not fit."""
    chosen = fitting[: min(SIMULATED, 2 * top)]
    shapes, families = {shape(c.mapping) for c in chosen}, {c.family for c in chosen}
    for one in fitting[len(chosen) :]:
        if one.family not in families or (shape(one.mapping) not in shapes and len(shapes) < SIMULATED):
            shapes.add(shape(one.mapping))
            families.add(one.family)
            chosen.append(one)
    speed, found = rates(job.cluster.hardware, job.software, constants), []
    for one in watched(chosen):
        work = assemble(job, one.mapping)
        found.append(Candidate(one.mapping, timed(work, speed, memo), fullest(work, job.software, constants), True))
    kept = [one for one in found if one.memory.total <= limit(job)]
    return sorted(kept or found, key=_rank)


def _rank(one: Candidate) -> tuple[object, ...]:
    """Time in steps of half a percent; among equals the simpler mapping first."""
    m = one.mapping
    axes = sum(size > 1 for size in (m.tp, m.pp, m.cp, m.ep))
    return round(log(one.seconds) / 0.005), axes, m.cp, m.virtual, m.microbatch, RECOMPUTE.index(m.recompute), one.seconds


def _lost(job: Job, ranked: list[Candidate], small: Map[str, tuple[Mapping, PeakMemory]], constants: Constants) -> tuple[Lost, ...]:
    best, room = ranked[0], limit(job) / GiB
    found: dict[str, Lost] = {}
    for one in ranked:
        if one.family != best.family and one.family not in found:
            found[one.family] = Lost(one.family, one, True, why_slower(best, one))
    for name, (mapping, need) in small.items():
        if name != best.family and name not in found:
            largest = max(need.parts().items(), key=lambda part: part[1])[0]
            why = f"does not fit: {need.total / GiB:.0f} GiB of {room:.0f} even with recompute={mapping.recompute}; most of it {largest}"
            found[name] = Lost(name, estimate(job, mapping, constants), False, why)
    return tuple(sorted(found.values(), key=lambda lost: (not lost.fits, lost.best.seconds)))


def why_slower(best: Candidate, other: Candidate) -> str:
    """The parts of a step that make one mapping slower than another, largest first."""
    difference = {name: other.time.parts[name] - best.time.parts[name] for name in (*PARTS, "pp", "bubble", "optimizer")}
    worse = sorted(((d, name) for name, d in difference.items() if d > 0.005 * best.seconds), reverse=True)[:3]
    total = other.seconds / best.seconds - 1
    reasons = ", ".join(f"{name} +{seconds:.2f} s" for seconds, name in worse) or "a little of everything"
    return f"{100 * total:+.0f} %: {reasons}"
