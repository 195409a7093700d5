"""Saving from many ranks: each writes files of its own, one of them merges the records and writes the manifest last.

    rank 0                            rank 1 ... n-1
    with writing(target) as partial                                    the directory appears, locked
    write_rank(partial.path, 0, ...)  write_rank(partial.path, r, ...)  every rank: its files, synced, and a record of them
    finish(partial, merge(records))                                    merge, prove, look at the files, manifest, rename

Merging the records refuses whatever two ranks do not agree on: a name with two shapes, a box written twice or never, a value that differs.
Values that should differ are declared: tensors of kind "rank", and `PerRank` values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from meshpar.checkpoint.format import manifest as manifests
from meshpar.checkpoint.format.boxes import Box, Runs, boxes_of, local_shape
from meshpar.checkpoint.format.casts import Array, word
from meshpar.checkpoint.format.division import ONE_RANK, WHOLE, Grid, Layout
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import ITEMSIZE, BlockCrc, Disk
from meshpar.checkpoint.format.manifest import MANIFEST, Asset, FileRecord, Manifest
from meshpar.checkpoint.format.opened import ASSETS
from meshpar.checkpoint.format.partial import Partial, shared_directory
from meshpar.checkpoint.format.sink import NewFile, Sink, pack, rank_files, rank_suffixes
from meshpar.checkpoint.format.table import Alike, Chunks, Table
from meshpar.errors import ConfigError
from meshpar.waiting import each


@dataclass(frozen=True)
class Local:
    """What one rank writes of one tensor: the runs it holds per dim, and a function that gives its local tensor as words.

    The local tensor must have exactly the shape that the runs say; a layout that lies about what a rank holds is found here.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: Runs
    data: Callable[[], Array]
    kind: str = "model"
    layout: Layout = WHOLE

    @property
    def boxes(self) -> tuple[Box, ...]:
        return boxes_of(self.runs)


@dataclass(frozen=True)
class PerRank:
    """A value that each rank has its own of: a random state, a position in the data."""

    value: Any


@dataclass
class Record:
    """What one rank wrote: its files, its part of every tensor, its values."""

    rank: int
    files: tuple[FileRecord, ...]
    tensors: Table
    values: dict[str, Any] = field(default_factory=dict)
    per_rank: dict[str, Any] = field(default_factory=dict)


def rank_tensor(name: str, rank: int, world: int, array: Array, dtype: str) -> Local:
    """A tensor that every rank has its own of, of one shape on all: stored as row `rank` of [world, ...]."""
    runs = ((rank, rank + 1), *((0, n) for n in array.shape))
    return Local(name, dtype, (world, *array.shape), tuple((run,) for run in runs), lambda: array[None].view(word(dtype)), "rank")


def write_rank(
    root: Path,
    rank: int,
    tensors: Iterable[Local],
    values: Mapping[str, Any],
    disk: Disk,
    *,
    checksums: bool = True,
    token: str = "",
) -> Record:
    """Write the files of one rank into a partial directory and sync them. Holds one tensor's local bytes at a time, and a buffer.

    `token`: that of the writer whose directory is meant; into one that another writer has begun meanwhile nothing is written.
    """
    held = list(tensors)
    by_name = {t.name: t for t in held}
    if len(by_name) != len(held):
        twice = sorted({t.name for t in held if sum(o.name == t.name for o in held) > 1})
        raise ConfigError(f"Rank {rank} saves {', '.join(twice[:5])} twice; the parts of one tensor belong into one entry.")
    sink = _sink(rank, held)
    with shared_directory(root, token) as inside:
        handles = [_start(disk, root, new, inside) for new in sink.files]
    out = _Gathered(disk, handles)
    groups = [(g.chunks.boxes, g.chunks.file.tolist(), g.chunks.begin.tolist()) for g in sink.table.groups]
    crcs: list[list[int]] = [[] for _ in groups]  # of each group: its rows come in order
    try:
        for t, group, row in zip(each(held), sink.table.group.tolist(), sink.table.row.tolist(), strict=True):
            boxes, file, begin = groups[group]
            crcs[group] += _write_local(t, boxes, file[row], begin[row], out, rank, checksums)
        out.flush()
        for handle in handles:
            disk.sync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    shared = {k: v for k, v in values.items() if not isinstance(v, PerRank)}
    own = {k: v.value for k, v in values.items() if isinstance(v, PerRank)}
    table = sink.table
    if checksums:
        rows = [np.array(found, np.uint32).reshape(len(g.position), sum(g.blocks)) for g, found in zip(table.groups, crcs, strict=True)]
        table = Table(table.names, [g.with_crcs(found) for g, found in zip(table.groups, rows, strict=True)])
    return Record(rank, tuple(f.record for f in sink.files), table, shared, own)


