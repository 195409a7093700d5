"""How a model is to be trained in parallel, beyond the mesh: one frozen `ParallelConfig`, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch

from meshpar.errors import ConfigError, near, raise_all
from meshpar.planner.hardware import Hardware, hardware
from meshpar.settings import read_fields

MiB = 2**20

Context = Literal["auto", "gather", "heads", "ring"]
ScheduleName = Literal["gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
DataParallel = Literal["replicate", "zero1", "zero2", "zero3"]

SCHEDULES: Mapping[str, tuple[int, int | None]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "looped-bfs": (2, None),
    "interleaved-1f1b": (2, None),
    "zero-bubble": (1, None),
    "zbv": (2, 2),
    "dualpipev": (2, 2),
}
"""Pipeline schedule -> the fewest and the most stages it puts on one rank (None: no limit)."""
CONTEXT = ("auto", "gather", "heads", "ring")
RECOMPUTE = ("none", "selective", "full")
DATA_PARALLEL = ("replicate", "zero1", "zero2", "zero3")

_COMPILE = {"backend", "dynamic", "fullgraph", "mode", "options"}
"""The arguments of torch.compile that a field of ParallelConfig may hold."""

_DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "float": torch.float32,
    "half": torch.float16,
}


class _Fields:
    """Of a configuration: a name that is none of its fields is told with the near misses."""

    __slots__ = ()

    def __new__(cls, *args: Any, **named: Any) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        wrong = [f"there is no field {name!r}.{near(name, known)}" for name in named if name not in known]
        advice = [f"The fields are {', '.join(n for n in known if n != 'translation')}."] if wrong else []
        raise_all(ConfigError, f"{cls.__name__}:", [*wrong, *advice])
        return object.__new__(cls)


@dataclass(frozen=True, slots=True)
class Precision(_Fields):
    """The dtypes of training. None keeps what the model has.

    `param_dtype`: of the parameters that the optimizer steps (the master copy); `compute_dtype`: of parameters and floating inputs inside
    forward and backward; `reduce_dtype`: in which gradients are summed over the data ranks. Strings such as "bf16" are accepted.

    >>> Precision(compute_dtype="bf16").compute_dtype
    torch.bfloat16
    """

    param_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        complaints = []
        for name in ("param_dtype", "compute_dtype", "reduce_dtype"):
            try:
                object.__setattr__(self, name, _dtype(getattr(self, name)))
            except ConfigError as error:
                complaints.append(f"{name}: {error}")
        raise_all(ConfigError, "Precision:", complaints)

    @classmethod
    def named(cls, name: str) -> Precision:
        """ "bf16" and "fp16": compute in it, keep parameters and sum gradients in fp32; "fp32", "fp64": everything in it.

        Gradients in fp16 underflow without a loss scale: `mp.GradScaler` keeps one that all ranks agree on.
        """
        dtype = _dtype(name)
        if dtype in (torch.bfloat16, torch.float16):
            return cls(torch.float32, dtype, torch.float32)
        return cls(dtype, dtype, dtype)


@dataclass(frozen=True, slots=True)
class Translation:
    """What one name of another tool's configuration became here: `becomes` is empty when it has no meaning, and `why` says why."""

    name: str
    value: Any
    becomes: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} -> {self.becomes or 'nothing'}" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True)
