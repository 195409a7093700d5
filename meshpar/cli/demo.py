"""`meshpar demo`: an unmodified transformers model on real text, trained on local ranks, and on one process beside it.

Both trainings start from the same weights and see the same batches, without dropout; what is printed at the end is how far their losses and
gradient norms ever were apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from meshpar.api import parallelize
from meshpar.cli.causal_lm import Corpus, SmallSizes, quiet, small_model
from meshpar.config import ParallelConfig
from meshpar.errors import ConfigError
from meshpar.mesh import format_mesh, local_batch, make_mesh, parse_mesh
from meshpar.proof import launch
from meshpar.proof.comparable import without_noise
from meshpar.roles import ROLES
from meshpar.runtime.parameters.gradients import clip_grad_norm_

TOLERANCE = 1e-3
"""The largest relative difference of loss or gradient norm that passes.

Both runs compute in float32, and add up in different orders: the first losses differ by about 1e-7, and training makes that grow from step
to step. Measured with two ranks, after 60 steps: 1e-6 for the loss, 1e-4 for the gradient norm. A mistake (a gradient not summed, a bias
added twice) shows as 1e-2 or more within a few steps. `meshpar verify` compares the same in float64, to 1e-9.
"""

EPS = 1e-5
"""AdamW's eps. With torch's 1e-8, parameters whose gradient is mostly rounding take full steps of random direction; the difference of the
gradient norm after 60 steps was then 1e-3."""


@dataclass(frozen=True)
class Demo:
    """What is trained, and how."""

    model: str = "llama"
    mesh: str = "dp=2,tp=2"
    steps: int = 30
    batch: int = 8
    sizes: SmallSizes = field(default_factory=SmallSizes)
    data: str | None = None
    learning_rate: float = 2e-3
    seed: int = 0
    config: ParallelConfig = field(default_factory=ParallelConfig)
    rules: Mapping[str, str] = field(default_factory=dict)
    show_plan: bool = True
    silent: bool = False
    """Print nothing: the comparison is all."""


@dataclass(frozen=True)
class Training:
    """Loss and gradient norm of every step, and the tokens per second of all but the first."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    speed: float


@dataclass(frozen=True)
class Comparison:
    """The two trainings, and the largest relative differences between them."""

    parallel: Training
    alone: Training

    @property
    def loss(self) -> float:
        """The largest relative difference of the loss at any step."""
        return _largest(self.parallel.losses, self.alone.losses)

    @property
    def norm(self) -> float:
        """The largest relative difference of the gradient norm at any step."""
        return _largest(self.parallel.norms, self.alone.norms)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {"ok": self.ok, "loss": self.loss, "norm": self.norm, "tolerance": TOLERANCE, **asdict(self)}

    @property
    def ok(self) -> bool:
        """Whether both are within the tolerance (a number that is none is not)."""
        return self.loss <= TOLERANCE and self.norm <= TOLERANCE


def _largest(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    differences = [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True)]
    return max((d if d == d else float("inf") for d in differences), default=float("inf"))


def run(demo: Demo) -> Comparison | None:
    """Run the demo: on the ranks torchrun started, or on local gloo ranks. Returns the comparison (under torchrun: on rank 0).

    Raises ConfigError before anything starts when the options do not fit, RankError when a rank fails.
    """
    sizes = parse_mesh(demo.mesh)
    _check(demo, sizes)
    if launch.launched():
        try:
            return train(demo)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    world = prod(sizes.values())
    if not demo.silent:
        print(f"starting {world} local rank{'s' if world > 1 else ''} as {format_mesh(sizes)} (gloo, one thread each)", flush=True)
    found: Comparison | None = launch.run(train, demo, world=world)[0]
    return found


def _check(demo: Demo, sizes: Mapping[str, int]) -> None:
    if ":" in demo.model:
        raise ConfigError(f"demo trains models of transformers, by type; for {demo.model} type: meshpar verify --model {demo.model}")
    data = prod(size for name, size in sizes.items() if ROLES[name].own_batches)
    least = data * demo.config.microbatches
    if demo.batch % least:
        fit = max(1, round(demo.batch / least)) * least
        raise ConfigError(
            f"--batch {demo.batch} samples do not divide over {data} data ranks x {demo.config.microbatches} microbatches. "
            f"Write --batch {fit}."
        )
    Corpus(demo.data).batch(0, samples=1, sequence=demo.sizes.sequence)


