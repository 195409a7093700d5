"""What benchmarks share: steps taken in turn and timed, the machine in a line, tables, the README a run writes."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

Times = dict[str, list[tuple[float, float]]]
"""Contender -> wall and processor milliseconds of every step."""


def in_turn(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[str], object] = lambda name: None,
    unmeasured: int = 3,
) -> Times:
    """In every round each contender takes one step, first another one each time, so that whatever else the machine does hits all alike.

    `before(name)` is called before a step and not timed, and so are `unmeasured` more rounds at the start. In a process group a step is
    timed between barriers: wall time of the slowest rank, processor time (of all threads) of the mean rank.
    """
    times: Times = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + unmeasured):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before(name)
            spent = _spent(steps[name])
            if turn >= unmeasured:
                times[name].append(spent)
    return times


def _spent(step: Callable[[], object]) -> tuple[float, float]:
    together = dist.is_initialized() and dist.get_backend() != "fake"
    if together:
        dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if together:
        slowest, total = torch.tensor([wall], dtype=torch.float64), torch.tensor([cpu], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        wall, cpu = slowest.item(), total.item() / dist.get_world_size()
    return wall * 1e3, cpu * 1e3


def least_and_middle(times: Times, kind: int) -> tuple[dict[str, float], dict[str, float]]:
    """The minimum and the median of every contender's times; `kind`: 0 wall, 1 processor."""
    of = {name: [spent[kind] for spent in found] for name, found in times.items()}
    return {name: min(found) for name, found in of.items()}, {name: statistics.median(found) for name, found in of.items()}


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], lines: Sequence[str]) -> list[str]:
    return [line(head), "|" + "---|" * len(head), *lines]


def machine(*more: str) -> str:
    """What this runs on; `more` is said of the cores and after the versions."""
    names = [text.partition(":")[2].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    versions = ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}", *more])
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load at the end {load}; {versions}"


def readme(title: str, doc: str | None, *body: str, where: str, script: str) -> str:
    """The text of a README: the docstring of the benchmark without its first line, what it found, and how to find it again."""
    about = (doc or "").partition("\n\n")[2].strip()
    command = " ".join([f"python {script}", *sys.argv[1:]])
    return "\n".join(
        [f"# {title}", "", about, "", *body, "", f"{where}. {date.today().isoformat()}.", "", "Command:", "", f"    {command}", ""]
    )


def write(path: Path, text: str) -> None:
    """Put `text` into a README; what was written there by hand, from the first heading of the second level on, stays."""
    before = path.read_text() if path.exists() else ""
    kept = before[before.find("\n## ") :] if "\n## " in before else ""
    path.write_text(text + kept)
