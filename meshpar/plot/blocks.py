"""A block of the model as a graph: what a rank runs, the type of every value on one axis, and the collectives between them.

Views are left out, and calls in a row that treat elements by themselves are one box, so that a transformer layer fits on a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import fx

from meshpar import roles
from meshpar.errors import ConfigError
from meshpar.graph.facts import facts
from meshpar.graph.op import op_name
from meshpar.graph.operators import operator_of
from meshpar.plot.canvas import INK, axes_for, bare, colour
from meshpar.sharding.conversions import conversion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLAIN, _PRODUCT, _MOVES = "#e6eaed", "#cfe2f0", "#f7d9a8"
"""Boxes that compute, that multiply matrices or attend, and that send."""
_HEAVY = ("product", "attention", "convolution", "experts")


@dataclass
class _Box:
    """One box: its lines, what it is fed (box or None for what comes from outside, and the type on the way), and what it gives."""

    lines: list[str]
    fed: list[tuple[_Box | None, str]]
    gives: str
    fill: str
    readers: int = 0
    row: int = 0
    column: float = 0.0

    @property
    def mergeable(self) -> bool:
        return self.fill == _PLAIN


@dataclass
class _Reading:
    """A block while it is read: the boxes so far, and for every node the box that its value comes from."""

    region: str
    axis: str
    boxes: list[_Box] = field(default_factory=list)
    made: dict[fx.Node, _Box | None] = field(default_factory=dict)
    parameters: dict[fx.Node, str] = field(default_factory=dict)


def block(pm: Any, name: str, *, axis: str | None = None, ax: Axes | None = None) -> Axes:
    """The block `name` ("layers.0") of a parallel model, top to bottom, with the type of every value on one `axis` of the mesh.

    Letters are those of the type system: I and R whole, S(dim) a slice, P a pending sum. A box that sends names what it does forward and
    backward. `axis`: by default the one that divides weights, else the last.

    Raises ConfigError for a block or an axis that is not there, naming those that are.

    >>> ax = block(pm, "model.layers.0", axis="tp")  # doctest: +SKIP
    """
    sizes = {one: size for one, size in pm.plan.mesh if pm.plan.axis(one) is not None}
    chosen = _chosen(axis, sizes)
    nodes = [node for node in pm.lowered_graph.nodes if node.op in ("call_function", "get_attr")]
    regions = list(dict.fromkeys(str(facts(node).region) for node in nodes if facts(node).region is not None))
    if name not in regions:
        near = get_close_matches(name, regions, n=3, cutoff=0.3) or regions[:3]
        raise ConfigError(f"plot.block: there is no block {name!r}. Nearest: {', '.join(near) or 'none: the model has no blocks'}.")
    boxes = _boxes(nodes, name, chosen)
    return _draw(boxes, f"{name}, types on {chosen}={sizes[chosen]}", ax)


def _chosen(axis: str | None, sizes: Mapping[str, int]) -> str:
    if axis is not None and axis not in sizes:
        raise ConfigError(f"plot.block: there is no typed axis {axis!r} on this mesh; {', '.join(sizes) or 'it has none'}.")
    if not sizes:
        raise ConfigError("plot.block: this mesh has no axis on which values have types.")
    return axis or next(iter(roles.dividing("weights", list(sizes))), list(sizes)[-1])


# -- reading -------------------------------------------------------------------------------------------------------------------------------


def _boxes(nodes: Sequence[fx.Node], region: str, axis: str) -> list[_Box]:
    reading = _Reading(region, axis)
    for node in nodes:
        _read(node, reading)
    return _merged(reading.boxes)


def _read(node: fx.Node, reading: _Reading) -> None:
    """Note whose value a node has: a parameter's, its operand's (views, and what changes nothing on the way), or that of a new box."""
    operands = [one for one in node.all_input_nodes if one.op != "placeholder"]
    if node.op == "get_attr":
        reading.parameters[node] = str(node.target)
    elif operands and all(one in reading.parameters for one in operands) and (facts(node).conversion or not _computes(node)):
        reading.parameters[node] = reading.parameters[_picked(node, operands)]
    elif facts(node).region != reading.region:
        reading.made[node] = None
    elif not _computes(node) and operands:
        reading.made[node] = reading.made.get(operands[0])
    else:
        _add(node, operands, reading)


def _picked(node: fx.Node, operands: Sequence[fx.Node]) -> fx.Node:
    """Of several parameters that were converted together, the one that an item is."""
    source = operands[0]
    if len(node.args) == 2 and isinstance(node.args[1], int) and len(source.all_input_nodes) > 1:
        return source.all_input_nodes[node.args[1]]
    return source


def _computes(node: fx.Node) -> bool:
    """Whether it is worth a box: it sends something, or computes."""
    change = facts(node).conversion
    if change is not None:
        return _sends(node) != ""
    if facts(node).joined or op_name(node.target) in ("getitem", "i_to_r_many"):
        return False
    return not operator_of(node.target).view and operator_of(node.target).kind != "created"


def _sends(node: fx.Node) -> str:
    """What a conversion does forward and backward, in words; empty where it sends nothing."""
    change = facts(node).conversion
    found = None if change is None else conversion(change.before, change.after)
    if found is None or (found.forward is None and found.backward is None):
        return ""
    words = (kind.replace("_", "-") if kind else "nothing" for kind in (found.forward, found.backward))
    return " / ".join(words)


def _add(node: fx.Node, operands: Sequence[fx.Node], reading: _Reading) -> None:
    moved = _sends(node)
    held = [line for one in operands if one in reading.parameters for line in _told(one, reading)]
    if moved:
        change = facts(node).conversion
        assert change is not None
        lines = [f"{moved}" + (f"  over {change.axis}" if change.axis != reading.axis else "")]
    else:
        given = [f"given: {_type(one, reading.axis)}" for one in operands if _constant(one, reading)]
        lines = [op_name(node.target).removeprefix("meshpar."), *held, *given]
    fill = _MOVES if moved else _PRODUCT if operator_of(node.target).kind in _HEAVY else _PLAIN
    inputs = dict.fromkeys(one for one in operands if one not in reading.parameters and not _constant(one, reading))
    fed = list(dict.fromkeys((id(reading.made.get(one)), _type(one, reading.axis)) for one in inputs))
    by_id = {id(reading.made.get(one)): reading.made.get(one) for one in inputs}
    box = _Box(lines, [(by_id[key], type_) for key, type_ in fed], _type(node, reading.axis), fill)
    reading.boxes.append(box)
    reading.made[node] = box


def _told(node: fx.Node, reading: _Reading) -> Iterator[str]:
    """What is said of a parameter at its use: a matrix, and anything of which the gradient is summed on the way."""
    info, sent = facts(node).info, _sends(node)
    if len(getattr(info, "shape", ())) > 1 or sent:
        also = f" ({sent.replace('nothing / ', 'back: ')})" if sent else ""
        yield f"{_short(reading.parameters[node], reading.region)}: {_type(node, reading.axis)}{also}"


def _constant(node: fx.Node, reading: _Reading) -> bool:
    """Whether an operand comes from outside of the block and has no gradient: a mask, a table of positions."""
    return node not in reading.parameters and reading.made.get(node) is None and not getattr(facts(node).info, "requires_grad", True)


def _short(name: str, region: str) -> str:
    return name.removeprefix(f"{region}.").removesuffix(".weight")


def _type(node: fx.Node, axis: str) -> str:
    part = facts(node).part_of
    for name, _, types in part.typed if part is not None else ():
        if name == axis:
            found = types[min(part.index, len(types) - 1)] if part is not None else types[0]
            return str(found) if len(str(found)) < 8 else f"S({getattr(found, 'dim', '')}*)"
    return ""


def _merged(boxes: Sequence[_Box]) -> list[_Box]:
    """Boxes of calls in a row that only compute element by element, as one."""
    for box in boxes:
        for source, _ in box.fed:
            if source is not None:
                source.readers += 1
    into: dict[int, _Box] = {}
    kept: list[_Box] = []
    for box in boxes:
        box.fed = [(None if source is None else into.get(id(source), source), type_) for source, type_ in box.fed]
        (first, type_) = box.fed[0] if len(box.fed) == 1 else (None, "")
        if first is not None and box.mergeable and first.mergeable and first.readers == 1 and type_ == box.gives == first.gives:
            first.lines[0] += f", {box.lines[0]}"
            first.lines += box.lines[1:]
            first.readers = box.readers
            into[id(box)] = first
        else:
            kept.append(box)
    return kept


# -- drawing -------------------------------------------------------------------------------------------------------------------------------


def _place(boxes: Sequence[_Box]) -> int:
    """A row below all that a box is fed, and a column among those of the row; the number of columns."""
    rows: dict[int, list[_Box]] = {}
    for box in boxes:
        box.row = 1 + max((source.row for source, _ in box.fed if source is not None), default=0)
        rows.setdefault(box.row, []).append(box)
    for some in rows.values():
        for at, box in enumerate(some):
            box.column = at - (len(some) - 1) / 2
    return max(map(len, rows.values()), default=1)


def _draw(boxes: Sequence[_Box], title: str, ax: Axes | None) -> Axes:
    columns = _place(boxes)
    last = max(box.row for box in boxes)
    ax = axes_for(ax, 2.4 + 2.2 * columns, 0.8 + 0.58 * (last + 1))
    ax.text(0, 0, "from the block before", ha="center", va="center", fontsize=9, color=INK)
    for box in boxes:
        _box(ax, box)
    for box in boxes:
        for source, type_ in box.fed:
            _edge(ax, source, box, type_)
    ends = [box for box in boxes if not box.readers]
    for box in ends:
        ax.annotate(box.gives, (box.column, last + 0.85), (box.column, box.row + 0.32), ha="center", fontsize=8, arrowprops=_ARROW)
    ax.set_xlim(-columns / 2 - 0.75, columns / 2 + 0.75)
    ax.set_ylim(last + 1.0, -0.4)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, loc="left", fontsize=10)
    bare(ax)
    return ax


_ARROW = {"arrowstyle": "-|>", "color": INK, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}


def _box(ax: Axes, box: _Box) -> None:
    text = "\n".join(_wrapped(box.lines))
    style = {"boxstyle": "round,pad=0.32", "facecolor": box.fill, "edgecolor": "#9aa4ad", "linewidth": 0.7}
    ax.text(box.column, box.row, text, ha="center", va="center", fontsize=7.5, color=INK, bbox=style, linespacing=1.05, zorder=3)


def _wrapped(lines: Sequence[str], width: int = 34) -> Iterator[str]:
    for line in lines:
        yield line if len(line) <= width else f"{line[: width - 4]} ..."


def _edge(ax: Axes, source: _Box | None, box: _Box, type_: str) -> None:
    """A line from box to box; one that passes others goes round them, in a lane of its own."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    x0, y0 = (0.0, 0.2) if source is None else (source.column, source.row + 0.3)
    x1, y1 = box.column, box.row - 0.3
    if y1 - y0 < 1:
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=_ARROW, zorder=1)
        ax.text((x0 + x1) / 2 + 0.05, (y0 + y1) / 2, type_, ha="left", va="center", fontsize=7.5, color=INK, zorder=4)
        return
    lane = min(x0, x1) - min(0.85, 0.36 + 0.05 * (y1 - y0)) if x0 + x1 <= 0 else max(x0, x1) + min(0.85, 0.36 + 0.05 * (y1 - y0))
    points = [(x0, y0), (lane, y0 + 0.1), (lane, y0 + 0.6), (lane, y1 - 0.6), (lane, y1 - 0.2), (x1, y1)]
    path = Path(points, [Path.MOVETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3])
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", color=colour(5), linewidth=0.9, mutation_scale=9, zorder=1))
    ax.text(lane, (y0 + y1) / 2, f" {type_}", ha="left", va="center", fontsize=7.5, color=colour(5), zorder=4)
