"""From one checkpoint to another one on another mesh.

`plan_reshard` (and its siblings in `convert` and `dcp`) read manifests and headers only and return a `Work`; `execution.execute` obeys it.
Nothing is written when a plan is impossible.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from meshpar.checkpoint.convert.execution import How, Progress, Report, execute
from meshpar.checkpoint.convert.work import Work, build
from meshpar.checkpoint.format.casts import FLOATS
from meshpar.checkpoint.format.division import Division, Grid, Layout, default_division, division_from_plan, recut
from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.opened import open_checkpoint
from meshpar.checkpoint.format.partial import check_target
from meshpar.checkpoint.format.sink import rank_sink
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.names import keymap as keymaps
from meshpar.checkpoint.names.keymap import Mapped
from meshpar.checkpoint.names.spaces import Link, Tensors
from meshpar.collection import uncollected


@uncollected()
def reshard(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None = None,
    *,
    plan: Path | str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Divide a checkpoint over another mesh, in bounded memory, without a process group and without the model.

    Without `plan` every tensor is divided the way its layout recorded in the source says, on the new axis sizes, else by the default of
    `meshpar.checkpoint.format.division`. Raises CorruptError, ImpossibleError or StorageError; the target is then not there.

    >>> reshard("step-100", "step-100-tp2", "tp=2,pp=2")                                           # doctest: +SKIP
    """
    how = How(options or Options(), disk or Disk(), resume, dry_run, progress)
    return execute(plan_reshard(source, target, mesh, plan=plan, dtype=dtype, disk=how.disk, resume=resume), how)


def plan_reshard(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None,
    *,
    plan: Path | str | None = None,
    dtype: str | None = None,
    disk: Disk | None = None,
    resume: bool = False,
) -> Work:
    """Decide a reshard without doing it."""
    opened = open_checkpoint(Path(source), disk)
    target = new_target(target, resume)
    m = opened.manifest
    kinds = m.tensors.each(lambda g: g.kind)
    mapped = with_dtype(keymaps.identity(m.tensors.each(lambda g: (g.dtype, g.shape))), kinds, dtype)
    grid = Grid.parse(mesh) if isinstance(mesh, str) else mesh
    division = divide(mapped.tensors, kinds, grid, plan, m.tensors.each(lambda g: g.layout) if opened.form == "meshpar" else {})
    sink = rank_sink(mapped.tensors, division, kinds)
    return build(opened, target, "meshpar", mapped, sink, division, values=m.values, aliases=m.aliases, keymap=m.keymap)


def new_target(target: Path | str, resume: bool) -> Path:
    """The absolute path of a target that does not exist yet; a resumed run may find its own finished work there."""
    path = Path(os.path.abspath(target))
    if not (resume and path.is_dir()):
        check_target(path)
    return path


def divide(tensors: Tensors, kinds: Mapping[str, str], grid: Grid | None, plan: Path | str | None, known: Mapping[str, Layout]) -> Division:
    """The division asked for: a plan file, else what was recorded, else the default. Values per rank are never cut."""
    if plan is not None:
        division = division_from_plan(Path(plan).read_text(), tensors, grid)
    else:
        division = recut(tensors, grid or Grid(), known) if known else default_division(tensors, grid or Grid())
    fixed = {name: Layout((), division.layouts[name].stage) for name in tensors if kinds.get(name) == "rank"}
    return Division(division.grid, {**division.layouts, **fixed})


def with_dtype(mapped: Mapped, kinds: Mapping[str, str], dtype: str | None) -> Mapped:
    """The same tensors with the floating ones of the model (not the optimizer's) in another dtype."""
    if dtype is None:
        return mapped
    tensors = {n: (dtype if kinds.get(n, "model") == "model" and d in FLOATS else d, shape) for n, (d, shape) in mapped.tensors.items()}
    links = tuple(_with_dtype(link, tensors[link.targets[0].tensor][0]) for link in mapped.links)
    return replace(mapped, tensors=tensors, links=links)


def _with_dtype(link: Link, dtype: str) -> Link:
    return link if link.target_dtype == dtype else link._replace(target_dtype=dtype, exact=False)


def single_targets(tensors: Tensors, kinds: Mapping[str, str]) -> Tensors:
    """The tensors of the model itself: what other tools understand."""
    model = {name: row for name, row in tensors.items() if kinds.get(name, "model") == "model"}
    if not model:
        raise ImpossibleError("The checkpoint holds no tensor of a model.")
    return model
