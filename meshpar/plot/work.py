"""Who computes how much: of a causal square, and of the tokens of a layer of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshpar.errors import ConfigError
from meshpar.plot.canvas import IDLE, INK, axes_for, bare, colour
from meshpar.sharding.types import Shard, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS = 96
"""Rows of the square that are drawn at most."""


def causal_work(length: int, ranks: int, *, balanced: bool = True, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Who computes what of the scores of a causal sequence of `length` positions: rows are queries, columns are keys.

    `balanced`: every rank has a part of the beginning and one of the end (head-tail), else one piece. `window`: a query sees so many keys.
    The title says how much more than the mean the busiest rank has.

    Raises ConfigError for a length that cannot be cut so.

    >>> ax = causal_work(4096, 4)  # doctest: +SKIP
    """
    pieces = 2 * ranks if balanced else ranks
    if length < 1 or ranks < 1 or length % pieces:
        raise ConfigError(f"plot.causal_work: {length} positions cannot be cut into {pieces} equal pieces. Type a multiple of {pieces}.")
    held = layout(length, ranks, balanced=balanced)
    loads = [sum(min(q + 1, window or length) for low, high in held.ranges(ranks, rank) for q in range(low, high)) for rank in range(ranks)]
    owner = {q: rank for rank in range(ranks) for low, high in held.ranges(ranks, rank) for q in range(low, high)}
    ax = axes_for(ax, 4.6, 4.2)
    cells = min(length, CELLS)
    picture = [
        [_shade(int(row * length / cells), int(column * length / cells), owner, window) for column in range(cells)] for row in range(cells)
    ]
    ax.imshow(picture, extent=(0, length, length, 0), interpolation="nearest")
    for rank in range(ranks):
        for low, high in held.ranges(ranks, rank):
            ax.text(-0.02 * length, (low + high) / 2, f"rank {rank}", ha="right", va="center", fontsize=8, color=INK)
    ax.set_xticks([0, length], ["0", f"key {length:,}"], fontsize=8)
    ax.set_yticks([])
    spread = max(loads) / (sum(loads) / ranks)
    name = "head-tail" if balanced else "contiguous"
    ax.set_title(f"{name}{f', window {window:,}' if window else ''}: busiest {spread:.2f} x the mean", loc="left", fontsize=10)
    bare(ax)
    return ax


def layout(length: int, ranks: int, *, balanced: bool) -> Shard:
    """How a sequence is cut: in one piece a rank, or with a piece of each half, the second counted from the end."""
    return Shard(0, 1, ((length // 2, 1), (-(length // 2), 1))) if balanced else plain(0, length)


def _shade(query: int, key: int, owner: dict[int, int], window: int | None) -> tuple[float, float, float]:
    if key > query or (window is not None and key <= query - window):
        return (0.965, 0.973, 0.98)
    return colour(owner[query])


def expert_load(tokens: Sequence[float], *, ranks: int = 1, ax: Axes | None = None) -> Axes:
    """Tokens of every expert as a bar, in the colour of the rank that holds it; the mean as a line.

    `tokens`: for each expert. `ranks`: of the axis that divides them, which must divide their number. The title says how much more than
    the mean the busiest rank has: what all others wait for.

    Raises ConfigError where `ranks` does not divide the number of experts, or there are no tokens.

    >>> ax = expert_load([30, 12, 9, 13], ranks=2)  # doctest: +SKIP
    """
    counts = [float(n) for n in tokens]
    if not counts or len(counts) % ranks or sum(counts) <= 0:
        raise ConfigError(f"plot.expert_load: {len(counts)} experts with {sum(counts):g} tokens on {ranks} ranks; they must divide evenly.")
    each = len(counts) // ranks
    by_rank = [sum(counts[rank * each : (rank + 1) * each]) for rank in range(ranks)]
    ax = axes_for(ax, max(5.0, min(13.0, 1.5 + 0.22 * len(counts))), 3.0)
    ax.bar(range(len(counts)), counts, color=[colour(expert // each) for expert in range(len(counts))], width=0.85)
    ax.axhline(sum(counts) / len(counts), color=INK, linestyle="--", linewidth=1)
    ax.set_xticks([rank * each + (each - 1) / 2 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)], fontsize=9)
    ax.set_ylabel("tokens", fontsize=9)
    ax.grid(axis="y", color=IDLE)
    ax.set_axisbelow(True)
    busiest = max(by_rank) / (sum(by_rank) / ranks)
    ax.set_title(f"{len(counts)} experts on {ranks} ranks: the busiest rank has {busiest:.2f} x the mean", loc="left", fontsize=10)
    bare(ax)
    return ax


def expert_flow(rows: Sequence[Sequence[float]], *, ranks: int, ax: Axes | None = None) -> Axes:
    """What each rank sends to the ranks that hold experts, as a heat map: a line sends, a column receives.

    `rows`: for each rank that routes tokens, how many it sends to each expert (`pm.expert_flow()[name].tolist()`). `ranks`: of the axis
    that divides the experts, which must divide their number. The title says how much more than the mean the fullest column receives.

    Raises ConfigError where `ranks` does not divide the number of experts, and where nothing is sent.

    >>> ax = expert_flow([[3, 1, 0, 4], [2, 2, 2, 2]], ranks=2)  # doctest: +SKIP
    """
    experts = len(rows[0]) if rows else 0
    if not experts or experts % ranks or not any(map(sum, rows)):
        raise ConfigError(f"plot.expert_flow: {experts} experts on {ranks} ranks, {len(rows)} ranks that send; they must divide evenly.")
    each = experts // ranks
    sent = [[sum(row[at * each : (at + 1) * each]) for at in range(ranks)] for row in rows]
    received = [sum(column) for column in zip(*sent)]
    largest = max(map(max, sent))
    ax = axes_for(ax, 1.8 + max(2.6, 0.5 * ranks), 1.3 + max(1.6, 0.42 * len(rows)))
    ax.imshow(sent, cmap="viridis_r", vmin=0, vmax=largest, aspect="auto")
    for line, column in ((line, column) for line in range(len(rows)) for column in range(ranks) if max(len(rows), ranks) <= 16):
        value = sent[line][column]
        ink = "white" if value > 0.45 * largest else "black"
        ax.text(column, line, f"{value:,.0f}", ha="center", va="center", fontsize=8, color=ink)
    held = [f"rank {at}\n{at * each}" + (f" to {at * each + each - 1}" if each > 1 else "") for at in range(ranks)]
    ax.set_xticks(range(ranks), held if ranks <= 16 else ["" for _ in held], fontsize=8)
    ax.set_yticks(range(len(rows)), [f"from {line}" for line in range(len(rows))], fontsize=8)
    ax.set_xlabel("receives, for experts", fontsize=9)
    ax.set_title(
        f"rows of tokens: the fullest rank receives {max(received) * ranks / sum(received):.2f} x the mean", loc="left", fontsize=10
    )
    bare(ax)
    return ax