def _sink(rank: int, held: Sequence[Local]) -> Sink:
    """The files of one rank."""
    alike: dict[object, list[int]] = {}
    for at, t in enumerate(held):
        alike.setdefault((t.dtype, t.shape, t.kind, t.layout, t.runs), []).append(at)
    firsts = [held[rows[0]] for rows in alike.values()]
    names = sorted({file for t in firsts for file in rank_files(rank, len(t.boxes))})
    groups = []
    for t, rows in zip(firsts, alike.values(), strict=True):
        file = np.array([[names.index(file) for file in rank_files(rank, len(t.boxes))]] * len(rows), np.int64)
        chunks = Chunks.blank(t.boxes, file, np.zeros_like(file))
        groups.append(Alike(t.dtype, t.shape, t.kind, t.layout, np.array(rows, np.int64), chunks))
    table = Table([t.name for t in held], groups)
    return pack(names, table, [rank_suffixes(len(g.chunks.boxes)) for g in groups], sharded=True)


def _start(disk: Disk, root: Path, new: NewFile, inside: int) -> int:
    fd = disk.create(root / new.name, new.size, inside=inside)
    disk.write(fd, [memoryview(new.header)], 0)
    return fd


@dataclass
class _Gathered:
    """Writes that lie side by side in a file, done together: small tensors would cost a call each. Holds at most `limit` bytes."""

    disk: Disk
    handles: Sequence[int]
    limit: int = 1 << 20
    _file: int = -1
    _begin: int = 0
    _end: int = 0
    _views: list[memoryview] = field(default_factory=list)

    def write(self, file: int, view: memoryview, begin: int) -> None:
        """Write a view that nobody changes before the next `flush`."""
        if file != self._file or begin != self._end or self._end + len(view) - self._begin > self.limit:
            self.flush()
            self._file, self._begin, self._end = file, begin, begin
        self._views.append(view)
        self._end += len(view)

    def flush(self) -> None:
        if self._views:
            self.disk.write(self.handles[self._file], self._views, self._begin)
            self._views = []


def _write_local(
    t: Local, boxes: Sequence[Box], files: Sequence[int], begins: Sequence[int], out: _Gathered, rank: int, checksums: bool
) -> list[int]:
    """Write the boxes of a local tensor; returns their checksums, one after the other."""
    data = t.data()
    if data.shape != local_shape(t.runs):
        raise CorruptError(
            f"Rank {rank} says it holds {[list(r) for r in t.runs]} of {t.name} {list(t.shape)}, that is {list(local_shape(t.runs))}, "
            f"but its local tensor is {list(data.shape)}."
        )
    if data.dtype.itemsize != ITEMSIZE[t.dtype]:
        raise CorruptError(f"Rank {rank}: {t.name} is {t.dtype}, but its elements have {data.dtype.itemsize} bytes.")
    crcs: list[int] = []
    for box, file, begin in zip(boxes, files, begins, strict=True):
        part = np.ascontiguousarray(data[_local_slices(box, t.runs)])
        view = part.reshape(-1).view(np.uint8).data
        out.write(file, view, begin)
        if checksums:
            running = BlockCrc()
            running.feed(view)
            crcs += running.finish()
    return crcs


def _local_slices(box: Box, runs: Sequence[Sequence[tuple[int, int]]]) -> tuple[slice, ...]:
    """Where a box lies in the local tensor, whose dims are the runs put side by side."""
    out = []
    for start, size, row in zip(box.offset, box.size, runs, strict=True):
        base = 0
        for a, b in row:
            if a <= start < b:
                out.append(slice(base + start - a, base + start - a + size))
                break
            base += b - a
    return tuple(out)


def merge(records: Sequence[Record], grid: Grid = ONE_RANK, *, aliases: Mapping[str, str] | None = None, origin: str = "") -> Manifest:
    """One manifest from the records of all ranks. Raises CorruptError for everything they contradict each other in."""
    ordered = sorted(records, key=lambda r: r.rank)
    files: list[FileRecord] = []
    bases = []
    values: dict[str, Any] = {}
    for record in ordered:
        bases.append(len(files))
        files += record.files
        for key, value in record.values.items():
            values[key] = _agree(values[key], value, key, record.rank) if key in values else value
    per_rank = _per_rank(records)
    manifest = Manifest(
        _merged(ordered, bases),
        tuple(files),
        grid,
        (),
        dict(aliases or {}),
        values | ({"per_rank": per_rank} if per_rank else {}),
        (),
        origin,
    )
    manifests.check(manifest, "saving")
    return manifest


