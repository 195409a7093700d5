"""What one rank of every stage does in a step, as plain data: operators with FLOPs and bytes, collectives with bytes and axis.

`layers.py` makes one from a transformer's dimensions; a reader of a plan's own graph can make the same datum. `cost.py` and `memory.py`
read nothing else of a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal, TypeVar

from meshpar.errors import ConfigError, raise_all

T = TypeVar("T")
Phase = Literal["forward", "recompute", "input", "weight", "step"]
"""Forward; forward once more before backward; gradient of the input; gradient of the weights; once per step."""
PHASES: tuple[Phase, ...] = ("forward", "recompute", "input", "weight", "step")
KINDS = ("matrix", "grouped", "attention", "elementwise", "host")
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring")
AXES = ("tp", "cp", "ep", "etp", "dp", "edp")


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel, or several alike, of one microbatch on one rank."""

    name: str
    kind: str
    """"matrix", "grouped" (products of experts), "attention" (a fused kernel), "elementwise" (memory traffic), "host" (launches only)."""
    phase: Phase
    flops: float = 0.0
    bytes: float = 0.0
    """Read and written in the accelerator's memory."""
    dtype: str = "bf16"
    calls: float = 1


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective of one microbatch on one rank, or of the step."""

    name: str
    kind: str
    """"all_gather", "reduce_scatter", "all_reduce": `bytes` is the whole tensor; "all_to_all": what a rank gives away, with its own part;
    "ring": what passes a rank in all hops, its own part included."""
    axis: str
    phase: Phase
    bytes: float
    count: float = 1
    behind: str = ""
    """What it may hide behind, where the stack does: "matrix" (the products that need it), "attention", "compute" (all of the phase)."""
    copies: int = 1
    """An all-to-all whose rows are copies of fewer ones: how many of each; a domain that needs several is sent one."""
    beside: tuple[tuple[float, float], ...] = ()
    """Where a program says what it computes beside it: shares of its time, and for each the FLOPs that run meanwhile, of one call."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A block, the embedding, or the head with its loss, as one rank sees it. Compared by identity: builders share equal ones."""

    name: str
    operators: tuple[Operator, ...]
    collectives: tuple[Collective, ...] = ()
    parameters: float = 0.0
    """Parameters this rank holds before anything is shared out over data ranks, without experts'."""
    expert_parameters: float = 0.0
    kept: float = 0.0
    """Bytes kept per microbatch between forward and backward."""
    peak: float = 0.0
    """Bytes needed beside that while the layer runs, once."""

    def flops(self, *phases: Phase) -> float:
        """FLOPs in some phases, or in all."""
        return sum(o.flops for o in self.operators if not phases or o.phase in phases)


@dataclass(frozen=True)
class AxisSpan:
    """A mesh axis of the planner: how many ranks, and how far apart neighbours are in the order of ranks."""

    name: str
    size: int
    stride: int


@dataclass(frozen=True, eq=False)
class StageLoad:
    """A stage's layers with how often each comes, and the collectives of its step."""

    layers: tuple[tuple[Layer, int], ...]
    collectives: tuple[Collective, ...] = ()
    tensors: int = 0
    """Parameters as an optimizer counts them: tensors; 0 where nobody counted."""

    @cached_property
    def parameters(self) -> float:
        return sum(layer.parameters * times for layer, times in self.layers)

    @cached_property
    def expert_parameters(self) -> float:
        return sum(layer.expert_parameters * times for layer, times in self.layers)

    @cached_property
    def kept(self) -> float:
        """Bytes kept per microbatch."""
        return sum(layer.kept * times for layer, times in self.layers)


@dataclass(frozen=True)
class Workload:
    """A step of training as every rank of every stage performs it."""

    stages: tuple[StageLoad, ...]
    """In the order of the model."""
    ranks: int
    """Pipeline ranks."""
    schedule: str
    microbatches: int
    axes: Mapping[str, AxisSpan]
    send: float
    """Bytes that pass between stages per microbatch and direction."""
    data_parallel: str
    gpus: int
    tokens: float
    """Tokens of a step over all ranks."""
    info: Mapping[str, float] = field(default_factory=dict)
    """Model FLOPs per token by convention, where known."""
    place: tuple[int, ...] = ()
    """Stage -> pipeline rank; empty: stage i runs on rank i modulo `ranks`."""

    def __post_init__(self) -> None:
        raise_all(ConfigError, "Workload:", list(_complaints(self)))

    @property
    def virtual(self) -> int:
        """Stages per pipeline rank."""
        return len(self.stages) // self.ranks

    def of_rank(self, rank: int) -> tuple[StageLoad, ...]:
        """The stages of a pipeline rank."""
        return self.pick(self.stages, rank)

    def pick(self, of_stages: Sequence[T], rank: int) -> tuple[T, ...]:
        """Of one thing per stage, those of a pipeline rank."""
        if not self.place:
            return tuple(of_stages[rank :: self.ranks])
        return tuple(one for one, at in zip(of_stages, self.place, strict=True) if at == rank)

    def ledger(self) -> Iterator[tuple[int, Collective, float]]:
        """Every collective of a step: `(stage, collective, how often on one rank)`."""
        for index, one in enumerate(self.stages):
            for layer, times in one.layers:
                yield from ((index, c, c.count * times * self.microbatches) for c in layer.collectives)
            yield from ((index, c, c.count) for c in one.collectives)


def group(layers: Sequence[Layer]) -> tuple[tuple[Layer, int], ...]:
    """Layers in a row with how often each comes; one that comes again after others is listed again."""
    return tuple((layer, len(list(same))) for layer, same in groupby(layers))


def _complaints(work: Workload) -> Iterator[str]:
    if work.ranks < 1 or not work.stages or len(work.stages) % work.ranks:
        yield f"{len(work.stages)} stages do not go evenly on {work.ranks} pipeline ranks."
    if work.microbatches < 1:
        yield f"microbatches={work.microbatches}; a step has at least 1."
    seen: set[int] = set()
    for layer in (layer for one in work.stages for layer, _ in one.layers):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield from _of_layer(layer, work.axes)
    yield from (f"{c.name}: no axis {c.axis!r} in the workload." for one in work.stages for c in one.collectives if c.axis not in work.axes)


def _of_layer(layer: Layer, axes: Mapping[str, AxisSpan]) -> Iterator[str]:
    for operator in layer.operators:
        if operator.kind not in KINDS or operator.phase not in PHASES:
            yield (
                f"{layer.name}.{operator.name} is {operator.kind!r} in {operator.phase!r}. "
                f"Kinds: {', '.join(KINDS)}; phases: {', '.join(PHASES)}."
            )
    for c in layer.collectives:
        if c.kind not in COLLECTIVES or c.axis not in axes:
            yield f"{layer.name}.{c.name} is {c.kind!r} over {c.axis!r}. Kinds: {', '.join(COLLECTIVES)}; axes: {', '.join(axes)}."
