"""How tensors are divided over a mesh on disk: which rank's file holds which boxes.

The division on disk never limits where a checkpoint can be loaded. Where nothing better is known (no
plan, nothing recorded), the default is:

    pp                 whole tensors, in their order, in contiguous groups of about equal bytes
    ep                 dim 0 of tensors with three or more dims (stacked experts)
    tp                 the first dim not cut yet, of tensors with two or more dims
    dp, dp_shard, cp   dim 0 of what is left, of tensors with two or more dims (ep too, where it has not cut yet)
    dp_replicate       never cuts

Tensors with fewer dims stay whole. What several ranks hold is written once, by one of them chosen from the tensor's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from typing import Any
from zlib import crc32

from meshpar.checkpoint.format.boxes import Box, Cut, Runs, boxes_of, runs_held
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.format.files import ITEMSIZE
from meshpar.errors import ConfigError, near
from meshpar.roles import ROLES, dividing, names, stage_axis
from meshpar.sharding.types import Shard, plain

_MAX_RANKS = 1 << 20


@dataclass(frozen=True, slots=True)
class Grid:
    """The axes of a mesh and their sizes, outermost first.

    >>> Grid.parse("tp=2,pp=2").axes
    (('pp', 2), ('tp', 2))
    """

    axes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read "tp=4,pp=2"; axes are put in the order outermost first."""
        found: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = item.partition("=")
            if axis not in ROLES:
                raise ConfigError(f"Mesh {text!r}: {axis!r} is not a mesh axis ({', '.join(names())}).{near(axis, names())}")
            if not (size.isascii() and size.isdigit()) or int(size) < 1 or axis in found:
                raise ConfigError(f"Mesh {text!r}: expected {axis}=N once, with N of at least 1. Example: tp=4,pp=2.")
            found[axis] = int(size)
        if prod(found.values()) > _MAX_RANKS:
            raise ConfigError(f"Mesh {text!r} has {prod(found.values())} ranks; at most {_MAX_RANKS} are supported.")
        return cls(tuple((axis, found[axis]) for axis in names() if axis in found))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.axes)

    @property
    def size(self) -> int:
        return prod(size for _, size in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at these coordinates (0 on axes that are not named), the last axis running fastest."""
        rank = 0
        for axis, size in self.axes:
            rank = rank * size + coords.get(axis, 0)
        return rank

    def walk(self, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        """All coordinates along some of the axes."""
        sizes = self.sizes
        for index in product(*(range(sizes[a]) for a in axes)):
            yield dict(zip(axes, index, strict=True))


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor is divided: the cuts in the order they apply, and the pipeline stage that holds it."""

    cuts: tuple[Cut, ...] = ()
    stage: int = 0

    def is_cut_by(self, axis: str) -> bool:
        """Whether a mesh axis cuts the tensor."""
        return any(cut.axis == axis for cut in self.cuts)


WHOLE, ONE_RANK = Layout(), Grid()


@dataclass(frozen=True)
class Division:
    """A mesh and the layout of every tensor on it."""

    grid: Grid = ONE_RANK
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def holders(self, name: str, shape: Sequence[int]) -> list[tuple[int, Runs]]:
        """Every rank that writes a part of the tensor, with the runs it holds per dim; each part once."""
        first = self.first(name)
        return [(first + rank, runs) for rank, runs in self._held(self.layouts[name], shape)]

    def parts(self, layout: Layout, shape: Sequence[int]) -> list[tuple[int, tuple[Box, ...]]]:
        """The same of all tensors with this layout and shape: ranks counted from `first(name)`, boxes in the order of the local tensor."""
        return [(rank, boxes_of(runs)) for rank, runs in self._held(layout, shape)]

    def first(self, name: str) -> int:
        """The rank that writes the first part of a tensor."""
        layout = self.layouts[name]
        others = [(axis, size) for axis, size in self.grid.axes if axis != stage_axis() and not layout.is_cut_by(axis)]
        stage = {} if layout.is_cut_by(stage_axis()) else {stage_axis(): layout.stage}
        return self.grid.rank(stage | _spread(name, others))

    def _held(self, layout: Layout, shape: Sequence[int]) -> list[tuple[int, Runs]]:
        out = []
        for coords in self.grid.walk([axis for axis, _ in self.grid.axes if layout.is_cut_by(axis)]):
            runs = runs_held(shape, layout.cuts, self.grid.sizes, coords)
            if all(runs) or not all(shape):
                out.append((self.grid.rank(coords), runs))
        return out if all(shape) else out[:1]


def _spread(name: str, axes: Sequence[tuple[str, int]]) -> dict[str, int]:
    """One of the ranks that hold the same bytes, the same one wherever it is asked, spread over tensors by name."""
    pick = crc32(name.encode())
    out = {}
    for axis, size in axes:
        out[axis] = pick % size
        pick //= size
    return out


def default_division(tensors: Mapping[str, tuple[str, tuple[int, ...]]], grid: Grid) -> Division:
    """Divide `{name: (dtype, shape)}` over a mesh as the module describes."""
    stages = _stages(tensors, grid.sizes.get(stage_axis(), 1))
    return Division(grid, {name: Layout(_default_cuts(shape, grid), stages[name]) for name, (_, shape) in tensors.items()})


def recut(tensors: Mapping[str, tuple[str, tuple[int, ...]]], grid: Grid, known: Mapping[str, Layout]) -> Division:
    """Divide over a mesh, keeping for every axis the way it was recorded to cut a tensor, fused segments included.

    An axis without a record for a tensor does what the default says, unless the record of the tensor would not fit behind it.
    """
    plain_division = default_division(tensors, grid)
    layouts = {}
    for name, (_, shape) in tensors.items():
        recorded = [cut for cut in known[name].cuts if cut.axis in grid.sizes] if name in known else []
        default = plain_division.layouts[name]
        special = [cut for cut in recorded if not cut.shard.is_contiguous or cut.shard.segments[0][1] > 1]
        taken = {cut.shard.dim for cut in special}
        extra = [cut for cut in default.cuts if cut.axis not in {c.axis for c in recorded} and cut.shard.dim not in taken]
        layouts[name] = Layout((*recorded, *extra), default.stage) if recorded else default
        _check(name, shape, layouts[name], grid)
    return Division(grid, layouts)


def _check(name: str, shape: tuple[int, ...], layout: Layout, grid: Grid) -> None:
    for cut in layout.cuts:
        if not 0 <= cut.shard.dim < len(shape):
            raise ImpossibleError(f"{name} {list(shape)}: {cut.axis} should cut dim {cut.shard.dim}, which it does not have.")
    for coords in grid.walk([axis for axis, _ in grid.axes if any(cut.axis == axis for cut in layout.cuts)]):
        try:
            runs_held(shape, layout.cuts, grid.sizes, coords)
        except ImpossibleError as error:
            raise ImpossibleError(f"{name} {list(shape)} cannot be divided over {grid}: {error}") from None
        return


def _default_cuts(shape: tuple[int, ...], grid: Grid) -> tuple[Cut, ...]:
    sizes = {axis: n for axis, n in grid.axes if n > 1}
    if len(shape) < 2:
        return ()
    cuts = []
    stacked = len(shape) > 2
    experts = dividing("experts", sizes) if stacked else ()
    cuts += [Cut(axis, plain(0, shape[0])) for axis in experts]
    cuts += [Cut(axis, plain(len(experts), shape[len(experts)])) for axis in dividing("weights", sizes)]
    shared = [axis for axis in sizes if ROLES[axis].shares_out and axis not in experts]
    cuts += [Cut(axis, plain(0, shape[0])) for axis in sorted(shared, key=lambda axis: ROLES[axis].divides != "experts")]
    return tuple(cuts)


def _stages(tensors: Mapping[str, tuple[str, tuple[int, ...]]], count: int) -> dict[str, int]:
    sizes = {name: prod(shape) * ITEMSIZE[dtype] for name, (dtype, shape) in tensors.items()}
    total, before = max(sum(sizes.values()), 1), 0
    out = {}
    for name, nbytes in sizes.items():
        out[name] = min((2 * before + nbytes) * count // (2 * total), count - 1)
        before += nbytes
    return out


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """The JSON form of a layout, as the manifest and plan files hold it."""
    cuts = [[c.axis, c.shard.dim, c.shard.repeat, [list(s) for s in c.shard.segments]] for c in layout.cuts]
    return {"cuts": cuts, "stage": layout.stage}


def layout_from_json(row: Any, where: str) -> Layout:
    """Read a layout and refuse what cannot be one."""
    cuts, stage = row.get("cuts", []), row.get("stage", 0)
    if type(stage) is not int or not 0 <= stage < _MAX_RANKS or not isinstance(cuts, list) or len(cuts) > 64:
        raise CorruptError(f"{where}: malformed layout.")
    return Layout(tuple(_cut_from_json(cut, where) for cut in cuts), stage)


def _cut_from_json(cut: Any, where: str) -> Cut:
    try:
        axis, dim, repeat, segments = cut
        pairs = tuple((units, size) for units, size in segments)
        numbers = [dim, repeat, *(n for pair in pairs for n in pair)]
    except (TypeError, ValueError):
        raise CorruptError(f"{where}: {str(cut)[:80]} is not [axis, dim, repeat, [[units, size], ...]].") from None
    if axis not in ROLES or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers) or repeat < 1 or repeat * len(pairs) > 1 << 20:
        raise CorruptError(f"{where}: {str(cut)[:80]} is not [axis, dim, repeat, [[units, size], ...]].")
    return Cut(axis, Shard(dim, repeat, pairs))


def division_from_plan(text: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], grid: Grid | None) -> Division:
    """Read a plan file: `{"mesh": "tp=2", "tensors": {"*.qkv.weight": {"cuts": [["tp", 0, 1, [[8, 64], [2, 64]]]], "stage": 0}}}`.

    Names may be patterns; the first that matches counts. An empty segment list means a plain shard. Tensors that match nothing are divided
    by default; a pattern that matches nothing is an error.
    """
    try:
        plan = json.loads(text)
        rows = plan["tensors"]
        patterns = {str(pattern): layout_from_json(row, f"plan, {pattern}") for pattern, row in rows.items()}
        grid = grid or Grid.parse(plan["mesh"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"The plan cannot be read: {error!r}. Expected {{'mesh': 'tp=2', 'tensors': {{pattern: layout}}}}.") from None
    division = default_division(tensors, grid)
    layouts, used = dict(division.layouts), set()
    for name, (_, shape) in tensors.items():
        pattern = next((p for p in patterns if fnmatchcase(name, p)), None)
        if pattern is not None:
            used.add(pattern)
            layouts[name] = _resolve(name, shape, patterns[pattern], grid)
    idle = [p for p in patterns if p not in used]
    if idle:
        raise ImpossibleError(f"The plan's {', '.join(idle)} match no tensor.{near(idle[0], tensors)}")
    return Division(grid, layouts)


def _resolve(name: str, shape: tuple[int, ...], layout: Layout, grid: Grid) -> Layout:
    unknown = [cut.axis for cut in layout.cuts if cut.axis not in grid.sizes]
    if unknown or layout.stage >= grid.sizes.get(stage_axis(), 1):
        raise ImpossibleError(
            f"{name}: the plan uses {', '.join(unknown) or f'stage {layout.stage}'}, which the mesh {grid} does not have."
        )
    if any(not 0 <= cut.shard.dim < len(shape) for cut in layout.cuts):
        raise ImpossibleError(f"{name} {list(shape)}: the plan cuts a dim it does not have.")
    cuts = tuple(c if c.shard.segments else Cut(c.axis, plain(c.shard.dim, shape[c.shard.dim])) for c in layout.cuts)
    layout = Layout(cuts, layout.stage)
    _check(name, shape, layout, grid)
    return layout
