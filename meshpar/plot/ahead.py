"""What is known before a job starts: the memory of a rank over a step, and mappings by time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshpar.dry_run.result import DryRun
from meshpar.dry_run.searching import Mappings
from meshpar.errors import ConfigError
from meshpar.pipeline.schedule import COMPUTE
from meshpar.planner.hardware import GiB
from meshpar.planner.mapping import Mapping
from meshpar.planner.search import Candidate
from meshpar.plot.canvas import INK, PALE, axes_for, bare, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

APART = 0.07
"""Points of a front are named that are so much of the picture's height below the last one that was."""


def memory(found: DryRun, rank: int = 0, *, ax: Axes | None = None) -> Axes:
    """What a rank of the pipeline holds over a step of a dry run: what is always there, and what comes and goes.

    `rank`: of the pipeline. Without a pipeline, the first three microbatches of a step are drawn: the others are like the second.

    Raises ConfigError for a rank that the pipeline does not have.

    >>> ax = memory(mp.dry_run(model, "pp=4,dp=2", config, example=batch), 3)  # doctest: +SKIP
    """
    if not 0 <= rank < len(found.ranks):
        raise ConfigError(f"plot.memory: there is no rank {rank} in a pipeline of {len(found.ranks)}; 0 to {len(found.ranks) - 1}.")
    one = found.ranks[rank]
    events = sorted((e for e in found.timeline() if e.rank == rank and e.kind in COMPUTE), key=lambda e: e.start)
    times, levels, before = [0.0], [one.always], one.always
    for event, (most, after) in zip(events, one.course, strict=True):
        times += [event.start, event.start, event.end, event.end]
        levels += [before, one.always + most, one.always + most, before := one.always + after]
    ax = axes_for(ax, 9.0, 3.0)
    held = [level / GiB for level in levels]
    ax.fill_between(times, held, one.always / GiB, color=colour(1), linewidth=0, label="comes and goes: activations, gradients, buffers")
    ax.fill_between([0, times[-1]], one.always / GiB, 0, color=colour(0), linewidth=0, label="always there: parameters, optimizer, reserve")
    if one.peak > 0.5 * found.limit:
        ax.axhline(found.limit / GiB, color=INK, linestyle="--", linewidth=1, label="usable")
    ax.set_xlim(0, times[-1])
    ax.set_ylim(0, 1.18 * max(one.peak / GiB, found.limit / GiB if one.peak > 0.5 * found.limit else 0))
    ax.set_ylabel("GiB", fontsize=9)
    ax.set_xlabel("seconds of a step", fontsize=9)
    ax.set_title(f"{found.mesh}, pipeline rank {rank}: {one.peak / GiB:.3g} GiB at the fullest", loc="left", fontsize=10)
    ax.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    bare(ax)
    return ax


def frontier(found: Mappings, *, ax: Axes | None = None) -> Axes:
    """Mappings that a search found, by the seconds of a step and the memory of a rank; those that nothing beats in both are joined.

    >>> ax = frontier(mp.search(model, ("h100", 512), global_batch=2048, seq=4096))  # doctest: +SKIP
    """
    every = sorted({(one.seconds, one.memory.total, _words(one.mapping)) for one in _candidates(found)})
    front = pareto(every)
    ax = axes_for(ax, 8.0, 4.4)
    ax.scatter([x for x, _, _ in every], [y / GiB for _, y, _ in every], s=14, color="#9aa4ad", linewidths=0, label="fits")
    xs, ys = [x for x, _, _ in front], [y / GiB for _, y, _ in front]
    ax.plot(xs, ys, color=colour(5), marker="o", markersize=5, linewidth=1.2, label="nothing is better in both")
    for x, y, words in _apart(front, *every):
        ax.annotate(words, (x, y / GiB), xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=INK)
    ax.set_xlabel("seconds of a step", fontsize=9)
    ax.set_ylabel("GiB of a rank", fontsize=9)
    ax.set_facecolor(PALE)
    ax.margins(x=0.12, y=0.1)
    ax.legend(fontsize=8, frameon=False)
    where = found.found.job.cluster
    ax.set_title(f"{where.gpus} x {where.hardware.name}: {len(every)} mappings, {found.found.tried:,} tried", loc="left", fontsize=10)
    bare(ax)
    return ax


def pareto(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those that no other beats in both numbers, by the first.

    >>> pareto([(1.0, 9.0, "a"), (2.0, 9.0, "b"), (3.0, 1.0, "c")])
    [(1.0, 9.0, 'a'), (3.0, 1.0, 'c')]
    """
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _apart(front: list[tuple[float, float, str]], *every: tuple[float, float, str]) -> list[tuple[float, float, str]]:
    """Those whose names do not cover each other."""
    height = max(y for _, y, _ in every) - min(y for _, y, _ in every)
    kept: list[tuple[float, float, str]] = []
    for point in front:
        if not kept or kept[-1][1] - point[1] > APART * height:
            kept.append(point)
    return kept


def _candidates(found: Mappings) -> list[Candidate]:
    return [*found.found.ranked, *found.found.shapes, *(lost.best for lost in found.found.lost if lost.fits)]


def _words(mapping: Mapping) -> str:
    """What of a mapping is not 1, short."""
    return " ".join(word for word in str(mapping).split() if not word.endswith("=1"))
