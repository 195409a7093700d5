"""The best mapping of a model onto a cluster, found by the planner's cost model, as what `parallelize`, `make_mesh` and a shell take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from meshpar.api import Example
from meshpar.dry_run.sizes import sizes_of
from meshpar.errors import ConfigError
from meshpar.planner import Cluster, Constants, Hardware, Job, Search, Space, Stack, Transformer, explain, launch, toml
from meshpar.planner import search as search_mappings
from meshpar.planner.search import Candidate
from meshpar.waiting import each, working

RUNS = Space(
    cp=(1, 2, 4, 8, 16, 32),
    fold_experts=False,
    data_parallel=("replicate", "zero1", "zero2", "zero3"),
    recompute=("none", "selective", "full"),
)
"""What this runtime can do: experts that are split over tp like everything else."""


@dataclass(frozen=True)
class Mappings:
    """Mappings that fit, fastest first, with the reasons why others lost."""

    found: Search
    constants: Constants

    @property
    def ranked(self) -> Sequence[Candidate]:
        """The fastest, each with its time, memory, bubble and exposed communication."""
        return self.found.ranked

    @property
    def best(self) -> Candidate:
        """The fastest that fits."""
        return self.found.best

    def toml(self, index: int = 0) -> str:
        """A file for `make_mesh`, `ParallelConfig.from_toml` and the command line; it says which batch it is for, too."""
        return toml(self.found.job, self.ranked[index].mapping)

    def launch(self, script: str = "train.py", *, slurm: bool = False) -> str:
        """The line that starts the job."""
        return launch(self.found.job, script, slurm=slurm)

    def __str__(self) -> str:
        return explain(self.found, self.constants)

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
) -> Mappings:
    """Mappings of `model` onto `cluster` (a `planner.Cluster`, or an accelerator and a number of them) that fit, fastest first.

    `model`: a decoder, whose dimensions are read off its captured graph (it may be on `meta`; `example` is a batch for it), or a
    `planner.Transformer`. `global_batch`: samples of a step over all ranks. `seq`: tokens of a sample; by default those of `example`.
    `space`: by default what this runtime can do with `stack="meshpar"`, and everything the planner knows for other software.

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
    known = constants or Constants.default()
    return Mappings(search_mappings(job, space or _space(job), known, top=top, watched=each), known)


def _cluster(given: object) -> Cluster:
    if isinstance(given, Cluster):
        return given
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(f'search: cluster={given!r}; a planner.Cluster, or an accelerator and how many, such as ("h100", 512).')
    return Cluster(*given)


def _space(job: Job) -> Space:
    if job.software.name != "meshpar":
        return Space(cp=(1, 2, 4, 8, 16, 32))
    return replace(RUNS, pp=tuple(p for p in range(1, job.model.layers + 1) if job.cluster.gpus % p == 0))
