"""Steps of small programs on this machine, as `parallelize` runs them: what is measured, and what the planner says of the same.

What kernels and collectives do not explain is the runtime's own share: its constants (`planner.measured.RUNTIME`) are those that make up
for the difference, none negative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch import Tensor, nn

from meshpar.api import parallelize
from meshpar.config import ParallelConfig
from meshpar.dry_run import DryRun, dry_run
from meshpar.dry_run.decoder import Decoder
from meshpar.mesh import data_rank, make_mesh, parse_mesh
from meshpar.planner import Hardware, Transformer
from meshpar.planner.measured import Measured


@dataclass(frozen=True)
class SmallProgram:
    """A decoder on a mesh."""

    sizes: Transformer
    mesh: str
    samples: int
    """Of a data rank's batch."""
    tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return prod(parse_mesh(self.mesh).values())

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(**{"precision": "fp32", **self.options})

    def batch(self, rank: int = 0) -> dict[str, Tensor]:
        """The batch of a data rank."""
        made = torch.Generator().manual_seed(rank)
        ids = torch.randint(0, self.sizes.vocab, (self.samples, self.tokens), generator=made)
        return {"input_ids": ids, "labels": ids}

    def predicted(self, hardware: Hardware) -> DryRun:
        """What the planner says."""
        with torch.device("meta"):
            model = Decoder(self.sizes)
        return dry_run(model, self.mesh, self.config, hardware=hardware, example=self.batch())

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.mesh, f"hidden={self.sizes.hidden} layers={self.sizes.layers} {self.samples} x {self.tokens}", *said])


def measure(programs: Sequence[SmallProgram], rounds: int, unmeasured: int = 2) -> list[list[float]]:
    """Seconds of a step of every program on this process group, round by round, one step of each in turn: of the slowest rank.

    A rank that is alone waits for nobody: of it the time of the processor counts.
    """
    clock = time.process_time if dist.get_world_size() == 1 else time.perf_counter
    steps = [_step(program) for program in programs]
    found: list[list[float]] = [[] for _ in programs]
    for turn in range(rounds + unmeasured):
        for step, taken in zip(steps, found, strict=True):
            dist.barrier()
            begun = clock()
            step()
            took = torch.tensor([clock() - begun], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn >= unmeasured:
                taken.append(float(took))
    return found


def _step(program: SmallProgram) -> Callable[[], None]:
    """One step: forward, backward, optimizer."""
    torch.manual_seed(0)
    model = Decoder(program.sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    mesh = make_mesh(program.mesh, "cpu")
    batch = program.batch(data_rank(mesh)[0])
    pm = parallelize(model, mesh, example=batch, config=program.config)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-4)

    def step() -> None:
        pm.train_step(**batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


FITTED = ("call", "data", "action", "microbatch", "tensor", "step")
"""The constants that steps are to tell. What the optimizer alone takes for a tensor was timed: steps tell what comes on top."""
SMALL = 1e-7


def fitted(machine: Hardware, runs: Sequence[DryRun], measured: Sequence[float]) -> Measured:
    """The machine with the constants of its runtime, from steps of programs; errors count relative to what was measured."""
    assert machine.measured is not None
    bare = machine.measured
    before = np.array([run.time_on(replace(machine, measured=bare)).seconds for run in runs])
    columns = []
    for name in FITTED:
        other = replace(bare, runtime={**bare.runtime, name: bare.runtime[name] + SMALL})
        columns.append([(run.time_on(replace(machine, measured=other)).seconds - b) / SMALL for run, b in zip(runs, before)])
    took = np.array(measured)
    values, _ = nnls(np.array(columns).T / took[:, None], (took - before) / took)
    done = replace(bare, runtime={**bare.runtime, **{name: bare.runtime[name] + float(more) for name, more in zip(FITTED, values)}})
    ratios = took / [run.time_on(replace(machine, measured=done)).seconds for run in runs]
    low, high = np.quantile(ratios, (0.1, 0.9))
    return replace(done, spread=(min(float(low), 0.95), max(float(high), 1.05)))
