"""Random programs against one device: `python benchmarks/random_programs/run.py --seeds 0:1000`.

Every seed draws a program (`programs.py`, `stacks.py`), a mesh, a configuration, a dtype and the shapes of its batches (`settings.py`).
Loss, every gradient, gradient norm, buffers and parameters after all steps are compared with one device (`compare.py`): on simulated ranks,
or with `--processes` on a pool of gloo ranks, whose hash seeds differ, with pipelines and all data-parallel modes. What is wrong or crashes
is shortened line by line and printed.

    wrong      numbers that differ
    rounding   bf16 that is off by more units than `verify` allows, less than three times as many, and exact in float64
    crash      an error that is not meshpar's own
    refused    an error that meshpar raises and explains
    averaged   microbatches with a term of the loss that is documented to be averaged over them: not compared
    nothing    the program on one device is no standard

The static check reads every program too; where it and the numbers disagree, `contradicts` is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.random_programs.compare import Outcome, outcome  # noqa: E402
from benchmarks.random_programs.programs import Program, shortest  # noqa: E402
from benchmarks.random_programs.settings import Setting, program_of, rules_for, setting, several, shapes_of  # noqa: E402
from benchmarks.random_programs.tables import table  # noqa: E402
from tests.pool import Pool  # noqa: E402


def main() -> int:
    """Run the seeds; exit status 1 when anything was wrong, crashed, or was proved and computed differently."""
    options = _options()
    if options.table:
        print(table(options.table))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    first, last = (int(n) for n in options.seeds.split(":"))
    count, start = Counter[str](), time.monotonic()
    pool = Pool(4) if options.processes else None
    try:
        for seed in range(first, last):
            if time.monotonic() - start > 60 * options.minutes:
                break
            for at, (program, how) in enumerate(_drawn(seed, options)):
                count.update(_one(program, how, at, options, pool))
    finally:
        if pool is not None:
            pool.close()
    print(", ".join(f"{n} {status}" for status, n in count.most_common()), f"in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if count["wrong"] or count["crash"] or count["contradicts"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200", help="first:last")
    parser.add_argument("--processes", action="store_true", help="on gloo processes, with pipelines and data parallelism")
    parser.add_argument("--mesh", help="this mesh instead of the one that goes with the seed")
    parser.add_argument("--settings", type=int, default=0, help="small programs, each under so many meshes and configurations")
    parser.add_argument("--only", type=int, help="of these, the one of this number")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--out", type=Path, help="append a JSON line for each program")
    parser.add_argument("--show", action="store_true", help="print every program")
    parser.add_argument("--keep", action="store_true", help="do not shorten what fails")
    parser.add_argument("--table", type=Path, nargs="+", help="add up what these files of --out hold, and run nothing")
    return parser.parse_args()


def _drawn(seed: int, options: argparse.Namespace) -> list[tuple[Program, Setting]]:
    """The program of a seed and its setting, or one small program and several settings."""
    if options.settings:
        hows = several(seed, options.settings, processes=options.processes)
        program = program_of(seed, *hows)
        return [(program, how) for at, how in enumerate(hows) if options.only in (None, at)]
    how = setting(seed, processes=options.processes)
    how = replace(how, mesh=options.mesh, forced=how.forced and "tp" in options.mesh) if options.mesh else how
    return [(program_of(seed, how), how)]


def _one(program: Program, how: Setting, at: int, options: argparse.Namespace, pool: Any) -> Sequence[str]:
    """Run a program under one of its settings, and say and write what became of it."""
    shapes, began = shapes_of(program, how), time.monotonic()
    found = outcome(program, how, shapes, pool)
    seconds = time.monotonic() - began
    if (found.status in ("wrong", "crash") or found.contradicts) and not options.keep:
        program = shortest(program, lambda p: outcome(p, how, shapes, pool).status == found.status)
        found = outcome(program, how, shapes, pool)
    row = _row(program.seed, how, shapes, found, seconds) | ({"at": at} if options.settings else {})
    if found.status != "ok" or found.contradicts or options.show:
        print(_said(program, how, shapes, found), flush=True)
        row |= {"source": program.source, "text": found.text}
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return [found.status, *(["contradicts"] if found.contradicts else []), f"static: {found.static}"]


def _row(seed: int, how: Setting, shapes: Sequence[tuple[int, int]], found: Outcome, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": seed, "how": str(how), "kind": how.kind, "mesh": how.mesh, "config": dict(how.config)}
    row |= {
        "processes": how.processes,
        "dtype": how.dtype,
        "eager": how.eager,
        "steps": how.steps,
        "shapes": list(shapes),
        "seconds": round(seconds, 2),
    }
    row |= {"status": found.status, "static": found.static, "contradicts": found.contradicts}
    if found.found is not None:
        row |= {name: getattr(found.found, name) for name in ("programs", "made", "told", "passes", "proved", "unproved")}
    return row


def _said(program: Program, how: Setting, shapes: Sequence[tuple[int, int]], found: Outcome) -> str:
    inputs = ", ".join(f"{n} = {t}" for n, t in program.inputs)
    faults = "\n".join(found.found.faults) if found.found else ""
    head = f"==== seed {program.seed}  {how}  {found.status}, static check: {found.static}{', CONTRADICTS' if found.contradicts else ''}"
    rest = f"rules: {rules_for(program, how)}, shapes: {list(shapes)}\n{faults}\n{found.text}\n"
    return f"{head}\n{inputs}\n{program.source}{rest}"


if __name__ == "__main__":
    sys.exit(main())