def train(demo: Demo) -> Comparison | None:
    """One rank's share of the demo. Collective; rank 0 then trains alone and returns the comparison."""
    quiet()
    mesh = make_mesh(demo.mesh)
    model = without_noise(small_model(demo.model, demo.sizes, seed=demo.seed)).train()
    text = Corpus(demo.data)
    first = dist.get_rank() == 0
    console = Console(file=sys.stdout, soft_wrap=True) if first and not demo.silent else Console(quiet=True)

    def batch(step: int) -> dict[str, torch.Tensor]:
        whole = text.batch(step, samples=demo.batch, sequence=demo.sizes.sequence, seed=demo.seed)
        return {name: x.to(mesh.device_type) for name, x in whole.items()}

    pm = parallelize(model, mesh, example=local_batch(batch(0), mesh), config=demo.config, rules=demo.rules)
    console.print(_heading(demo, model, text), highlight=False)
    if demo.show_plan:
        console.print(f"\n{pm.explain()}\n" if first else "", highlight=False, markup=False)
    parallel = _train(demo, pm, lambda step: pm.train_step(**local_batch(batch(step), mesh)), f"{mesh.size()} ranks", console)
    if not first:
        return None
    model.to(mesh.device_type)

    def step_alone(step: int) -> torch.Tensor:
        loss = model(**batch(step)).loss
        loss.backward()
        return loss.detach()

    alone = _train(demo, model, step_alone, "1 process", console)
    comparison = Comparison(parallel, alone)
    console.print(_summary(comparison, mesh.size()), highlight=False)
    return comparison


def _train(demo: Demo, model: nn.Module, step: Callable[[int], torch.Tensor], name: str, console: Console) -> Training:
    """AdamW with clipping, `demo.steps` steps: the same code for both."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.learning_rate, eps=EPS)
    losses, norms, times = [], [], []
    tokens = demo.batch * demo.sizes.sequence
    with _bar(name, demo.steps, console) as advance:
        for index in range(demo.steps):
            start = time.perf_counter()
            loss = step(index)
            norm = clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            norms.append(norm.item())
            times.append(time.perf_counter() - start)
            later = times[1:] or times  # the first step makes buffers and connections
            speed = tokens * len(later) / sum(later)
            advance(f"loss {losses[-1]:.4f}  gradient norm {norms[-1]:.3f}  {speed:,.0f} tokens/s")
    return Training(tuple(losses), tuple(norms), speed)


@contextmanager
def _bar(name: str, steps: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A progress bar; where the output is no terminal, a line now and then."""
    if console.quiet:
        yield lambda text: None
        return
    if not console.is_terminal:
        done = 0

        def line(text: str) -> None:
            nonlocal done
            done += 1
            if done in (1, steps) or done % max(1, steps // 5) == 0:
                console.print(f"{name}: step {done}/{steps}  {text}", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, text="")
        yield lambda text: progress.update(task, advance=1, text=text)


def _heading(demo: Demo, model: nn.Module, text: Corpus) -> str:
    numel = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__}, {numel:,} parameters, random weights; {demo.batch} x {demo.sizes.sequence} bytes a step of {text.source}"
    )


def _summary(found: Comparison, world: int) -> str:
    rows = [
        ("", f"{world} ranks", "1 process", "largest relative difference"),
        ("last loss", f"{found.parallel.losses[-1]:.6f}", f"{found.alone.losses[-1]:.6f}", f"{found.loss:.1e}"),
        ("last gradient norm", f"{found.parallel.norms[-1]:.6f}", f"{found.alone.norms[-1]:.6f}", f"{found.norm:.1e}"),
        ("tokens/s", f"{found.parallel.speed:,.0f}", f"{found.alone.speed:,.0f}", ""),
    ]
    lines = [f"  {a:20}{b:>12}{c:>12}   {d}".rstrip() for a, b, c, d in rows]
    verdict = "the same training" if found.ok else "NOT THE SAME TRAINING"
    return "\n".join(
        [
            "",
            *lines,
            f"  {verdict}: largest difference over {len(found.alone.losses)} steps {max(found.loss, found.norm):.1e}, "
            f"tolerance {TOLERANCE:.0e}",
        ]
    )


__all__ = ["Comparison", "Demo", "Training", "run", "train"]