def _merged(records: Sequence[Record], bases: Sequence[int]) -> Table:
    """The tensors of all ranks, each with the chunks of every rank that has some; a rank's files are counted from its base."""
    if len(records) == 1:
        return records[0].tensors
    places: dict[str, list[tuple[int, int, int]]] = {}  # of each tensor: record, group, row
    for k, record in enumerate(records):
        for name, group, row in zip(record.tensors.names, record.tensors.group.tolist(), record.tensors.row.tolist(), strict=True):
            places.setdefault(name, []).append((k, group, row))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for at, found in enumerate(places.values()):
        alike.setdefault(tuple([(k, group) for k, group, _ in found]), []).append(at)
    names, rows, groups = list(places), list(places.values()), []
    for key, position in alike.items():
        parts = [records[k].tensors.groups[group] for k, group in key]
        for (k, _), part in zip(key, parts, strict=True):
            _check_same(names[position[0]], (records[key[0][0]].rank, parts[0]), (records[k].rank, part))
        columns = []
        for at, ((k, _), part) in enumerate(zip(key, parts, strict=True)):
            chunks = part.chunks.take(np.array([rows[p][at][2] for p in position], np.int64))
            columns.append(replace(chunks, file=chunks.file + bases[k]))
        groups.append(replace(parts[0], position=np.array(position, np.int64), chunks=Chunks.beside(columns)))
    return Table.together(names, groups)


def _check_same(name: str, one: tuple[int, Alike], other: tuple[int, Alike]) -> None:
    (rank, a), (late, b) = one, other
    if (a.dtype, a.shape, a.kind) != (b.dtype, b.shape, b.kind):
        raise CorruptError(
            f"{name} is {a.dtype} {list(a.shape)} ({a.kind}) on rank {rank} and {b.dtype} {list(b.shape)} ({b.kind}) "
            f"on rank {late}. Names must be those of the whole model, not of a stage."
        )


def _agree(a: Any, b: Any, key: str, rank: int) -> Any:
    """The union of what two ranks say. Dicts may complete each other (parameter groups by name); anything else must be equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: _agree(a[k], b[k], f"{key}.{k}", rank) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}
    if type(a) is not type(b) or a != b:
        raise CorruptError(
            f"The value {key} is {a!r:.100} on one rank and {b!r:.100} on rank {rank}. If it should differ, declare it PerRank."
        )
    return a


def _per_rank(records: Sequence[Record]) -> dict[str, list[Any]]:
    ordered = sorted(records, key=lambda r: r.rank)
    keys = sorted({k for r in ordered for k in r.per_rank})
    for key in keys:
        lacking = [r.rank for r in ordered if key not in r.per_rank]
        if lacking:
            raise CorruptError(f"The per-rank value {key} is missing on ranks {lacking[:8]}.")
    return {key: [r.per_rank[key] for r in ordered] for key in keys}


def finish(partial: Partial, manifest: Manifest, assets: Mapping[str, bytes] | None = None) -> None:
    """Write the manifest of files that all ranks have synced, and make the directory the checkpoint. `assets`: files to put beside them."""
    _check_files(partial, manifest)
    manifest = replace(manifest, assets=_write_assets(partial, assets or {}))
    partial.disk.write_file(partial.path / MANIFEST, manifests.dump(manifest))
    partial.commit()


def _check_files(partial: Partial, manifest: Manifest) -> None:
    """The files that ranks say they wrote are here, whole: not on a disk of another machine, and nobody removed them."""
    wrong = []
    for file in manifest.files:
        try:
            size = os.stat(partial.path / file.name, follow_symlinks=False).st_size
        except FileNotFoundError:
            size = -1
        if size != file.size:
            wrong.append(f"{file.name} {'is not there' if size < 0 else f'has {size} bytes instead of {file.size}'}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CorruptError(f"{partial.path}: {', '.join(wrong[:5])}{more}. All ranks must see the same directory.")


def _write_assets(partial: Partial, assets: Mapping[str, bytes]) -> tuple[Asset, ...]:
    folder, out = partial.path / ASSETS, []
    if assets:
        partial.disk.mkdir(folder)
    for name, data in assets.items():
        partial.disk.write_file(folder / name, data)
        running = BlockCrc()
        running.feed(memoryview(data))
        out.append(Asset(name, len(data), running.finish()))
    if assets:
        partial.disk.sync_directory(folder)
    return tuple(out)
