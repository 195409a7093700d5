"""What a batch of a new shape costs, and whether its program is the one that a capture gives: `python benchmarks/shapes/run.py`.

    --depth 4 16 48 96        a GPT of 12288 wide layers on `meta`, dp=64 x tp=8 = 512 ranks of the fake process group: seconds of the first
                              program, of the second length (a capture), of later ones, and memory that each of them keeps
    --kinds llama gpt2 ...    small models of these architectures, simulated dp=2 x tp=2 (or --mesh), seven shapes each: is the graph, the
                              plan and the lowered program node for node that of a capture of its own, and how many were made without one

Every depth runs in a process of its own. Times are processor seconds of the one thread that does it all.
"""

from __future__ import annotations

import argparse
import gc
import os
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
from meshpar.compile.programs import Programs  # noqa: E402
from meshpar.compile.shapes.classes import KnownShapes  # noqa: E402
from meshpar.compile.shapes.plans import Plans  # noqa: E402
from meshpar.compile.shapes.written import written  # noqa: E402
from meshpar.graph import text  # noqa: E402
from meshpar.runtime.blocks import Tree  # noqa: E402

LENGTHS = (1024, 1040, 1056, 1088, 960, 768, 512, 1504)


def depth(layers: int) -> str:
    """One row: a model of this many layers."""
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    model = build("gpt", layers)
    programs = Programs(model, mp.make_mesh("dp=64,tp=8"), mp.ParallelConfig())
    tree = Tree(dict(model.named_parameters()), dict(model.named_buffers()))
    seconds, kept = [], []
    for length in LENGTHS:
        ids = torch.zeros(1, length, dtype=torch.int64)
        gc.collect()
        before, start = _resident(), time.process_time()
        program = programs.make((), {"input_ids": ids, "labels": ids}, training=True)
        tree.add_program(program.key, program.graph, constants=program.captured.constants)
        seconds.append(time.process_time() - start)
        gc.collect()
        kept.append(_resident() - before)
    count, later = programs.shapes.count, seconds[3:]
    mean, most = sum(later) / len(later), max(later)
    memory = f"{kept[0]:.1f} | {sum(kept[3:]) / len(later):.1f}"
    times = f"{seconds[0]:.2f} s | {seconds[1]:.2f} s | {seconds[2]:.2f} s | {mean:.3f} s | {most:.3f} s | {100 * mean / seconds[0]:.1f} %"
    return f"| {layers} | {times} | {memory} | {count.captured} | {count.made} |"


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


def resized(batch: dict[str, Any], samples: int, length: int) -> dict[str, Any]:
    """The same batch with other numbers of samples and positions."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != 4:
            return value
        value = torch.cat([value, value])[:samples]
        if value.dim() == 2 and value.shape[1] == 12 and not value.is_floating_point():
            value = torch.cat([value, value], 1)[:, :length]
        return value

    return {name: one(value) for name, value in batch.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, nargs="*", default=[])
    parser.add_argument("--task", default="causal")
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--here", action="store_true", help="in this process, without a heading")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.here:
        print(depth(options.depth[0]), flush=True)
        return
    print(machine())
    if options.depth:
        names = ("layers", "first", "second", "third", "later, mean", "most", "of the first", "MiB first", "MiB later", "captured", "made")
        print(f"| {' | '.join(names)} |")
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for layers in options.depth:
        subprocess.run([sys.executable, __file__, "--here", "--depth", str(layers)], check=True)
    if options.kinds:
        print("| architecture | as captured | graphs made | plans made | why not |\n|---|---|---|---|---|", flush=True)
        with mp.simulate(prod(int(part.partition("=")[2]) for part in options.mesh.split(","))):
            mesh = mp.make_mesh(options.mesh)
            for kind in options.kinds:
                try:
                    print(exact(options.task, kind, mesh), flush=True)
                except Exception as error:  # a row of the table: refused by capture, with the reason
                    print(f"| {kind} | {type(error).__name__}: {str(error).partition(chr(10))[0][:160]} | | | |", flush=True)


if __name__ == "__main__":
    main()
