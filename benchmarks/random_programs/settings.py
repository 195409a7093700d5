"""How a random program is run, drawn from its seed: its mesh, configuration and dtype, and the shapes of its batches."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

from benchmarks.random_programs import stacks
from benchmarks.random_programs.programs import Program, draw
from meshpar.config import CONTEXT, DATA_PARALLEL, SCHEDULES, ParallelConfig
from meshpar.errors import ConfigError
from meshpar.mesh import parse_mesh
from meshpar.pipeline.order import check_schedule
from meshpar.roles import ROLES

LINES = ("tp=2", "tp=3", "tp=4", "dp=2", "dp=2,tp=2", "dp=3", "dp=3,tp=2")
SIMULATED = ("tp=2", "tp=4", "dp=2,tp=2", "cp=2", "cp=2", "cp=2,tp=2", "cp=3", "cp=4", "dp=2,cp=2", "dp=2,cp=2,tp=2", "dp=3,tp=2")
EXPERTS = ("ep=2", "ep=2,tp=2", "dp=2,ep=2", "cp=2,ep=2", "ep=4", "dp=2,ep=2,tp=2", "dp=2,cp=2,ep=2")
PROCESSES = (
    "pp=2", "pp=2", "pp=2", "pp=3", "pp=4", "pp=2,tp=2", "pp=2,dp=2", "pp=2,cp=2", "dp=2", "dp=2,tp=2", "dp=4", "dp=3", "cp=2", "cp=2,tp=2",
    "dp_replicate=2,dp_shard=2", "dp=2,cp=2", "tp=2", "dp_shard=2,tp=2", "dp_replicate=2,tp=2",
)  # fmt: skip
EXPERTS_ON_PROCESSES = ("ep=2", "ep=2,tp=2", "dp=2,ep=2", "pp=2,ep=2", "cp=2,ep=2", "dp_replicate=2,ep=2", "dp_shard=2,ep=2", "ep=4")
LINES_ON_PROCESSES = ("pp=2", "pp=2", "pp=2,tp=2", "pp=2,dp=2", "dp=2", "dp=2,tp=2", "tp=2", "dp=3", "pp=3", "dp_replicate=2,dp_shard=2")

SMALL = {
    "lines": ("tp=2", "tp=2", "dp=2", "tp=3", "dp=2,tp=2"),
    "stack": ("tp=2", "tp=2", "tp=2", "cp=2", "cp=2", "dp=2", "cp=2,tp=2", "dp=2,tp=2", "dp=2,cp=2", "tp=4", "cp=3"),
    "experts": ("ep=2", "ep=2", "tp=2", "cp=2", "ep=2,tp=2", "cp=2,ep=2", "dp=2,ep=2"),
}
SMALL_ON_PROCESSES = {
    "lines": ("pp=2", "dp=2", "tp=2", "dp_shard=2"),
    "stack": ("pp=2", "pp=2", "pp=2", "dp=2", "tp=2", "tp=2", "cp=2", "pp=2,dp=2", "pp=2,tp=2", "pp=2,cp=2", "dp=2,tp=2", "pp=3", "pp=4"),
    "experts": ("ep=2", "ep=2", "pp=2", "pp=2,ep=2", "dp=2,ep=2", "ep=2,tp=2"),
}
MOST_OF_FEW = 5
"""Steps; runs of more are over many lengths."""
SWITCHES = ("overlap_grad_reduce", "overlap_param_gather", "overlap_tensor_parallel", "overlap_p2p")


@dataclass(frozen=True)
class Setting:
    """How a program is run."""

    mesh: str
    config: Mapping[str, Any]
    forced: bool = False
    """Whether rules for some parameters are drawn as well."""
    drawn: bool = False
    """Whether the solver's costs are drawn."""
    kind: str = "lines"
    """"lines" (`programs.py`), "stack" or "experts" (`stacks.py`)."""
    processes: bool = False
    """Whether ranks are processes, each with a hash seed of its own."""
    dtype: str = "fp64"
    """"fp64", "bf16" (all of both programs), or "mixed": bf16 inside forward and backward, fp32 outside."""
    steps: int = 2
    shapes: bool = False
    """Whether steps after the first may have batches of another shape."""
    eager: bool = False
    """Whether passes that wait for megabytes take what is small (`compare.eager`)."""
    small: bool = False
    """Whether a stack is of one or two blocks more than there are stages, and lines are few."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The axes of the mesh."""
        return parse_mesh(self.mesh)

    @property
    def data(self) -> int:
        """The ranks that have batches of their own."""
        return prod(n for name, n in self.sizes.items() if ROLES[name].own_batches)

    @property
    def divisor(self) -> int:
        """What the samples of a batch divide by."""
        return self.data * int(self.config.get("microbatches", 1))

    def takes(self, length: int) -> bool:
        """Whether a small program is run with so many positions: what cp does not divide is refused, once is enough."""
        return not self.small or length % self.sizes.get("cp", 1) == 0

    def __str__(self) -> str:
        extras = [name for name, on in (("rules", self.forced), ("costs", self.drawn), ("processes", self.processes)) if on]
        extras += [name for name, on in (("eager", self.eager), ("small", self.small)) if on]
        extras += [self.dtype] * (self.dtype != "fp64") + [f"steps={self.steps}"] + ["shapes"] * self.shapes
        return " ".join([self.mesh, *(f"{k}={v}" for k, v in self.config.items()), self.kind, *extras])


