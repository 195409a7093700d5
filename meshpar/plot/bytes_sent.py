"""What a step sends: bytes by axis and kind, and from rank to rank."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from meshpar import roles
from meshpar.errors import ConfigError
from meshpar.plan import Comm, Plan
from meshpar.plot.canvas import IDLE, INK, axes_for, bare, colour
from meshpar.report.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 64
"""Ranks of a matrix that is still drawn."""


def communication(of: Any, *, ax: Axes | None = None) -> Axes:
    """Bytes that a device sends per microbatch, a bar for each axis and direction, cut by kind of collective.

    `of`: a `ParallelModel` or a `Plan`. What data parallelism reduces once a step is not among them: `pm.explain()` tells it.

    >>> ax = communication(pm)  # doctest: +SKIP
    """
    plan: Plan = getattr(of, "plan", of)
    sent = Counter[tuple[str, str, str]]()
    for one in plan.ledger:
        sent[one.axis, one.phase, one.kind] += int(one.nbytes * one.count)
    bars = sorted({(axis, phase) for axis, phase, _ in sent}, key=lambda bar: ([name for name, _ in plan.mesh].index(bar[0]), bar[1]))
    kinds = list(dict.fromkeys(kind for _, _, kind in sent))
    ax = axes_for(ax, 8.5, 1.5 + 0.38 * max(1, len(bars)))
    left = dict.fromkeys(bars, 0)
    for number, kind in enumerate(kinds):
        widths = [sent[(*bar, kind)] for bar in bars]
        ax.barh(range(len(bars)), widths, left=[left[bar] for bar in bars], color=colour(number), label=kind, height=0.7)
        left = {bar: left[bar] + width for bar, width in zip(bars, widths)}
    for row, bar in enumerate(bars):
        ax.text(left[bar], row, f" {count(left[bar], 'B')}", va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(bars)), [f"{axis} {phase}" for axis, phase in bars], fontsize=9)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.margins(x=0.18)
    ax.set_title(
        "sent by a device per microbatch" if bars else "nothing is sent but the gradients of data parallelism", loc="left", fontsize=11
    )
    if kinds:
        ax.legend(fontsize=8, frameon=False, ncols=min(4, len(kinds)), loc="upper left", bbox_to_anchor=(0, -0.02))
    bare(ax)
    return ax


def traffic(of: Any, *, ax: Axes | None = None) -> Axes:
    """Bytes from rank to rank per microbatch, as a matrix: row sends, column receives.

    All-to-alls are spread over their group, other collectives go to the next rank of a ring, stages send to their neighbours. `of` as for
    `communication`. Raises ConfigError for more than 64 ranks.

    >>> ax = traffic(pm)  # doctest: +SKIP
    """
    plan: Plan = getattr(of, "plan", of)
    ranks = prod(size for _, size in plan.mesh)
    if ranks > MOST:
        raise ConfigError(f"plot.traffic: a matrix of {ranks} ranks cannot be read; up to {MOST} can.")
    sent = _matrix(plan, ranks)
    ax = axes_for(ax, 1.6 + max(2.5, 0.28 * ranks), 1.2 + max(2.5, 0.28 * ranks))
    largest = max((max(row) for row in sent), default=0.0)
    shown = [[value if value else float("nan") for value in row] for row in sent]
    ax.set_facecolor(IDLE)
    ax.imshow(shown, cmap="viridis_r", vmin=0, vmax=largest or 1)
    if ranks <= 8:
        for (row, column), value in (((r, c), sent[r][c]) for r in range(ranks) for c in range(ranks) if sent[r][c]):
            ax.text(
                column, row, count(value, "B"), ha="center", va="center", fontsize=7, color="white" if value > 0.45 * largest else "black"
            )
    ax.set_xticks(range(ranks), [str(r) for r in range(ranks)], fontsize=8)
    ax.set_yticks(range(ranks), [str(r) for r in range(ranks)], fontsize=8)
    ax.set_xlabel("receives", fontsize=9)
    ax.set_ylabel("sends", fontsize=9)
    ax.set_title(f"bytes per microbatch, {count(largest, 'B')} at most", loc="left", fontsize=10)
    bare(ax)
    return ax


def _matrix(plan: Plan, ranks: int) -> list[list[float]]:
    names, sizes = [name for name, _ in plan.mesh], dict(plan.mesh)
    places = list(product(*(range(size) for _, size in plan.mesh)))
    number = {place: rank for rank, place in enumerate(places)}
    sent = [[0.0] * ranks for _ in range(ranks)]
    stage_rank = {index: stage.rank for index, stage in enumerate(plan.stages)}
    staged = roles.dividing("stages", names)
    for one in plan.ledger:
        axis = names.index(one.axis)
        for place in places:
            if any(place[names.index(name)] != stage_rank.get(one.stage, 0) for name in staged):
                continue
            for step, share in _targets(one, sizes[one.axis]):
                to = (*place[:axis], (place[axis] + step) % sizes[one.axis], *place[axis + 1 :])
                sent[number[place]][number[to]] += share * one.nbytes * one.count
    return sent


def _targets(one: Comm, size: int) -> list[tuple[int, float]]:
    """How far along the axis a device sends, and which share of what it sends."""
    if size == 1:
        return []
    if "all_to_all" in one.kind or one.kind in ("dispatch", "combine"):
        return [(step, 1 / (size - 1)) for step in range(1, size)]
    backwards = roles.ROLES[one.axis].divides == "stages" and one.phase == "backward"
    return [(-1 if backwards else 1, 1.0)]
