"""A search in words: the ranking, the usual path of decisions and where the costs disagree with it, why families lost, what to type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from meshpar.errors import ConfigError
from meshpar.planner.constants import Constants
from meshpar.planner.hardware import HARDWARE, GiB
from meshpar.planner.layers import assemble
from meshpar.planner.mapping import RECOMPUTE, Job, Mapping, complaints
from meshpar.planner.memory import fullest
from meshpar.planner.search import Candidate, Search, estimate, limit, virtual_stages, why_slower


@dataclass(frozen=True)
class UsualStep:
    """One decision of the usual path."""

    question: str
    answer: str
    mapping: Mapping


def usual_path(job: Job, constants: Constants | None = None) -> tuple[UsualStep, ...]:
    """The decisions that guides give (arXiv 2104.04473 section 3, Megatron Core's guide): the last step's mapping is where they lead.

    In turn: one GPU; experts over ep; a long sequence over cp; tp up to the domain; stages; recompute; virtual stages. The rest is data.

    >>> from meshpar.planner import Cluster, Transformer
    >>> model = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> usual_path(Job(model, Cluster("h100", 64), seq=8192, batch=128))[-1].mapping.pp
    1
    """
    path = _Path(job, constants or Constants.default())
    now = Mapping()
    steps = [UsualStep("Does it fit with data parallelism alone?", path.answer(now), now)]
    for question, decide in _DECISIONS.items():
        chosen = decide(path, now)
        if chosen is not None:
            now = chosen
            steps.append(UsualStep(question, path.answer(now), now))
    return tuple(steps)


@dataclass(frozen=True)
class _Path:
    """What decisions ask of a mapping."""

    job: Job
    constants: Constants

    def need(self, mapping: Mapping) -> float:
        return fullest(assemble(self.job, mapping), self.job.software, self.constants).total

    def possible(self, mapping: Mapping) -> bool:
        return not list(complaints(self.job, mapping))

    def fits(self, mapping: Mapping) -> bool:
        return self.possible(mapping) and self.need(mapping) <= limit(self.job)

    def first(self, options: Iterable[Mapping]) -> Mapping | None:
        """The first that fits; if none does the last that can be run."""
        able = [one for one in options if self.possible(one)]
        return next((one for one in able if self.fits(one)), able[-1] if able else None)

    def answer(self, mapping: Mapping) -> str:
        if not self.possible(mapping):
            return f"cannot be run: {mapping}"
        return f"{self.need(mapping) / GiB:.0f} GiB of {limit(self.job) / GiB:.0f}: {mapping}"


def _experts(path: _Path, now: Mapping) -> Mapping | None:
    experts, domain = path.job.model.experts, path.job.cluster.hardware.domain
    if not experts or path.fits(now):
        return None
    return path.first(replace(now, ep=e) for e in range(1, min(experts, domain) + 1) if experts % e == 0)


def _sequence(path: _Path, now: Mapping) -> Mapping | None:
    if path.job.seq <= 4 * SEQUENCE:
        return None
    options = [replace(now, cp=c) for c in _powers(path.job.cluster.gpus) if path.job.seq // c >= SEQUENCE]
    return next((one for one in reversed(options) if path.possible(one)), None)


def _tensor(path: _Path, now: Mapping) -> Mapping | None:
    if path.fits(now):
        return None
    return path.first(replace(now, tp=t) for t in _powers(min(8, path.job.cluster.hardware.domain)))


def _stages(path: _Path, now: Mapping) -> Mapping | None:
    if path.fits(now):
        return None
    pps = [p for p in _powers(path.job.cluster.gpus) if p <= path.job.model.layers]
    return path.first(replace(now, pp=p, recompute=r) for p in pps for r in ("none", "activations"))


def _recompute(path: _Path, now: Mapping) -> Mapping | None:
    return None if path.fits(now) else path.first(replace(now, recompute=r) for r in RECOMPUTE)


def _virtual(path: _Path, now: Mapping) -> Mapping | None:
    if now.pp == 1:
        return None
    options = [replace(now, virtual=v) for v in reversed(virtual_stages(path.job.model.layers, now.pp))]
    return next((one for one in options if path.fits(one)), None)


SEQUENCE = 8192
"""Tokens of a sample a rank keeps on the usual path; cp starts beyond four times that."""
_DECISIONS = {
    "Experts over ep, inside the domain.": _experts,
    "A long sequence over cp.": _sequence,
    "tp, inside the domain.": _tensor,
    "Stages, with the recompute that costs little.": _stages,
    "Recompute.": _recompute,
    "Virtual stages, as many as fit.": _virtual,
}


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def explain(found: Search, constants: Constants | None = None) -> str:
    """A search as text."""
    return "\n".join(_lines(found, constants or Constants.default()))


def _lines(found: Search, constants: Constants) -> Iterator[str]:
    job, best = found.job, found.best
    part = job.cluster.hardware
    yield f"{job.cluster.gpus} x {part.name}, {job.batch} samples of {job.seq} tokens, {job.precision}, {job.software.name}"
    yield f"{found.tried} mappings tried, {found.fit} fit in {limit(job) / GiB:.0f} GiB; {found.seconds:.1f} s"
    yield ""
    yield "The best of every shape (tp, pp, cp, ep, how parameters are shared out):"
    yield "  step s  (10-90 %)      tok/s/GPU  MFU   GiB  bubble  visible s: tp / cp / ep / dp / pp   mapping"
    yield from (_row(job, one, constants) for one in found.shapes)
    yield ""
    yield "The usual path of decisions:"
    steps = usual_path(job, constants)
    yield from (f"  {step.question} {step.answer}" for step in steps)
    yield f"  {_verdict(job, best, steps[-1].mapping, constants)}"
    yield ""
    yield "The best of the families that lost:"
    yield from (f"  {lost.family}: {lost.best.mapping}: {lost.why}" for lost in found.lost)


def _row(job: Job, one: Candidate, constants: Constants) -> str:
    low, high = interval(job, one, constants)
    rate = job.tokens / one.seconds / job.cluster.gpus
    visible = " / ".join(f"{one.exposed[axis]:.2f}" for axis in ("tp", "cp", "ep", "dp", "pp"))
    flops = assemble(job, one.mapping).info["causal"]
    share = rate * flops / job.cluster.hardware.peak(job.precision)
    return (
        f"{one.seconds:8.2f}  ({low:.2f}-{high:.2f})  {rate:9.0f}  {100 * share:3.0f}%  {one.memory.total / GiB:4.0f}  "
        f"{100 * one.time.bubble:5.1f}%  "
        f"{visible}   {one.mapping}"
    )


def interval(job: Job, one: Candidate, constants: Constants | None = None) -> tuple[float, float]:
    """Seconds between which a step lies in 80 of 100 cases, as far as sources left out of the fit tell."""
    low, high = (constants or Constants.default()).spread["experts" if job.model.experts else "dense"]
    return one.seconds * low, one.seconds * high


def _verdict(job: Job, best: Candidate, mapping: Mapping, constants: Constants) -> str:
    if list(complaints(job, mapping)):
        return "It ends where nothing can be run: the search is right to leave it."
    usual = estimate(job, mapping, constants)
    if usual.memory.total > limit(job):
        return f"It ends in a mapping that does not fit ({usual.memory.total / GiB:.0f} GiB): the search is right to leave it."
    if usual.seconds < best.seconds * 1.01:
        return "Cost agrees: the best found is no faster."
    return f"Cost disagrees, {why_slower(best, usual)}. The best found: {best.mapping}."


def toml(job: Job, mapping: Mapping) -> str:
    """The mapping as a configuration file: the mesh, what `ParallelConfig` takes, and the batch that it is for.

    >>> from meshpar.planner import Cluster, Transformer
    >>> model = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> print(toml(Job(model, Cluster("h100", 64), seq=8192, batch=128), Mapping(tp=2, pp=2, virtual=4)))
    mesh = "pp=2,dp=16,tp=2"
    <BLANKLINE>
    [config]
    microbatches = 8
    schedule = "interleaved-1f1b"
    virtual_stages = 4
    data_parallel = "zero1"
    recompute = "none"
    sequence_parallel = true
    precision = "bf16"
    hardware = "h100"
    <BLANKLINE>
    [batch]
    microbatch = 1
    seq = 8192
    """
    gpus = job.cluster.gpus
    data = mapping.data(gpus)
    if mapping.ep > 1 and (mapping.expert_tp != mapping.tp or data % mapping.ep):
        raise ConfigError(
            f"toml: a mesh has one grid, in which ep divides the data ranks ({data}) and experts are split over tp={mapping.tp} too; "
            f"this mapping has ep={mapping.ep} with etp={mapping.expert_tp}. Search with Space(fold_experts=False)."
        )
    sizes = {"pp": mapping.pp, "dp": data // mapping.ep, "cp": mapping.cp, "ep": mapping.ep, "tp": mapping.tp}
    mesh = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "dp=1"
    lines = [f'mesh = "{mesh}"', "", "[config]", f"microbatches = {mapping.microbatches(job)}", f'schedule = "{mapping.order}"']
    lines += [f"virtual_stages = {mapping.virtual}"] if mapping.virtual > 1 else []
    recompute = {"activations": "selective"}.get(mapping.recompute, mapping.recompute)
    lines += [f'data_parallel = "{mapping.data_parallel}"', f'recompute = "{recompute}"']
    lines += [f"sequence_parallel = {str(mapping.sequence_parallel and mapping.tp > 1).lower()}"]
    lines += [f'precision = "{job.precision}"'] if job.precision in ("bf16", "fp16", "fp32") else []
    lines += [f'hardware = "{job.cluster.hardware.name}"'] if job.cluster.hardware.name in HARDWARE else []
    return "\n".join([*lines, "", "[batch]", f"microbatch = {mapping.microbatch}", f"seq = {job.seq}"])


def launch(job: Job, script: str = "train.py", *, slurm: bool = False) -> str:
    """The line that starts a job on its cluster: torchrun on every server, or SLURM.

    >>> from meshpar.planner import Cluster, Transformer
    >>> model = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> launch(Job(model, Cluster("h100", 64), seq=8192, batch=128))
    'torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500 train.py'
    """
    node = min(job.cluster.hardware.node, job.cluster.gpus)
    nodes = job.cluster.gpus // node
    if slurm:
        return f"srun --nodes={nodes} --ntasks-per-node={node} --gpus-per-node={node} python {script}"
    where = " --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500" if nodes > 1 else " --standalone"
    return f"torchrun --nnodes={nodes} --nproc-per-node={node}{where} {script}"
