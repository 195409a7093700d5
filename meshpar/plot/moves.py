"""What a collective moves: what every rank holds before and after, and the bytes that a rank sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshpar.errors import ConfigError
from meshpar.plot.canvas import INK, axes_for, bare, colour, ink_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Blocks = tuple[tuple[int, ...], ...]
"""For each block of a value, the ranks whose values it is the sum of; () for a block that a rank does not hold."""


@dataclass(frozen=True)
class _Move:
    """What rank `r` of `n` holds of a value of `n` blocks, before and after, and the share of the value's bytes that it sends."""

    before: Callable[[int, int], Blocks]
    after: Callable[[int, int], Blocks]
    sends: str
    share: Callable[[int], float]


def _all(r: int, n: int) -> Blocks:
    return tuple((r,) for _ in range(n))


def _own(r: int, n: int) -> Blocks:
    return tuple((r,) if block == r else () for block in range(n))


def _sum(r: int, n: int) -> Blocks:
    return tuple(tuple(range(n)) for _ in range(n))


MOVES = {
    "all_gather": _Move(_own, lambda r, n: tuple((block,) for block in range(n)), "(n - 1) / n", lambda n: (n - 1) / n),
    "reduce_scatter": _Move(
        _all, lambda r, n: tuple(tuple(range(n)) if block == r else () for block in range(n)), "(n - 1) / n", lambda n: (n - 1) / n
    ),
    "all_reduce": _Move(_all, _sum, "2 (n - 1) / n", lambda n: 2 * (n - 1) / n),
    "all_to_all": _Move(_all, lambda r, n: tuple((block,) for block in range(n)), "(n - 1) / n", lambda n: (n - 1) / n),
    "broadcast": _Move(
        lambda r, n: tuple((0,) if r == 0 else () for _ in range(n)), lambda r, n: tuple((0,) for _ in range(n)), "", lambda n: 1.0
    ),
    "send": _Move(lambda r, n: tuple((r,) for _ in range(n)), lambda r, n: tuple((max(r - 1, 0),) for _ in range(n)), "", lambda n: 1.0),
}


def collective(kind: str, ranks: int = 4, *, nbytes: int | None = None, ax: Axes | None = None) -> Axes:
    """What each of `ranks` ranks holds before and after a collective of `kind`; a block's colour is the rank whose values it holds.

    `kind`: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast" or "send" (each rank to the next). Blocks that are sums
    show the colours of all that entered. `nbytes`: of the whole value; then the title says how many a rank sends, by the ring formula.

    Raises ConfigError for another kind, and for fewer than 2 or more than 8 ranks.

    >>> ax = collective("reduce_scatter", 4)  # doctest: +SKIP
    """
    if kind not in MOVES:
        raise ConfigError(f"plot.collective: {kind!r} is none of {', '.join(MOVES)}.")
    if not 2 <= ranks <= 8:
        raise ConfigError(f"plot.collective: {ranks} ranks cannot be drawn; 2 to 8 can.")
    move = MOVES[kind]
    ax = axes_for(ax, 2.2 + 1.15 * ranks, 0.9 + 0.42 * ranks)
    for side, held in enumerate((move.before, move.after)):
        for rank in range(ranks):
            for block, sources in enumerate(held(rank, ranks)):
                _block(ax, side * (ranks + 1.6) + block, rank, sources)
    ax.annotate("", (ranks + 1.25, ranks / 2), (ranks + 0.35, ranks / 2), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.5})
    ax.set_xlim(-0.1, 2 * ranks + 1.7)
    ax.set_ylim(ranks + 0.05, -0.05)
    ax.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)], fontsize=9)
    ax.set_xticks([ranks / 2, 1.5 * ranks + 1.6], ["before", "after"], fontsize=9)
    sent = "" if nbytes is None else f" = {nbytes * move.share(ranks):,.0f} bytes"
    share = f"{move.sends} of the value" if move.sends else "the value"
    ax.set_title(f"{kind}: {'each rank' if kind != 'broadcast' else 'the first rank'} sends {share}{sent}", loc="left", fontsize=11)
    bare(ax)
    return ax


def _block(ax: Axes, x: float, y: float, sources: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    box = x + 0.04, y + 0.08
    if not sources:
        ax.add_patch(Rectangle(box, 0.92, 0.84, facecolor="none", edgecolor="#c4cbd2", linewidth=0.8, linestyle=":"))
        return
    for at, source in enumerate(sources):
        part = 0.92 / len(sources)
        ax.add_patch(Rectangle((box[0] + at * part, box[1]), part, 0.84, facecolor=colour(source), edgecolor="none"))
    one = len(sources) == 1
    ax.text(
        x + 0.5,
        y + 0.5,
        str(sources[0]) if one else "sum",
        ha="center",
        va="center",
        fontsize=8,
        color=ink_on(sources[0]) if one else "white",
    )
