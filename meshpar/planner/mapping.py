"""A job (model, cluster, batch, precision, stack) and a mapping of it onto ranks, and all that can be wrong with the two together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshpar.errors import ConfigError, raise_all
from meshpar.planner.hardware import ALIASES, Cluster
from meshpar.planner.stack import DEFAULT, Stack, stack
from meshpar.planner.transformer import Transformer

SCHEDULES = ("gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev")
V_SHAPED = ("zbv", "dualpipev")
"""Two stages on a rank, r and 2p-1-r."""
DATA_PARALLEL = ("replicate", "zero1", "zero2", "zero3")
RECOMPUTE = ("none", "activations", "selective", "full")
"""What is computed twice: nothing; norms and activation functions; the core of attention (or what the stack means by it); every block."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what. Raises `ConfigError` with everything that is missing or unknown.

    >>> m = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    >>> Job(m, Cluster("h100", 64), seq=8192, batch=512).tokens
    4194304
    """

    model: Transformer
    cluster: Cluster
    seq: int = 0
    """Tokens in a sample."""
    batch: int = 0
    """Samples in a step, over all ranks."""
    precision: str = "bf16"
    """Of the products of blocks; the head and attention stay in 16 bits."""
    stack: str | Stack = DEFAULT

    def __post_init__(self) -> None:
        complaints = [
            f"{name} is missing; give {what}, a whole number of at least 1 (found {getattr(self, name)!r})."
            for name, what in (("seq", "the tokens of a sample"), ("batch", "the samples of a step over all ranks"))
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        peaks = self.cluster.hardware.peaks
        if ALIASES.get(self.precision, self.precision) not in peaks:
            complaints.append(f"precision={self.precision!r}; {self.cluster.hardware.name} has {', '.join(peaks)}.")
        try:
            stack(self.stack)
        except ConfigError as error:
            complaints.append(str(error))
        raise_all(ConfigError, "Job:", complaints)

    @property
    def software(self) -> Stack:
        return stack(self.stack)

    @property
    def dtype(self) -> str:
        """The matrix units that products use."""
        return ALIASES.get(self.precision, self.precision)

    @property
    def half(self) -> str:
        """The 16-bit precision beside it."""
        return self.precision if self.precision in ("bf16", "fp16") else "bf16"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq * self.batch


@dataclass(frozen=True, order=True)
class Mapping:
    """Degrees of parallelism and what goes with them. Data parallelism is what is left: gpus / (tp pp cp).

    >>> Mapping(tp=8, pp=8, virtual=2).data(512)
    8
    """

    tp: int = 1
    pp: int = 1
    virtual: int = 1
    """Stages per pipeline rank."""
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    """tp inside experts; None: 1 where experts are spread over ranks, else as tp."""
    microbatch: int = 1
    """Samples of a microbatch on a data rank."""
    schedule: str = ""
    """"" picks "1f1b", or "interleaved-1f1b" with virtual stages."""
    data_parallel: str = "zero1"
    recompute: str = "none"
    sequence_parallel: bool = True

    @property
    def order(self) -> str:
        """The schedule by name."""
        return self.schedule or ("interleaved-1f1b" if self.virtual > 1 else "1f1b")

    @property
    def expert_tp(self) -> int:
        return self.etp if self.etp is not None else (1 if self.ep > 1 else self.tp)

    def data(self, gpus: int) -> int:
        """Ranks that see different samples."""
        return gpus // (self.tp * self.pp * self.cp)

    def microbatches(self, job: Job) -> int:
        """Microbatches of a step on a data rank."""
        return job.batch // (self.microbatch * self.data(job.cluster.gpus))

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}"]
        parts += [f"virtual={self.virtual}"] if self.virtual > 1 else []
        parts += [f"cp={self.cp}"] if self.cp > 1 else []
        parts += [f"ep={self.ep}", f"etp={self.expert_tp}"] if self.ep > 1 else []
        return " ".join([*parts, f"microbatch={self.microbatch}", self.data_parallel, f"recompute={self.recompute}", self.order])


def complaints(job: Job, mapping: Mapping) -> Iterator[str]:
    """Everything that keeps a mapping from being run, with the values that would do."""
    sizes = ("tp", "pp", "virtual", "cp", "ep", "microbatch")
    bad = [
        name
        for name in sizes
        if isinstance(getattr(mapping, name), bool) or not isinstance(getattr(mapping, name), int) or getattr(mapping, name) < 1
    ]
    yield from (f"{name}={getattr(mapping, name)!r}; a whole number of at least 1." for name in bad)
    for name, known in (("data_parallel", DATA_PARALLEL), ("recompute", RECOMPUTE)):
        if getattr(mapping, name) not in known:
            yield f"{name}={getattr(mapping, name)!r}; known: {', '.join(known)}."
    if mapping.order not in SCHEDULES:
        yield f"schedule={mapping.schedule!r}; the planner simulates {', '.join(SCHEDULES)}."
    for name in bad:  # the rest is judged as if it were 1
        mapping = replace(mapping, **{name: 1})  # type: ignore[arg-type]
    yield from _of_heads(job.model, mapping)
    yield from _of_layers(job.model, mapping)
    yield from _of_ranks(job, mapping)
    yield from _of_experts(job, mapping)


def check(job: Job, mapping: Mapping) -> None:
    """Raise one `ConfigError` with all `complaints`."""
    raise_all(ConfigError, f"{mapping}:", list(complaints(job, mapping)))


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _of_heads(model: Transformer, mapping: Mapping) -> Iterator[str]:
    if model.heads % mapping.tp:
        yield f"tp={mapping.tp} does not divide {model.heads} heads. Valid tp: {_divisors(model.heads)}."
    elif max(model.keys, mapping.tp) % min(model.keys, mapping.tp):
        yield f"tp={mapping.tp} and {model.keys} key/value heads: neither divides the other. Valid tp: their divisors or multiples."
    if model.ffn % mapping.tp:
        yield f"tp={mapping.tp} does not divide ffn={model.ffn}."


def _of_layers(model: Transformer, mapping: Mapping) -> Iterator[str]:
    stages = mapping.pp * mapping.virtual
    if stages > model.layers + 2:
        yield f"pp x virtual = {stages} stages for {model.layers} layers. At most one layer, the embedding or the head to a stage."
    if mapping.virtual > 1 and mapping.pp == 1:
        yield f"virtual={mapping.virtual} without a pipeline; give pp of at least 2."
    several = mapping.order in ("interleaved-1f1b", "looped-bfs", *V_SHAPED)
    if mapping.virtual > 1 and not several:
        yield (
            f"{mapping.order} has one stage per rank, virtual={mapping.virtual}. With several: interleaved-1f1b, looped-bfs; with two: "
            f"{', '.join(V_SHAPED)}."
        )
    if mapping.order in V_SHAPED and mapping.virtual != 2:
        yield f"{mapping.order} has two stages per rank, virtual={mapping.virtual}; give virtual=2."
    if mapping.schedule in ("interleaved-1f1b", "looped-bfs") and mapping.virtual < 2:
        yield f"{mapping.schedule} has several stages per rank; give virtual of at least 2."


def _of_ranks(job: Job, mapping: Mapping) -> Iterator[str]:
    gpus, model = job.cluster.gpus, mapping.tp * mapping.pp * mapping.cp
    if gpus % model:
        yield f"tp x pp x cp = {model} does not divide {gpus} GPUs. Valid products: {_divisors(gpus)}."
        return
    if job.seq % (2 * mapping.cp) and mapping.cp > 1:
        yield f"cp={mapping.cp} does not divide seq={job.seq} into two balanced parts per rank (2 x cp)."
    share = mapping.data(gpus) * mapping.microbatch
    if job.batch % share:
        yield (
            f"batch={job.batch} is no multiple of dp x microbatch = {mapping.data(gpus)} x {mapping.microbatch}. "
            f"Nearest: {max(share, job.batch // share * share)} or {(job.batch // share + 1) * share}."
        )
    elif mapping.order == "interleaved-1f1b" and (m := job.batch // share) % max(1, m // mapping.pp):
        yield f"interleaved-1f1b with {m} microbatches on pp={mapping.pp}: they make no equal rounds. A multiple of {mapping.pp} does."
    elif mapping.order == "zero-bubble" and (m := job.batch // share) % max(1, m // mapping.pp):
        yield f"zero-bubble with {m} microbatches on pp={mapping.pp}: they make no equal rounds. A multiple of {mapping.pp} does."
    elif mapping.order == "dualpipev" and (m := job.batch // share) < 2 * mapping.pp:
        yield f"dualpipev with {m} microbatches on pp={mapping.pp}: at least one per stage, {2 * mapping.pp}."
    if mapping.data_parallel == "zero3" and mapping.pp > 1 and mapping.virtual > 1:
        yield "zero3 with virtual stages gathers every stage anew for every microbatch; take zero1, or no virtual stages."


def _of_experts(job: Job, mapping: Mapping) -> Iterator[str]:
    model, etp = job.model, mapping.expert_tp
    if not model.experts:
        if mapping.ep > 1:
            yield f"ep={mapping.ep} for a model without experts. Valid ep: 1."
        return
    if model.experts % mapping.ep:
        yield f"ep={mapping.ep} does not divide {model.experts} experts. Valid ep: {_divisors(model.experts)}."
    if model.expert_ffn % etp:
        yield f"etp={etp} does not divide the width {model.expert_ffn} of an expert."
    if job.cluster.gpus % (mapping.pp * mapping.ep * etp):
        yield f"pp x ep x etp = {mapping.pp * mapping.ep * etp} does not divide {job.cluster.gpus} GPUs."