def setting(seed: int, *, processes: bool = False) -> Setting:
    """The mesh and configuration of a seed."""
    rng = random.Random(f"setting {seed} {processes}")
    kind = rng.choices(("lines", "stack", "experts"), (1, 7, 3) if processes else (3, 6, 2))[0]
    mesh = rng.choice(_meshes(kind, processes))
    dtype = "fp64" if kind == "lines" else rng.choices(("fp64", "bf16", "mixed"), (14, 2, 1))[0]
    config = _config(rng, parse_mesh(mesh), kind, processes)
    shapes = rng.random() < 0.7
    forced, drawn = "tp" in mesh and rng.random() < 0.15, rng.random() < (0.5 if kind == "lines" else 0.2)
    return Setting(mesh, config, forced, drawn, kind, processes, dtype, rng.choice([3, 4, 5] if shapes else [1, 2, 3]), shapes)


def _meshes(kind: str, processes: bool) -> tuple[str, ...]:
    if processes:
        return {"lines": LINES_ON_PROCESSES, "stack": PROCESSES, "experts": EXPERTS_ON_PROCESSES}[kind]
    return {"lines": LINES, "stack": SIMULATED, "experts": EXPERTS}[kind]


def several(seed: int, count: int, *, processes: bool = False) -> tuple[Setting, ...]:
    """Settings under which one small program is run, with captures that most of them share: meshes mostly of two ranks.

    What was written last is drawn most: passes that take what is small, chunks of logits, switches, and runs over many lengths.
    """
    rng = random.Random(f"several {seed} {processes}")
    kind = rng.choices(("lines", "stack", "experts"), (4, 6, 2))[0]
    dtype = "fp64" if kind == "lines" else rng.choices(("fp64", "bf16", "mixed"), (16, 2, 1))[0]
    many = kind != "lines" and rng.random() < 0.12
    steps = rng.choice([7, 8]) if many else rng.choice([1, 1, 1, 2, 3])
    found = list[Setting]()
    while len(found) < count:
        mesh, config = _another(rng, kind, processes)
        how = Setting(mesh, config, "tp" in mesh and rng.random() < 0.15, rng.random() < 0.3, kind, processes, dtype, steps)
        how = replace(how, shapes=many or steps == 3, eager=rng.random() < 0.6, small=True)
        if not found or (found[0].divisor % how.divisor == 0 and str(how) not in map(str, found)):
            found.append(how)
        elif rng.random() < 0.02:
            count -= 1  # (there may be no more of them)
    return tuple(found)


def _another(rng: random.Random, kind: str, processes: bool) -> tuple[str, dict[str, Any]]:
    mesh = rng.choice((SMALL_ON_PROCESSES if processes else SMALL)[kind])
    config = _config(rng, parse_mesh(mesh), kind, processes)
    if kind == "experts" and "pp" not in mesh and rng.random() < 0.8:
        config.pop("microbatches", None)  # (penalties of routers are averaged over them: not compared)
    if rng.random() < 0.35:
        config["logits_bytes"] = rng.choice([1, 100, 400, 1500])
    for switch in SWITCHES:
        if rng.random() < 0.12:
            config[switch] = False
    return mesh, config


