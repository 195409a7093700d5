"""Who computes how much: of a causal square, and of the tokens of a layer of experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from meshpar.errors import ConfigError
from meshpar.plot.canvas import IDLE, INK, axes_for, bare, colour
from meshpar.sharding.extents import dealt_out
from meshpar.sharding.types import Shard, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS = 96
"""Rows of the square that are drawn at most."""
NAMED = 32
"""The most pieces that are named at the side."""
HIDDEN = (0.965, 0.973, 0.98)
"""The colour of keys that a query does not see."""


def causal_work(
    length: int,
    ranks: int,
    *,
    balanced: bool = True,
    chunks: int | None = None,
    window: int | None = None,
    documents: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Who computes what of the scores of a causal sequence of `length` positions: rows are queries, columns are keys.

    `balanced`: every rank has a part of the beginning and one of the end (head-tail), else one piece. `chunks`: so many pieces a rank
    instead, dealt out back and forth, as `ParallelConfig(context_chunks=...)` does: 1, or an even number. `window`: a query sees so many
    keys. `documents`: lengths of the documents that are packed into the sequence; a query sees its own. The title says how much more than
    the mean the busiest rank has.

    Raises ConfigError for a length that cannot be cut so, and for documents of another length in all.

    >>> ax = causal_work(4096, 4)  # doctest: +SKIP
    >>> ax = causal_work(4096, 4, chunks=16, documents=[1000, 3000, 96])  # doctest: +SKIP
    """
    each = (2 if balanced else 1) if chunks is None else chunks
    if each < 1 or (each > 1 and each % 2):
        raise ConfigError(f"plot.causal_work: chunks={each}, but a rank has one piece, or an even number. Type chunks={max(2, each + 1)}.")
    pieces = each * ranks
    if length < 1 or ranks < 1 or length % pieces:
        raise ConfigError(f"plot.causal_work: {length} positions cannot be cut into {pieces} equal pieces. Type a multiple of {pieces}.")
    held = Shard(0, 1, dealt_out(length, each)) if each > 1 else plain(0, length)
    first = _first_keys(length, window, documents)
    owner = {q: rank for rank in range(ranks) for low, high in held.ranges(ranks, rank) for q in range(low, high)}
    loads = [0] * ranks
    for query, rank in owner.items():
        loads[rank] += query + 1 - first[query]
    ax = axes_for(ax, 4.6, 4.2)
    cells = [int(cell * length / min(length, CELLS)) for cell in range(min(length, CELLS))]
    picture = [[colour(owner[query]) if first[query] <= key <= query else HIDDEN for key in cells] for query in cells]
    ax.imshow(picture, extent=(0, length, length, 0), interpolation="nearest")
    if pieces <= NAMED:
        for rank in range(ranks):
            for low, high in held.ranges(ranks, rank):
                ax.text(-0.02 * length, (low + high) / 2, f"rank {rank}", ha="right", va="center", fontsize=8, color=INK)
    ax.set_xticks([0, length], ["0", f"key {length:,}"], fontsize=8)
    ax.set_yticks([])
    spread = max(loads) / (sum(loads) / ranks)
    name = {1: "contiguous", 2: "head-tail"}.get(each, f"{each} pieces a rank")
    packed = "" if documents is None else f", {len(documents)} documents"
    narrow = f", window {window:,}" if window else ""
    ax.set_title(f"{name}{packed}{narrow}: busiest {spread:.2f} x the mean", loc="left", fontsize=10)
    bare(ax)
    return ax


def _first_keys(length: int, window: int | None, documents: Sequence[int] | None) -> list[int]:
    """For every query the first key it sees."""
    lengths = [length] if documents is None else list(documents)
    if sum(lengths) != length or min(lengths) < 1:
        raise ConfigError(f"plot.causal_work: documents of {sum(lengths)} positions in all, but the sequence has {length}.")
    begins = [begin for begin, held in zip(accumulate(lengths, initial=0), lengths) for _ in range(held)]
    return [max(begin, query + 1 - (window or length)) for query, begin in enumerate(begins)]


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
