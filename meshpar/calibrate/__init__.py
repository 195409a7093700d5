"""What this machine can do, measured in two minutes: a `Hardware` that dry runs, searches and plans take by its file.

    machine = mp.calibrate("here.json")
    mp.dry_run(model, "dp=2", example=batch, hardware="here.json")

Kernels alone on a core (`kernels`), collectives between local gloo ranks (`collectives`), then steps of small programs for what the runtime
takes beside both (`programs`). How right estimates are afterwards: benchmarks/planner_here.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from meshpar.calibrate import collectives, kernels, programs
from meshpar.calibrate.programs import SmallProgram
from meshpar.errors import ConfigError, raise_all
from meshpar.planner import Hardware, Transformer
from meshpar.planner.files import path_complaints, write
from meshpar.planner.measured import RUNTIME, Curve, Measured
from meshpar.proof.launch import launched, run

__all__ = ["SmallProgram", "calibrate"]
ROUNDS = 10


def calibrate(
    path: str | Path | None = None, *, ranks: int | None = None, rounds: int = ROUNDS, say: Callable[[str], object] = lambda text: None
) -> Hardware:
    """This machine as hardware: its cores, with 1 to `ranks` gloo ranks of one thread each (by default as many as cores, at least 4).

    Writes it to `path`, a name that ends in .json, where there is one. `rounds`: how often everything is timed; the least counts. `say` is
    told what is being measured. Takes about two minutes.

    Raises ConfigError for a path, ranks or rounds that cannot be, and in a process that is a rank already.

    >>> machine = mp.calibrate("here.json")                                # doctest: +SKIP
    >>> mp.dry_run(model, "tp=2", hardware=machine).time.seconds           # doctest: +SKIP
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(4, cores) if ranks is None else ranks
    _check(path, most, rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = _machine(cores, most, rounds, say)
    finally:
        torch.set_num_threads(threads)
    if path is not None:
        write(machine, path)
    return machine


def _check(path: str | Path | None, ranks: int, rounds: int) -> None:
    complaints = [] if path is None else list(path_complaints(path))
    for name, value in (("ranks", ranks), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
            complaints.append(f"{name}={value!r}: a whole number from 1 to 64.")
    if launched():
        complaints.append("this process is a rank already; calibrate starts its own: call it without torchrun.")
    raise_all(ConfigError, "calibrate:", complaints)


def _machine(cores: int, ranks: int, rounds: int, say: Callable[[str], object]) -> Hardware:
    say("kernels")
    found = kernels.measure(rounds=rounds)
    crowd, links = [], dict[str, Curve]()
    for world in worlds(ranks):
        say(f"{world} ranks")
        curves, seconds = run(collectives.measure, rounds, world=world)[0]
        links |= curves
        crowd.append((world, seconds))
    own = Measured(cores, _crowd(crowd, ranks, cores), found, links, {**dict.fromkeys(RUNTIME, 0.0), **_optimizer(rounds)})
    machine = _hardware(own, ranks)
    say("steps of small programs")
    small = [one for one in SMALL if one.world <= ranks]
    measured = steps(small, rounds)
    return replace(machine, measured=programs.fitted(machine, [one.predicted(machine) for one in small], measured))


def worlds(ranks: int) -> tuple[int, ...]:
    """The numbers of ranks that are tried: powers of two, and all."""
    return tuple(sorted({ranks, *(2**i for i in range(ranks.bit_length()) if 2**i <= ranks)}))


def steps(asked: list[SmallProgram], rounds: int) -> list[float]:
    """The least seconds of a step of every program."""
    found: dict[int, float] = {}
    for world in sorted({one.world for one in asked}):
        mine = [i for i, one in enumerate(asked) if one.world == world]
        taken = run(programs.measure, [asked[i] for i in mine], rounds, world=world)[0]
        found |= {i: min(seconds) for i, seconds in zip(mine, taken)}
    return [found[i] for i in range(len(asked))]


def _crowd(found: list[tuple[int, float]], ranks: int, cores: int) -> tuple[float, ...]:
    """For 1, 2, ... ranks; between those that were tried, in proportion. More ranks than cores wait for each other besides."""
    alone = found[0][1]
    curve = [(world, max(1.0, seconds / alone) * max(1.0, world / cores)) for world, seconds in found]
    crowd = []
    for k in range(1, ranks + 1):
        (a, x), (b, y) = max(p for p in curve if p[0] <= k), min(p for p in curve if p[0] >= k)
        crowd.append(x if a == b else x + (y - x) * (k - a) / (b - a))
    return tuple(crowd)


def _optimizer(rounds: int) -> dict[str, float]:
    """Seconds of AdamW for a tensor and for an element."""
    least = {}
    for size in (64, 2**18):
        tensors = [nn.Parameter(torch.zeros(size)) for _ in range(16)]
        for tensor in tensors:
            tensor.grad = torch.ones(size)
        optimizer = torch.optim.AdamW(tensors)
        optimizer.step()
        taken = []
        for _ in range(2 * rounds):
            begun = time.process_time()
            optimizer.step()
            taken.append((time.process_time() - begun) / len(tensors))
        least[size] = min(taken)
    element = (least[2**18] - least[64]) / (2**18 - 64)
    return {"tensor": least[64] - 64 * element, "element": max(0.0, element)}


def _hardware(own: Measured, ranks: int) -> Hardware:
    """What a data sheet would say: the best that was measured."""
    peaks = {name.split()[1]: curve.rate for name, curve in own.kernels.items() if name.startswith("matrix ")}
    bandwidth = own.kernels["elementwise"].rate
    link = max((curve.rate for name, curve in own.collectives.items() if name.startswith("all_gather")), default=bandwidth)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = f"meshpar calibrate: {own.cores} cores of {platform.machine()}, torch {torch.__version__}, gloo"
    rates = (whole / ranks, 0.9, bandwidth, link, link)
    return Hardware(platform.node() or "here", "measured", peaks, *rates, ranks, ranks, 1.0, 1.0, 0.0, source, measured=own)


TINY = Transformer(layers=2, hidden=32, heads=2, ffn=64, vocab=128)
DEEP = Transformer(layers=8, hidden=32, heads=2, ffn=64, vocab=128)
WIDE = Transformer(layers=4, hidden=128, heads=4, ffn=512, vocab=1024)
SMALL = [
    SmallProgram(TINY, "dp=1", 2, 32),
    SmallProgram(DEEP, "dp=1", 2, 32),
    SmallProgram(WIDE, "dp=1", 4, 128),
    SmallProgram(DEEP, "dp=1", 8, 32, {"microbatches": 4}),
    SmallProgram(DEEP, "dp=1", 2, 32, {"recompute": "full"}),
    *(SmallProgram(sizes, "dp=2", 2, 32, {"data_parallel": mode}) for sizes in (TINY, DEEP) for mode in ("replicate", "zero1", "zero3")),
    SmallProgram(DEEP, "dp=2", 8, 32, {"data_parallel": "zero2", "microbatches": 4}),
    SmallProgram(WIDE, "dp=2", 4, 128),
    SmallProgram(DEEP, "tp=2", 2, 32),
    SmallProgram(WIDE, "tp=2", 4, 128),
    *(SmallProgram(DEEP, "pp=2", m, 32, {"microbatches": m}) for m in (2, 8)),
    SmallProgram(WIDE, "pp=2", 8, 128, {"microbatches": 4}),
    SmallProgram(DEEP, "pp=2", 8, 32, {"microbatches": 8, "schedule": "zero-bubble"}),
    SmallProgram(WIDE, "dp=2,tp=2", 4, 128),
    SmallProgram(DEEP, "pp=2,dp=2", 8, 32, {"microbatches": 4, "data_parallel": "zero1"}),
]
"""What the runtime's own share is read off: little to compute and many calls, and three where that is balanced."""
