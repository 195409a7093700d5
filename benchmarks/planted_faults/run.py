"""Plants faults in lowered programs, and says what finds them: `python benchmarks/planted_faults/run.py [--numbers] [--only llama]`.

Each fault is one change of one graph: a collective dropped, doubled, moved or of another group, another dim, segment, factor, operand.
The static check reads the program without running it; with `--numbers`, `verify` runs it on simulated ranks against one device as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402

import meshpar.compile.programs as made  # noqa: E402
from benchmarks.planted_faults import faults  # noqa: E402
from benchmarks.planted_faults.faults import Fault, NoPlace  # noqa: E402
from benchmarks.planted_faults.table import CASES, Case  # noqa: E402
from benchmarks.random_programs.compare import eager  # noqa: E402
from meshpar.compile.program import Program  # noqa: E402
from meshpar.compile.programs import Programs  # noqa: E402
from meshpar.compile.proved import read_back  # noqa: E402
from meshpar.compile.split import StageGraph  # noqa: E402
from meshpar.config import ParallelConfig  # noqa: E402
from meshpar.dry_run.rehearsal import absent  # noqa: E402
from meshpar.errors import MeshparError  # noqa: E402
from meshpar.mesh import parse_mesh, typed_axes  # noqa: E402
from meshpar.passes.order import _copied as copied_graph  # noqa: E402
from meshpar.proof.static.report import StaticReport  # noqa: E402


@dataclass(frozen=True)
class Planted:
    """What became of one fault."""

    model: str
    mesh: str
    fault: str
    static: bool
    """Whether the static check found a fault."""
    unproved: int
    """Calls that are not proved in the program with the fault, more than in that without."""
    away: int | None
    """How many edges of the graph lie between the change and the first fault that was found."""
    told: str
    numbers: bool | None = None
    """Whether `verify` saw a difference; None: not run."""


def planted(case: Case, *, numbers: bool = False) -> Iterator[Planted]:
    """All faults of one model on one mesh."""
    model, batch = case.make()
    with absent(case.mesh) as mesh, eager(case.eager):
        programs = Programs(model, mesh, case.config)
        program = programs.make((), _local(batch, case.mesh), training=True, microbatches=case.config.microbatches)
        rows = [row for fault in case.faults if (row := _static(case, programs, program, fault)) is not None]
    for fault, row in rows:
        simulated = numbers and "pp" not in parse_mesh(case.mesh)
        yield replace(row, numbers=_differs(case, model, batch, fault)) if simulated else row


def _static(case: Case, programs: Programs, program: Program, fault: Fault) -> tuple[Fault, Planted] | None:
    """What the static check says of a program with a fault; None where the program has no place for it."""
    axes = [a for a in typed_axes(programs.mesh) if a.size > 1]
    try:
        wrong, graph, touched = _changed(program, fault, [(a.group, a.size, a.rank) for a in axes])
    except NoPlace:
        return None
    report = _read(programs, wrong)
    away = _away(graph, touched, report.faults[0].place.node) if report.faults else None
    told = str(report.faults[0]) if report.faults else ""
    unproved = len(report.unproved) - len(_read(programs, program).unproved)
    return fault, Planted(case.name, case.mesh, fault.name, bool(report.faults), unproved, away, told)


def _read(programs: Programs, program: Program) -> StaticReport:
    """What the static check says of a program (of a pipeline's, as it returns every output)."""
    return read_back(replace(program, stages=program.all_stages), programs.mesh, programs.config)


def _local(batch: Mapping[str, Tensor], mesh: str) -> dict[str, Tensor]:
    sizes = parse_mesh(mesh)
    ranks = prod(sizes.get(name, 1) for name in ("dp", "ep"))
    return {name: x.chunk(ranks)[0] for name, x in batch.items()}


@contextmanager
def planting(fault: Fault) -> Iterator[None]:
    """Inside, programs are made with a fault in them, and run all the same."""
    inner = made.proved

    def proved(program: Program, mesh: DeviceMesh, config: ParallelConfig) -> Program:
        axes = [a for a in typed_axes(mesh) if a.size > 1]
        try:
            return _changed(program, fault, [(a.group, a.size, a.rank) for a in axes])[0]
        except NoPlace:
            return program

    made.proved = proved
    try:
        yield
    finally:
        made.proved = inner


def _changed(program: Program, fault: Fault, groups: Sequence[tuple[str, int, int]]) -> tuple[Program, fx.Graph, list[fx.Node]]:
    """The program with a fault: in its graph (that of a step, where that is another), or in the first stage that has a place for it."""
    if program.step is not None:
        graph = copied_graph(program.step.graph)
        touched = fault.change(graph, groups)
        return replace(program, step=replace(program.step, graph=graph)), graph, touched
    if not program.all_stages:
        graph = copied_graph(program.graph)
        touched = fault.change(graph, groups)
        return replace(program, graph=graph), graph, touched
    for at, stage in reversed(list(enumerate(program.all_stages))):
        graph = copied_graph(stage.graph)
        try:
            touched = fault.change(graph, groups)
        except NoPlace:
            continue
        stages = list[StageGraph](program.all_stages)
        stages[at] = replace(stage, graph=graph)
        return replace(program, all_stages=tuple(stages)), graph, touched
    raise NoPlace("any stage")


def _away(graph: fx.Graph, touched: Sequence[fx.Node], name: str) -> int | None:
    """Edges between what was changed and where the fault was found; None where that is inside of a call that a proof takes apart."""
    seen, waiting = {n.name: 0 for n in touched}, deque(touched)
    while waiting:
        node = waiting.popleft()
        if node.name == name:
            return seen[node.name]
        for near in (*node.all_input_nodes, *node.users):
            if near.name not in seen:
                seen[near.name] = seen[node.name] + 1
                waiting.append(near)
    return None


def _differs(case: Case, model: nn.Module, batch: Mapping[str, Tensor], fault: Fault) -> bool:
    """Whether `verify` says that the program with the fault is wrong, or cannot be run."""
    from meshpar.proof import verify as numeric

    numeric._where = lambda *_: ()  # where it is wrong is known
    try:
        with planting(fault), eager(case.eager):
            return not numeric.verify(model, case.mesh, batch, config=case.config, steps=1).ok
    except (MeshparError, RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return True


def table(rows: Sequence[Planted]) -> str:
    """The results, as the README has them."""
    lines = ["| model | mesh | fault | static | verify | edges away |", "|---|---|---|---|---|---|"]
    words = {True: "caught", False: "**missed**", None: "-"}
    lines += [
        f"| {r.model} | {r.mesh} | {r.fault} | {words[r.static] if r.static or not r.unproved else 'not proved'} | {words[r.numbers]} | "
        f"{'-' if r.away is None else r.away} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", action="store_true", help="run every program too")
    parser.add_argument("--only", help="models whose name begins so")
    parser.add_argument("--out", type=Path, help="JSON lines of the results")
    parser.add_argument("--last", action="store_true", help="each fault at the last place in the program that it has, not at the first")
    options = parser.parse_args()
    faults.FROM_THE_END = options.last
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[Planted] = []
    for case in CASES:
        if options.only and not case.name.startswith(options.only):
            continue
        for row in planted(case, numbers=options.numbers):
            rows.append(row)
            if options.out:
                with options.out.open("a") as out:
                    out.write(json.dumps(asdict(row)) + "\n")
    print(table(rows))
    print(Counter((r.static, r.numbers) for r in rows), f"of {len(rows)}")
    print("largest distance:", max((r.away for r in rows if r.away is not None), default=None))


if __name__ == "__main__":
    main()