class ParallelConfig(_Fields):
    """How to train in parallel. Every complaint about the values is raised at once, as one `ConfigError`.

    >>> ParallelConfig(microbatches=8, schedule="interleaved-1f1b").virtual_stages
    2
    """

    microbatches: int = 1
    """Into how many parts dim 0 of a local batch is cut."""
    schedule: ScheduleName = "1f1b"
    """Pipeline schedule; of no effect without a `pp` axis."""
    virtual_stages: int | None = None
    """Pipeline stages per rank; None takes the fewest that the schedule allows."""
    stages: Sequence[int] | Sequence[str] | None = None
    """Layers per stage, or the modules at which stages 1, 2, ... begin; None balances cost."""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """Whether residual streams are split along their sequence over `tp`: all that can be, none, or ("auto") each where that costs less."""
    context: Context = "auto"
    """Attention where `cp` cuts the sequence: "gather" keys and values, "heads" by an all-to-all, or a "ring" (in a sliding window only the
    few keys before a rank's own are fetched, its halo). "auto" decides for each layer by price. A layer that cannot have the form that is
    asked for takes another one: `explain()` says which each has."""
    context_chunks: int | Literal["auto"] = "auto"
    """How many pieces of a sequence each rank of `cp` has, dealt out back and forth: 1, or an even number. "auto": two where attention is
    causal (head-tail), and as many as balance the documents of the example batch where tiles of a ring are passed over for a mask."""
    recompute: Recompute = "none"
    """What is computed again in backward, per block: nothing, all but the results of products, attention and collectives, or everything.
    "none" computes cheap operators again all the same, and gathers again, where backward then keeps some megabytes less
    (`passes/again.py`, `passes/pieces.py`): with `tp` and a cut sequence less than "selective" keeps."""
    compile: bool | Mapping[str, Any] = False
    """Whether the code of blocks is compiled by torch.compile, once for all blocks of one structure, and again for every other shape of
    batch; a dict holds its arguments, as in {"mode": "max-autotune-no-cudagraphs"}. What is not in a block runs as it is; so do blocks that
    exchange tokens over `ep`, whose sizes depend on values, and everything on simulated ranks and in a dry run."""
    data_parallel: DataParallel = "zero3"
    """What is split over the data ranks: nothing, optimizer state, also gradients, also parameters."""
    bucket_bytes: int = 25 * MiB
    """Parameter bytes whose gradients are summed together with `data_parallel="replicate"` and "zero1"; at least those of a block."""
    precision: Precision = field(default_factory=Precision)
    """The dtypes; a string such as "bf16" is short for `Precision.named`."""
    overlap_grad_reduce: bool = True
    """Whether `train_step` sums gradients over the data ranks while backward still runs; else after the backward of a microbatch ("zero2",
    "zero3") or of the last one. `loss.backward()` of one's own always does."""
    overlap_param_gather: bool = True
    """In forward, gather the next block's parameters while the current one computes. In backward FSDP2 always does."""
    overlap_tensor_parallel: bool = True
    """Whether collectives inside a graph (of `tp`, `ep`, `cp`) run beside computation: gradient sums beside the weight gradients of the
    products of their block (`passes/products.py`: the same bits), products beside their own collectives in pieces (`passes/pieces.py`) and
    experts beside the exchange of their rows or tokens (`passes/experts_in_pieces.py`, `tokens_in_pieces.py`; all of these the same to
    rounding), where that takes less by the constants of `hardware`; on CPUs that are not known, where messages are not small."""
    overlap_p2p: bool = True
    """Whether a stage of a pipeline computes while what it is sent arrives; else it waits for each message when it begins to receive it."""
    outputs: Literal["whole", "cut"] = "whole"
    """What `pm(**batch)` returns: whole tensors of this data rank's samples, or ("cut") DTensors where values are cut, not gathered."""
    logits_bytes: int | None = None
    """The most bytes of logits that a rank holds at once in a step: a loss over a product is computed some rows at a time, and again in
    backward (`passes/chunked_loss.py`: the same to rounding, for a quarter of the head's operations more). None: all at once."""
    pad_to: int | Sequence[int] | None = None
    """To what lengths positions are padded (dim 1 of the first tensor, and the dims of others that are as long): multiples of a number, or
    the first of several lengths that is not shorter. Data ranks then may have different numbers of positions and of samples: they are
    padded alike, at the cost of one small exchange a step; 1 pads to the longest of them. What is padded counts nothing, which is proved
    for the model, or refused (`capture/padding`). None pads samples alone, where microbatches do not divide them."""
    hardware: Hardware | None = None
    """The machine: an accelerator by name ("h100"), a file of `mp.calibrate`, or a `Hardware`. What is decided by price, such as
    `sequence_parallel="auto"` and which products run in pieces, is decided by its constants; None takes those of an accelerator of
    today, at sizes of today."""
    seed: int = 0
    """Seeds the random numbers of steps, dropout above all. Initial values are those of the model, however it was seeded."""
    translation: tuple[Translation, ...] = field(default=(), compare=False, repr=False)
    """From `from_megatron`: what every given name became."""

    def __post_init__(self) -> None:
        if isinstance(self.precision, str) and self.precision in _DTYPES:
            object.__setattr__(self, "precision", Precision.named(self.precision))
        if isinstance(self.stages, Sequence) and not isinstance(self.stages, str):
            object.__setattr__(self, "stages", tuple(self.stages))
        if isinstance(self.pad_to, Sequence) and not isinstance(self.pad_to, str):
            object.__setattr__(self, "pad_to", tuple(sorted(self.pad_to)))
        if isinstance(self.hardware, str | Path):
            object.__setattr__(self, "hardware", hardware(self.hardware))
        if self.virtual_stages is None and self.schedule in SCHEDULES:
            object.__setattr__(self, "virtual_stages", SCHEDULES[self.schedule][0])
        raise_all(ConfigError, "ParallelConfig:", self._complaints())

    @property
    def stages_per_rank(self) -> int:
        """`virtual_stages` as a number."""
        assert self.virtual_stages is not None
        return self.virtual_stages

    @classmethod
    def from_megatron(cls, config: object, ddp_config: object = None) -> ParallelConfig:
        """The same from Megatron's names, given as dicts or objects; `.translation` says what each of them became, or why nothing.

        Mesh sizes are not part of a `ParallelConfig`: `megatron_mesh` makes the text for `make_mesh` of them. Raises `ConfigError` for
        names it does not know.

        >>> ParallelConfig.from_megatron({"sequence_parallel": True, "bf16": True}, {"use_distributed_optimizer": True}).data_parallel
        'zero1'
        """
        from meshpar.megatron import translate

        named, translation = translate(config, ddp_config)
        return cls(**named, translation=translation)

    @classmethod
    def from_toml(cls, path: str | Path) -> ParallelConfig:
        """The `[config]` table of a file that `meshpar plan` wrote. Raises `ConfigError` for names that are no fields."""
        names = (f.name for f in fields(cls) if f.name != "translation")
        return cls(**read_fields(path, names))

    def _complaints(self) -> list[str]:
        complaints = [
            f"{name}={value!r}: a whole number of at least {least}."
            for name, value, least in (
                ("microbatches", self.microbatches, 1),
                ("virtual_stages", self.virtual_stages, 1),
                ("bucket_bytes", self.bucket_bytes, 1),
                ("logits_bytes", self.logits_bytes, 1),
                ("context_chunks", None if self.context_chunks == "auto" else self.context_chunks, 1),
                ("seed", self.seed, 0),
            )
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least)
        ]
        if isinstance(self.context_chunks, int) and self.context_chunks > 1 and self.context_chunks % 2:
            even = f"{self.context_chunks - 1} or {self.context_chunks + 1}"
            complaints.append(f"context_chunks={self.context_chunks}: pieces are dealt out back and forth, an even number of them: {even}.")
        complaints += [
            f"{name}={value!r}: one of {', '.join(allowed)}.{near(str(value), allowed)}"
            for name, value, allowed in (
                ("schedule", self.schedule, tuple(SCHEDULES)),
                ("context", self.context, CONTEXT),
                ("recompute", self.recompute, RECOMPUTE),
                ("data_parallel", self.data_parallel, DATA_PARALLEL),
                ("outputs", self.outputs, ("whole", "cut")),
            )
            if value not in allowed
        ]
        complaints += [
            f"{name}={value!r}: True or False."
            for name in ("overlap_grad_reduce", "overlap_param_gather", "overlap_tensor_parallel", "overlap_p2p")
            if not isinstance(value := getattr(self, name), bool)
        ]
        if not isinstance(self.compile, (bool, Mapping)) or (isinstance(self.compile, Mapping) and not set(self.compile) <= _COMPILE):
            names = ", ".join(sorted(_COMPILE))
            complaints.append(f"compile={self.compile!r}: True, False, or a dict of arguments of torch.compile: {names}.")
        if not isinstance(self.sequence_parallel, bool) and self.sequence_parallel != "auto":
            complaints.append(f'sequence_parallel={self.sequence_parallel!r}: True, False or "auto".')
        if self.hardware is not None and not isinstance(self.hardware, Hardware):
            complaints.append(f"hardware={self.hardware!r}: the name of an accelerator, a file of `mp.calibrate`, or a Hardware.")
        if not isinstance(self.precision, Precision):
            complaints.append(
                f"precision={self.precision!r}: a Precision, or one of {', '.join(_DTYPES)}.{near(str(self.precision), _DTYPES)}"
            )
        lengths = self.pad_to if isinstance(self.pad_to, tuple) else () if self.pad_to is None else (self.pad_to,)
        if self.pad_to == () or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths):
            complaints.append(f"pad_to={self.pad_to!r}: a number whose multiples lengths are padded to, or a list of lengths.")
        return complaints + self._cut_complaints() + self._stage_complaints()

    def _cut_complaints(self) -> list[str]:
        if self.stages is None:
            return []
        given = self.stages if isinstance(self.stages, tuple) else ()
        if given and all(isinstance(part, int) and not isinstance(part, bool) and part >= 0 for part in given):
            return []
        if given and all(isinstance(part, str) and part for part in given):
            return [] if len(set(given)) == len(given) else [f"stages={self.stages!r}: two stages begin at one module."]
        return [
            f"stages={self.stages!r}: layers per stage, as in [8, 8, 8, 6], or the modules at which stages 1, 2, ... begin, as in "
            '["model.layers.8", "model.layers.16"].'
        ]

    def _stage_complaints(self) -> list[str]:
        least, most = SCHEDULES.get(self.schedule, (1, None))
        stages = self.virtual_stages
        if not isinstance(stages, int) or (least <= stages and (most is None or stages <= most)):
            return []
        wanted = f"exactly {least}" if most == least else f"at least {least}"
        return [f"virtual_stages={stages}: schedule {self.schedule!r} puts {wanted} on a rank. Leave it out, or choose another schedule."]


def _dtype(value: object) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    if isinstance(value, str) and value.removeprefix("torch.") in _DTYPES:
        return _DTYPES[value.removeprefix("torch.")]
    raise ConfigError(f"{value!r} is no floating dtype; write one of {', '.join(_DTYPES)}, or a torch.dtype.{near(str(value), _DTYPES)}")
