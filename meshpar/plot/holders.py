"""Who holds what: the ranks of a mesh, and the elements of a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from meshpar import roles
from meshpar.errors import ConfigError
from meshpar.mesh import format_mesh, mesh_sizes, parse_mesh
from meshpar.plan import ParameterPlan, Plan
from meshpar.plot.canvas import INK, axes_for, bare, colour, ink_on
from meshpar.sharding.types import Shard, Type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed.device_mesh import DeviceMesh

MOST = 64
"""Rows and columns of a grid that is still drawn."""


def mesh(mesh: DeviceMesh | str | Mapping[str, int], *, experts: bool = False, ax: Axes | None = None) -> Axes:
    """The ranks of a mesh: a table for each pipeline stage, a row for each batch, a column for each rank of `tp`.

    `mesh`: one that exists, or its sizes ("pp=2,dp=2,tp=4"). `experts`: the grid of the expert layers, whose rows hold different experts
    (it needs an axis `ep`). Colours are those of the columns: ranks of one colour hold the same part of a weight.

    Raises ConfigError for `experts` without `ep`, and for a mesh of more than 64 rows or columns.

    >>> ax = mesh("pp=2,dp=2,tp=2")  # doctest: +SKIP
    """
    sizes = dict(parse_mesh(mesh)) if isinstance(mesh, str | Mapping) else mesh_sizes(mesh)
    sizes = {name: int(size) for name, size in sizes.items()}
    names = list(sizes)
    own = roles.dividing("experts", names)
    if experts and not any(sizes[n] > 1 for n in own):
        raise ConfigError(f"plot.mesh(experts=True): {format_mesh(sizes)} has no axis that divides experts. Type for instance 'dp=2,ep=2'.")
    across, stages = roles.dividing("weights", names), roles.dividing("stages", names)
    down = [n for n in names if n not in (*across, *stages)]
    columns, rows, tables = (prod(sizes[n] for n in some) for some in (across, down, stages))
    if max(columns * tables, rows) > MOST:
        raise ConfigError(f"plot.mesh: {format_mesh(sizes)} has {rows} rows and {columns * tables} columns, more than {MOST} can be read.")
    wide = tables * (columns + 0.6)
    ax = axes_for(ax, max(4.2, min(14.0, 1.6 + 0.55 * wide)), min(9.0, 1.3 + 0.4 * rows))
    for rank, place in enumerate(product(*(range(n) for n in sizes.values()))):
        at = dict(zip(names, place))
        column, row, table = (_index(at, sizes, some) for some in (across, down, stages))
        group = _index(at, sizes, own) if experts else column
        _cell(ax, table * (columns + 0.6) + column, row, str(rank), group)
    ax.set_xlim(-0.1, wide - 0.5)
    ax.set_ylim(rows + 0.05, -0.05)
    ax.set_aspect("equal")
    ax.set_yticks([row + 0.5 for row in range(rows)], [_words(row, sizes, down) for row in range(rows)], fontsize=9)
    starts = [table * (columns + 0.6) + columns / 2 for table in range(tables)]
    ax.set_xticks(starts, [f"stage {table}" for table in range(tables)] if tables > 1 else [""], fontsize=9)
    coloured = ("experts", own) if experts else ("a part of each weight", across)
    ax.set_title(f"{format_mesh(sizes)}: {prod(sizes.values())} ranks{_told(*coloured, sizes)}", loc="left", fontsize=10)
    bare(ax)
    return ax


def _index(at: Mapping[str, int], sizes: Mapping[str, int], names: Sequence[str]) -> int:
    index = 0
    for name in names:
        index = index * sizes[name] + at[name]
    return index


def _words(index: int, sizes: Mapping[str, int], names: Sequence[str]) -> str:
    words: list[str] = []
    for name in reversed(names):
        index, own = divmod(index, sizes[name])
        words += [f"{name} {own}"] if sizes[name] > 1 else []
    return "  ".join(reversed(words))


def _told(what: str, names: Sequence[str], sizes: Mapping[str, int]) -> str:
    shown = [name for name in names if sizes[name] > 1]
    return f"\ncolour: {what}, by {', '.join(shown)}" if shown else ""


def _cell(ax: Axes, x: float, y: float, text: str, group: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=colour(group), edgecolor="none"))
    ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=ink_on(group))


# -- parameters ----------------------------------------------------------------------------------------------------------------------------


def parameter(of: Any, name: str, *, ax: Axes | None = None) -> Axes:
    """Which ranks hold which elements of a parameter, as its plan says (before data parallelism shares it out again).

    `of`: a `ParallelModel` or a `Plan`. Dims of the parameter beyond the second are left out unless they are cut. A part is labelled with
    the coordinates that hold it; axes that are not named hold copies.

    Raises ConfigError for a name that the plan does not have.

    >>> ax = parameter(pm, "model.layers.0.mlp.up_proj.weight")  # doctest: +SKIP
    """
    plan: Plan = getattr(of, "plan", of)
    if name not in plan.parameters:
        from difflib import get_close_matches

        near = get_close_matches(name, plan.parameters, n=3, cutoff=0.3)
        raise ConfigError(f"plot.parameter: there is no parameter {name!r}. Nearest: {', '.join(near) or 'none'}.")
    found = plan.parameters[name]
    down, across = _shown(found)
    rows, columns = (found.shape[d] if d is not None else 1 for d in (down, across))
    ax = axes_for(ax, 7.0, max(2.0, min(5.5, 1.4 + 4.0 * rows / max(rows, columns))))
    cutting = [(axis, type_) for axis, type_ in found.placements.items() if isinstance(type_, Shard)]
    sizes = dict(plan.mesh)
    every = list(product(*(range(sizes[axis]) for axis, _ in cutting)))
    for number, place in enumerate(every):
        label = "  ".join(f"{axis} {at}" for (axis, _), at in zip(cutting, place)) or "all ranks"
        holds = [_runs(d, found, cutting, place, sizes) for d in (down, across)]
        for (top, bottom), (left, right) in product(*holds):
            _part(ax, (left, top, right - left, bottom - top), label if (bottom - top) * (right - left) else "", number, (columns, rows))
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_xlabel("" if across is None else f"dim {across}: {columns:,}", fontsize=9)
    ax.set_ylabel("" if down is None else f"dim {down}: {rows:,}", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    whole = [f"{axis} {size}" for axis, size in sizes.items() if size > 1 and axis not in dict(cutting)]
    copies = f"; the same on every rank of {', '.join(whole)}" if whole else ""
    ax.set_title(f"{name} {list(found.shape)}{copies}", loc="left", fontsize=10, color=INK)
    bare(ax)
    return ax


def _shown(found: ParameterPlan) -> tuple[int | None, int | None]:
    """The dims that are drawn downwards and across: those that are cut, then the first ones."""
    cut = [type_.dim for type_ in found.placements.values() if isinstance(type_, Shard)]
    dims = sorted(dict.fromkeys((*cut, *range(len(found.shape)))), key=lambda d: (d not in cut, d))[:2]
    dims.sort()
    if len(dims) == 2:
        return dims[0], dims[1]
    return None, dims[0] if dims else None


def _runs(
    dim: int | None, found: ParameterPlan, cutting: Sequence[tuple[str, Type]], place: Sequence[int], sizes: Mapping[str, int]
) -> list[tuple[int, int]]:
    """The ranges of a dim that the ranks at these coordinates hold: each axis cuts what the ones before it left."""
    held = [(0, 1 if dim is None else found.shape[dim])]
    for (axis, type_), at in zip(cutting, place):
        if isinstance(type_, Shard) and type_.dim == dim:
            held = [part for low, high in type_.ranges(sizes[axis], at) for part in _within(held, low, high)]
    return held


def _within(held: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Elements `low` to `high` of what is held, counted through its ranges."""
    found, start = [], 0
    for first, last in held:
        a, b = max(low, start), min(high, start + last - first)
        if a < b:
            found.append((first + a - start, first + b - start))
        start += last - first
    return found


def _part(ax: Axes, box: tuple[int, int, int, int], label: str, number: int, whole: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour(number), edgecolor="white", linewidth=1.0))
    if label and width > 0.07 * whole[0] and height > 0.05 * whole[1]:
        turned = 90 if width < 0.16 * whole[0] and height > 0.3 * whole[1] else 0
        ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8, color=ink_on(number), rotation=turned)
