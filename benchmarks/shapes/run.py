"""What a batch of a new shape costs, and whether its program is the one that a capture gives: `python benchmarks/shapes/run.py`.

    --depth 4 16 48 96        a GPT of 12288 wide layers on `meta`, dp=64 x tp=8 = 512 ranks of the fake process group: seconds of the first
                              program, of the second length (a capture), of later ones, and memory that each of them keeps
    --kinds llama gpt2 ...    small models of these architectures, simulated dp=2 x tp=2 (or --mesh), seven shapes each: is the graph, the
                              plan and the lowered program node for node that of a capture of its own, and how many were made without one

    --told llama gpt2 ...     small models of these architectures, simulated dp=2 x tp=2 (or --mesh): four lengths that are made as ever,
                              then five between them; of how many is the code made by numbers alone, and is it that of a capture
    --random 200              so many steps of random lengths and numbers of samples on eight gloo ranks, pp=2 x dp=2 x tp=2: how far a
                              loss is from that of one process at most, how programs came about, memory after each quarter of the steps

Every depth runs in a process of its own. Times are processor seconds of the one thread that does it all.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import meshpar as mp  # noqa: E402
from benchmarks.architectures.small import made  # noqa: E402
from benchmarks.capture.run import build  # noqa: E402
from benchmarks.measuring import machine  # noqa: E402
from meshpar.compile.program import Program  # noqa: E402
from meshpar.compile.programs import Programs  # noqa: E402
from meshpar.compile.shapes.classes import KnownShapes  # noqa: E402
from meshpar.compile.shapes.plans import Plans  # noqa: E402
from meshpar.compile.shapes.written import written  # noqa: E402
from meshpar.compile.signature import flatten  # noqa: E402
from meshpar.graph import text  # noqa: E402
from meshpar.proof import launch  # noqa: E402
from meshpar.runtime.blocks import Tree  # noqa: E402
from meshpar.runtime.engine import Engine, Inputs  # noqa: E402
from meshpar.runtime.state.resized import code_of  # noqa: E402
from meshpar.runtime.state.variants import Variants  # noqa: E402
from tests.models import GPT, numbers  # noqa: E402

LENGTHS = (1024, 512, 1504, 1040, 1056, 1088, 960, 768, 1496)
TOLD = 4
"""From this one on, the others tell the program."""


def depth(layers: int) -> str:
    """One row: a model of this many layers."""
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    model = build("gpt", layers)
    mesh = mp.make_mesh("dp=64,tp=8")
    programs = Programs(model, mesh, mp.ParallelConfig())
    tree = Tree(dict(model.named_parameters()), dict(model.named_buffers()))
    seconds, kept = [], []
    variants: Variants | None = None
    for length in LENGTHS:
        ids = torch.zeros(1, length, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids}
        gc.collect()
        before, start = _resident(), time.process_time()
        if variants is None:
            program = programs.make((), batch, training=True)
            tree.add_program(program.key, program.graph, constants=program.captured.constants)
            variants = Variants(tree, programs, OneTree({0: tree}, program), mesh)
            variants.learn(program, 1)
        else:
            variants.make((flatten((), batch, True)[1], 1, ""), (), batch)
        seconds.append(time.process_time() - start)
        gc.collect()
        kept.append(_resident() - before)
    later, told = seconds[TOLD:], variants.told()
    mean, most = sum(later) / len(later), max(later)
    memory = f"{kept[0]:.1f} | {sum(kept[TOLD:]) / len(later):.1f}"
    times = f"{' | '.join(f'{s:.2f}' for s in seconds[:TOLD])} | {1000 * mean:.0f} | {1000 * most:.0f} | {100 * mean / seconds[0]:.1f} %"
    print(*told, sep="\n", file=sys.stderr)
    return f"| {layers} | {times} | {memory} |"


class OneTree(Engine):
    """Keeps the code of programs, and runs none."""

    def run(self, program: Program, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def step(self, program: Program, parts: Sequence[Inputs], *, backward: bool, scale: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError


def random_lengths(steps: int) -> tuple[float, list[float], tuple[str, ...]]:
    """One rank of many: the largest difference of the loss, MiB after each quarter, what `explain` says of shapes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, mesh = GPT().double(), mp.make_mesh("pp=2,dp=2,tp=2")
    draw = random.Random(0)
    worst, kept = 0.0, []
    pm: mp.ParallelModel | None = None
    for step in range(steps):
        torch.manual_seed(step)
        samples, length = 4 * draw.randint(1, 3), draw.randint(2, 32)
        batch = {"ids": numbers(53, samples, length), "labels": numbers(53, samples, length)}
        local = mp.local_batch(batch, mesh)
        if pm is None:
            pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=2))
        with torch.no_grad():
            wanted = model(**batch)
        worst = max(worst, abs(float(pm.train_step(**local)) - float(wanted)))
        pm.zero_grad()
        if (step + 1) % (steps // 4) == 0:
            gc.collect()
            kept.append(_resident())
    assert pm is not None
    return worst, kept, tuple(line for line in pm.explain().splitlines() if "programs" in line or "graphs captured" in line)


def _resident() -> float:
    """MiB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def exact(task: str, kind: str, mesh: Any) -> str:
    """One row: an architecture at five shapes after the first two, against captures of their own."""
    torch.manual_seed(0)
    model, batch = made(task, kind)
    model = model.double().train()
    programs, fresh = (Programs(model, mesh, mp.ParallelConfig()) for _ in range(2))
    same = 0
    shapes = ((4, 12), (4, 10), (4, 7), (4, 16), (2, 10), (6, 9), (4, 14))
    even = 2 if "cp" in mesh.mesh_dim_names else 1  # (it has to divide the positions)
    for samples, length in [(samples, -(-length // even) * even) for samples, length in shapes]:
        fresh.shapes, fresh.planner.plans = KnownShapes(), Plans()
        found = []
        for one in (programs, fresh):
            seen = one.seen((), resized(batch, samples, length), training=True)
            plan = one.planned(seen)
            found.append((text.lines(seen.parts.captured), plan.hash, written(one.lowered(seen, plan).graph)))
        same += found[0] == found[1]
    count = programs.shapes.count
    reasons = "; ".join(reason for reason in count.reasons if not reason.startswith("one shape alone"))
    return f"| {kind} | {same} of {len(shapes)} | {count.made} | {programs.planner.plans.made} | {reasons[:160]} |"


def told(task: str, kind: str, mesh: Any) -> str:
    """One row: an architecture at lengths between known ones."""
    torch.manual_seed(0)
    model, batch = made(task, kind)
    model = model.double().train()
    tensors = dict(model.named_parameters()), dict(model.named_buffers())
    programs, fresh = (Programs(model, mesh, mp.ParallelConfig()) for _ in range(2))
    tree, other = Tree(*tensors), Tree(*tensors)
    variants, same, count = None, 0, 0
    for at, length in enumerate(BETWEEN):
        given = resized(batch, 4, length)
        if variants is None:
            program = programs.make((), given, training=True)
            engine, as_ever = OneTree({0: tree}, program), OneTree({0: other}, program)
            engine.add(program)
            variants = Variants(tree, programs, engine, mesh)
            variants.learn(program, 1)
        else:
            signature = flatten((), programs.ordered(given), True)[1]
            program = variants.make((signature, 1, ""), (), given).program
        if at >= TOLD and program.like is not None:
            fresh.shapes, fresh.planner.plans = KnownShapes(), Plans()
            captured = fresh.make((), given, training=True)
            as_ever.add(captured)
            same += code_of(engine.functions(program)) == code_of(as_ever.functions(captured))
            count += 1
    assert variants is not None
    reasons = "; ".join(line for line in variants.told() if line.startswith("not made of code"))
    return f"| {kind} | {count} of {len(BETWEEN) - TOLD} | {same} of {count} | {reasons[:200]} |"


BETWEEN = (8, 24, 16, 20, 10, 14, 18, 22, 12)


def resized(batch: dict[str, Any], samples: int, length: int) -> dict[str, Any]:
    """The same batch with other numbers of samples and positions."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != 4:
            return value
        value = torch.cat([value, value])[:samples]
        if value.dim() == 2 and value.shape[1] == 12 and not value.is_floating_point():
            value = torch.cat([value] * 3, 1)[:, :length]
        return value

    return {name: one(value) for name, value in batch.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, nargs="*", default=[])
    parser.add_argument("--task", default="causal")
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--told", nargs="*", default=[])
    parser.add_argument("--random", type=int, default=0, metavar="STEPS")
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--here", action="store_true", help="in this process, without a heading")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.here:
        print(depth(options.depth[0]), flush=True)
        return
    print(machine())
    if options.depth:
        names = ("layers", "first, s", "second", "third", "fourth", "later, mean, ms", "most", "of the first", "MiB first", "MiB later")
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for layers in options.depth:
        subprocess.run([sys.executable, __file__, "--here", "--depth", str(layers)], check=True)
    if options.random:
        found = launch.run(random_lengths, options.random, world=8)
        print(f"{options.random} steps: loss within {max(worst for worst, _, _ in found):.1e} of one process on every rank")
        for rank, (_, kept, lines) in enumerate(found):
            print(f"rank {rank}: MiB {' '.join(f'{n:.0f}' for n in kept)}", *(lines if rank == 0 else ()), sep="\n  ")
    tables = (
        (exact, options.kinds, "| architecture | as captured | graphs made | plans made | why not |\n|---|---|---|---|---|"),
        (told, options.told, "| architecture | told | as captured | why not |\n|---|---|---|---|"),
    )
    for row, kinds, heading in tables:
        if not kinds:
            continue
        print(heading, flush=True)
        with mp.simulate(prod(int(part.partition("=")[2]) for part in options.mesh.split(","))):
            mesh = mp.make_mesh(options.mesh)
            for kind in kinds:
                try:
                    print(row(options.task, kind, mesh), flush=True)
                except Exception as error:  # a row of the table: refused by capture, with the reason
                    print(f"| {kind} | {type(error).__name__}: {str(error).partition(chr(10))[0][:160]} | | | |", flush=True)


if __name__ == "__main__":
    main()
