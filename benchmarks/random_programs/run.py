"""Random programs against one device: `python benchmarks/random_programs/run.py --seeds 0:1000`.

Every seed draws a program (`programs.py`), a mesh and a configuration; `mp.verify` compares loss, every gradient, gradient norm, buffers
and parameters after a step, in float64 on simulated ranks. For half of the seeds the solver's costs are drawn as well, so that it takes
typings that no tiny model would be given. What is wrong or crashes is shortened line by line and printed.

    wrong      numbers that differ
    crash      an error that is not meshpar's own
    refused    an error that meshpar raises and explains
    averaged   microbatches with a term of the loss that is documented to be averaged over them: not compared
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import meshpar as mp  # noqa: E402
import meshpar.sharding.solve as solve  # noqa: E402
from benchmarks.random_programs.programs import Program, draw, shortest  # noqa: E402
from meshpar.errors import MeshparError  # noqa: E402

MESHES = {"tp=2": 1, "tp=3": 1, "tp=4": 1, "dp=2": 2, "dp=2,tp=2": 2, "dp=3": 3, "dp=3,tp=2": 3}
"""Mesh -> its data ranks."""


@dataclass(frozen=True)
class Setting:
    """How a program is run."""

    mesh: str
    config: Mapping[str, Any]
    forced: bool = False
    """Whether rules for some parameters are drawn as well."""
    drawn: bool = False
    """Whether the solver's costs are drawn."""

    def __str__(self) -> str:
        extras = [name for name, on in (("rules", self.forced), ("costs", self.drawn)) if on]
        return " ".join([self.mesh, *(f"{k}={v}" for k, v in self.config.items()), *extras])


def setting(seed: int) -> Setting:
    """The mesh and configuration of a seed."""
    rng = random.Random(f"setting {seed}")
    config: dict[str, Any] = {}
    if rng.random() < 0.5:
        config["sequence_parallel"] = rng.random() < 0.7
    if rng.random() < 0.05:
        config["microbatches"] = 2
    if rng.random() < 0.15:
        config["recompute"] = rng.choice(["full", "selective"])
    mesh = rng.choice(list(MESHES))
    return Setting(mesh, config, "tp" in mesh and rng.random() < 0.25, rng.random() < 0.5)


def program_of(seed: int, how: Setting) -> Program:
    """The program of a seed, whose batch divides by the data ranks and microbatches."""
    return draw(seed, data=MESHES[how.mesh] * how.config.get("microbatches", 1))


def rules_for(program: Program, how: Setting) -> dict[str, str] | None:
    """Parameters with two or more dims cut along one at random, where that is asked for."""
    if not how.forced:
        return None
    rng = random.Random(f"rules {program.seed}")
    ranks = int(how.mesh.partition("tp=")[2])
    found = {}
    for name, parameter in program.model().named_parameters():
        allowed = [f"tp:{d}" for d, n in enumerate(parameter.shape) if n % ranks == 0]
        if parameter.ndim >= 2 and rng.random() < 0.5:
            found[name] = rng.choice([*allowed, *allowed, "replicate"])
    return found or None


@contextmanager
def costs(seed: int | None) -> Iterator[None]:
    """Inside, the solver pays what is drawn for a typing: nothing, its price, or a hundred times that."""
    inner, rng = solve.choices, random.Random(f"costs {seed}")

    def drawn(*args: Any, **kwargs: Any) -> tuple[solve.Choice, ...]:
        return tuple(replace(c, cost=c.cost * rng.choice([0, 1, 1, 100]) + 1e-3 * rng.random()) for c in inner(*args, **kwargs))

    if seed is not None:
        solve.choices = drawn
    try:
        yield
    finally:
        solve.choices = inner


def outcome(program: Program, how: Setting) -> tuple[str, str]:
    """("ok" | "wrong" | "crash" | "refused" | "averaged", what was found)."""
    config, rules = mp.ParallelConfig(**how.config), rules_for(program, how)
    try:
        with costs(program.seed if how.drawn else None):
            report = mp.verify(program.model(), how.mesh, program.batch(), config=config, rules=rules)
    except MeshparError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    if any("averaged over microbatches" in note or "those of a microbatch" in note for note in report.notes):
        return "averaged", str(report)
    return ("ok" if report.ok else "wrong"), str(report)


def main() -> int:
    """Run the seeds; exit status 1 when anything was wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200", help="first:last")
    parser.add_argument("--mesh", choices=MESHES, help="this mesh instead of the one that goes with the seed")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--out", type=Path, help="append a JSON line for each program")
    parser.add_argument("--show", action="store_true", help="print every program")
    parser.add_argument("--keep", action="store_true", help="do not shorten what fails")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    first, last = (int(n) for n in args.seeds.split(":"))
    count, start = Counter[str](), time.monotonic()
    for seed in range(first, last):
        if time.monotonic() - start > 60 * args.minutes:
            break
        how = setting(seed)
        how = replace(how, mesh=args.mesh, forced=how.forced and "tp" in args.mesh) if args.mesh else how
        program = program_of(seed, how)
        began = time.monotonic()
        status, text = outcome(program, how)
        count[status] += 1
        if status in ("wrong", "crash") and not args.keep:
            program = shortest(program, lambda p, how=how, status=status: outcome(p, how)[0] == status)
            text = outcome(program, how)[1]
        row = {"seed": seed, "how": str(how), "status": status, "seconds": round(time.monotonic() - began, 2)}
        if status != "ok" or args.show:
            inputs = ", ".join(f"{n} = {t}" for n, t in program.inputs)
            print(f"==== seed {seed}  {how}  {status}\n{inputs}\n{program.source}rules: {rules_for(program, how)}\n{text}\n", flush=True)
            row |= {"source": program.source, "text": text}
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(", ".join(f"{n} {status}" for status, n in count.most_common()), f"in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if count["wrong"] or count["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