def _config(rng: random.Random, sizes: Mapping[str, int], kind: str, processes: bool) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if "tp" in sizes and rng.random() < 0.5:
        config["sequence_parallel"] = rng.random() < 0.7
    if "cp" in sizes and rng.random() < 0.7:
        config["context"] = rng.choice(CONTEXT)
    if rng.random() < 0.3:
        config["recompute"] = rng.choice(["full", "selective"])
    if processes and any(ROLES[name].sums for name in sizes):
        config["data_parallel"] = rng.choice(DATA_PARALLEL)
        if rng.random() < 0.3:
            config["bucket_bytes"] = rng.choice([1, 500, 5000])
    if "pp" in sizes:
        return config | _schedule(rng, sizes)
    if rng.random() < (0.05 if kind == "lines" else 0.3):
        config["microbatches"] = rng.choice([2, 2, 3])
    return config


def _schedule(rng: random.Random, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A schedule with a number of stages and microbatches that it allows."""
    while True:
        found: dict[str, Any] = {"schedule": rng.choice(list(SCHEDULES)), "microbatches": rng.choice([1, 2, 2, 3, 4, 4, 6])}
        if rng.random() < 0.3:
            found["virtual_stages"] = rng.choice([1, 2, 3])
        try:
            check_schedule(sizes, ParallelConfig(**found))
        except ConfigError:
            continue
        return found


def program_of(seed: int, how: Setting, *others: Setting) -> Program:
    """The program of a seed, whose batch divides by the data ranks and microbatches of `how`, for others too whose divisors divide that."""
    hows = (how, *others)
    if how.kind == "lines":
        return draw(seed, data=how.divisor, lines=12 if any("pp" in one.sizes for one in hows) else 5 if how.small else 0)
    stages = max(one.sizes.get("pp", 1) * ParallelConfig(**one.config).stages_per_rank for one in hows)
    experts, multiple = how.kind == "experts", lcm(*map(_multiple, hows))
    named = {"data": how.divisor, "experts": experts, "multiple": multiple}
    if how.small:
        named["uneven"] = not any("cp" in one.sizes for one in hows)
        return stacks.draw_stack(
            seed, depth=max(2 - experts, stages), more=1, listed=random.Random(f"listed {seed}").random() < 0.8, **named
        )
    return stacks.draw_stack(seed, depth=max(1, stages), **named)


def _multiple(how: Setting) -> int:
    """What lengths mostly divide by."""
    return max(2, 2 * how.sizes.get("cp", 1)) * (how.sizes.get("tp", 1) if how.sizes.get("tp", 1) < 4 else 2)


def shapes_of(program: Program, how: Setting) -> tuple[tuple[int, int], ...]:
    """Samples and positions of the batch of every step: others after the first, where the program takes them on one device."""
    rng, found = random.Random(f"shapes {program.seed}"), [program.sizes]
    if how.steps > MOST_OF_FEW:
        return _many_shapes(rng, program, how)
    while len(found) < how.steps:
        b, n = stacks.sizes(rng, how.divisor, _multiple(how))
        if how.kind == "lines":
            b, n = rng.choice([(program.sizes[0], n), (b, program.sizes[1])])
        new = how.shapes and rng.random() < 0.9 and how.takes(n) and program.runs((b, n))
        found.append((b, n) if new else rng.choice(found))
    return tuple(found)


def _many_shapes(rng: random.Random, program: Program, how: Setting) -> tuple[tuple[int, int], ...]:
    """The longest and the shortest after the first; then others, most of them between those, and some of other samples or once more."""
    (b, n), each = program.sizes, _multiple(how)
    lengths = [n for n in range(each, 25, max(2, each // 2)) if program.runs((b, n))] or [n]
    found = [(b, n), (b, lengths[-1]), (b, lengths[0])]
    new = rng.sample(lengths, len(lengths))
    while len(found) < how.steps:
        samples = b if rng.random() < 0.85 else how.divisor * rng.choice([1, 2, 3])
        length = new.pop() if new and rng.random() < 0.85 else rng.randint(2, 24)
        found.append((samples, length) if how.takes(length) and program.runs((samples, length)) else rng.choice(found))
    return tuple(found)


def rules_for(program: Program, how: Setting) -> dict[str, str] | None:
    """Parameters with two or more dims cut along one at random, where that is asked for."""
    if not how.forced:
        return None
    rng = random.Random(f"rules {program.seed}")
    found = {}
    for name, parameter in program.model().named_parameters():
        allowed = [f"tp:{d}" for d, n in enumerate(parameter.shape) if n % how.sizes["tp"] == 0]
        if parameter.ndim >= 2 and rng.random() < 0.5:
            found[name] = rng.choice([*allowed, *allowed, "replicate"])
    return found or None
