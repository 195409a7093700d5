"""The best mapping of a model onto a cluster, found by the planner's cost model, as what `parallelize`, `make_mesh` and a shell take."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshpar._torch import pytree
from meshpar.api import Example
from meshpar.config import ParallelConfig
from meshpar.dry_run import OURS, dry_run
from meshpar.dry_run.decoder import Decoder
from meshpar.dry_run.result import DryRun
from meshpar.dry_run.sizes import sizes_of
from meshpar.errors import ConfigError, MeshparError
from meshpar.planner import Cluster, Constants, Hardware, Job, Search, Space, Stack, Transformer, explain, launch, toml
from meshpar.planner import search as search_mappings
from meshpar.planner.hardware import GiB
from meshpar.planner.search import Candidate
from meshpar.waiting import each, working

RUNS = Space(
    cp=(1, 2, 4, 8, 16, 32),
    fold_experts=False,
    data_parallel=("replicate", "zero1", "zero2", "zero3"),
    recompute=("none", "selective", "full"),
)
"""What this runtime can do: experts that are split over tp like everything else."""
PROGRAMS = ("bf16", "fp16", "fp32")
"""Precisions of its programs."""


@dataclass(frozen=True)
class Checked:
    """A mapping, and what its own program says: see `dry_run`."""

    estimate: Candidate
    program: DryRun | None
    """None where it cannot be made."""
    why: str = ""
    """Then why not."""

    @property
    def fits(self) -> bool:
        """Whether the program is there, and fits."""
        return self.program is not None and self.program.fits

    @property
    def memory(self) -> float:
        """Bytes of the fullest rank."""
        return max(rank.peak for rank in self.program.ranks) if self.program is not None else float("inf")

    def __str__(self) -> str:
        if self.program is None:
            return f"{self.estimate.mapping}: {self.why}"
        taken, held = self.program.time.seconds, self.memory / GiB
        said = f"{taken:8.2f} s ({self.estimate.seconds:.2f})  {held:6.0f} GiB ({self.estimate.memory.total / GiB:.0f})"
        return f"{said}  {'fits' if self.fits else 'DOES NOT FIT'}  {self.estimate.mapping}"


@dataclass(frozen=True)
class Mappings:
    """Mappings that fit, fastest first, with the reasons why others lost."""

    found: Search
    constants: Constants
    checked: tuple[Checked, ...] = ()
    """Those whose programs were read, those that fit first, the fastest of them first."""

    @property
    def ranked(self) -> Sequence[Candidate]:
        """The fastest, each with its time, memory, bubble and exposed communication."""
        return self.found.ranked

    @property
    def best(self) -> Candidate:
        """The fastest that fits: as the programs are, of those that were read."""
        return self.checked[0].estimate if self.checked else self.found.best

    def toml(self, index: int | None = None) -> str:
        """A file for `make_mesh`, `ParallelConfig.from_toml` and the command line; it says which batch it is for, too. None: the best."""
        return toml(self.found.job, (self.best if index is None else self.ranked[index]).mapping)

    def launch(self, script: str = "train.py", *, slurm: bool = False) -> str:
        """The line that starts the job."""
        return launch(self.found.job, script, slurm=slurm)

    def __str__(self) -> str:
        read = ["", "As their programs are, read by dry runs (and by the estimates above):", *(f"  {one}" for one in self.checked)]
        return "\n".join([explain(self.found, self.constants), *(read if self.checked else ())])

    __repr__ = __str__


@working("searching mappings")
def search(
    model: nn.Module | Transformer,
    cluster: Cluster | tuple[str | Path | Hardware, int],
    *,
    global_batch: int,
    seq: int | None = None,
    precision: str = "bf16",
    stack: str | Stack = "meshpar",
    space: Space | None = None,
    example: Example | None = None,
    constants: Constants | None = None,
    top: int = 10,
    check: int = 0,
) -> Mappings:
    """Mappings of `model` onto `cluster` (a `planner.Cluster`, or an accelerator and a number of them) that fit, fastest first.

    `model`: a decoder, whose dimensions are read off its captured graph (it may be on `meta`; `example` is a batch for it), or a
    `planner.Transformer`. `global_batch`: samples of a step over all ranks. `seq`: tokens of a sample; by default those of `example`.
    `space`: by default what this runtime can do with `stack="meshpar"`, and everything the planner knows for other software.
    `check`: the programs of the first so many are made and read (`dry_run`: up to a minute each); the best is the fastest of them that
    fits as its program is, and more of the `top` are read until one does.

    Raises ConfigError with everything that is unknown, missing or impossible, and where nothing fits.

    >>> found = search(Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256), ("h100", 64),
    ...                global_batch=128, seq=8192)
    >>> found.best.memory.total < 80e9
    True
    """
    where = _cluster(cluster)  # (what it cannot be is told before a model is captured)
    if isinstance(model, Transformer):
        sizes, own = model, None
    else:
        sizes, own = sizes_of(model, example)
    if (length := seq or own) is None:
        raise ConfigError("search: seq is missing; give the tokens of a sample, a whole number of at least 1.")
    job = Job(sizes, where, length, global_batch, precision, stack)
    if check and job.software.name != OURS:
        raise ConfigError(
            f"search: check={check} reads programs of this package, and stack={job.software.name!r} runs others: leave one out."
        )
    if check and precision not in PROGRAMS:
        raise ConfigError(f"search: check={check} reads programs in {', '.join(PROGRAMS)}, and precision={precision!r} is none of them.")
    if check < 0:
        raise ConfigError(f"search: check={check} is not a number of mappings.")
    if check and own is not None and length != own:
        raise ConfigError(
            f"search: check={check} reads programs for the example's {own} tokens, and seq={length}: give an example of that."
        )
    known = constants or Constants.default()
    found = Mappings(search_mappings(job, space or _space(job), known, top=top, watched=each), known)
    return replace(found, checked=_checked(found, model, example, check)) if check else found


def _checked(found: Mappings, model: nn.Module | Transformer, example: Example | None, check: int) -> tuple[Checked, ...]:
    """The first mappings as their programs are, the best first: as many as asked for, and more until one fits."""
    done: list[Checked] = []
    for at, candidate in enumerate(each(found.ranked)):
        if at >= check and any(one.fits for one in done):
            break
        done.append(_read(found, at, candidate, model, example))
    if not any(one.fits for one in done):
        least = min(done, key=lambda one: one.memory)
        raise ConfigError(
            f"search: by their programs none of the first {len(done)} mappings fits; least is lacking to\n  {least}\n"
            "Ask for more mappings (top=), for more accelerators, or for such with more memory."
        )
    return tuple(sorted(done, key=lambda one: (not one.fits, one.program.time.seconds if one.program is not None else float("inf"))))


def _read(found: Mappings, index: int, candidate: Candidate, model: nn.Module | Transformer, example: Example | None) -> Checked:
    job, said = found.found.job, tomllib.loads(found.toml(index))
    config = ParallelConfig(**said["config"])
    samples = config.microbatches * candidate.mapping.microbatch
    if isinstance(model, Transformer):
        with torch.device("meta"):
            model = Decoder(model)
        ids = torch.zeros(samples, job.seq, dtype=torch.long)
        batch: Any = {"input_ids": ids, "labels": ids}
    else:
        batch = _of_samples(example, samples)
    try:
        return Checked(
            candidate, dry_run(model, said["mesh"], config, hardware=job.cluster.hardware, example=batch, constants=found.constants)
        )
    except MeshparError as error:
        return Checked(candidate, None, str(error).partition("\n")[0])


def _of_samples(example: Any, samples: int) -> Any:
    """A batch of so many samples, of the shapes of `example`."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    count = tensors[0].shape[0] if tensors else 0
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.new_zeros(samples, *t.shape[1:]) if t.dim() and t.shape[0] == count else t, example
    )


def _cluster(given: object) -> Cluster:
    if isinstance(given, Cluster):
        return given
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(f'search: cluster={given!r}; a planner.Cluster, or an accelerator and how many, such as ("h100", 512).')
    return Cluster(*given)


def _space(job: Job) -> Space:
    if job.software.name != OURS:
        return Space(cp=(1, 2, 4, 8, 16, 32))
    return replace(RUNS, pp=tuple(p for p in range(1, job.model.layers + 1) if job.cluster.gpus % p == 0))
