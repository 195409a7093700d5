"""The files of a new checkpoint: which tensors go where in which file, decided before the first byte is written.

One file per rank of the mesh. A rank that holds several boxes of one tensor (a fused projection, cut per segment) puts the second
one under the same name in a companion file `rank-00003_1.safetensors`, and so on, so that torch's `HuggingFaceStorageReader`, which knows
one box per name and file, reads them all. Above `COMPANIONS` boxes they go into the first file as `name#1`, `name#2`, ...: only meshpar
reads those.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np

from meshpar.checkpoint.format.boxes import Box, whole
from meshpar.checkpoint.format.division import WHOLE, Division
from meshpar.checkpoint.format.faults import StorageError
from meshpar.checkpoint.format.files import ITEMSIZE, Disk, build_header
from meshpar.checkpoint.format.handles import Handles
from meshpar.checkpoint.format.manifest import FileRecord
from meshpar.checkpoint.format.table import Alike, Chunks, Ints, Table

COMPANIONS = 8
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its name, its header, its size."""

    name: str
    header: bytes
    size: int

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.name, self.size, len(self.header), crc32(self.header))


@dataclass(frozen=True)
class Sink:
    """All files of a checkpoint, and the tensors as they will lie in them, without checksums."""

    files: tuple[NewFile, ...]
    table: Table

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)


def rank_files(rank: int, boxes: int) -> list[str]:
    """The file of each of the boxes that a rank writes of a tensor."""
    return [f"rank-{rank:05d}{f'_{k}' if k and boxes <= COMPANIONS else ''}.safetensors" for k in range(boxes)]


def rank_suffixes(boxes: int) -> list[str]:
    """What stands behind the tensor's name in a file that holds several of its boxes."""
    return [f"#{k}" if boxes > COMPANIONS else "" for k in range(boxes)]


def rank_sink(tensors: Tensors, division: Division, kinds: Mapping[str, str]) -> Sink:
    """Files per rank, as a division says. Tensors keep their order, wide elements first, so that every tensor is aligned."""
    alike: dict[object, list[int]] = {}
    names, rows = list(tensors), list(tensors.values())
    for at, (name, row) in enumerate(tensors.items()):
        alike.setdefault((row, division.layouts[name], kinds.get(name, "model")), []).append(at)
    divided = [_divided([names[k] for k in group], rows[group[0]][1], division) for group in alike.values()]
    files = sorted({file for used, _, _ in divided for row in used for file in row})
    index = {file: k for k, file in enumerate(files)}
    groups = []
    for group, (used, boxes, _) in zip(alike.values(), divided, strict=True):
        known = {row: [index[file] for file in row] for row in set(used)}
        place = np.array([known[row] for row in used], np.int64).reshape(len(used), len(boxes))
        name, (dtype, shape) = names[group[0]], rows[group[0]]
        chunks = Chunks.blank(boxes, place, np.zeros_like(place))
        groups.append(Alike(dtype, shape, kinds.get(name, "model"), division.layouts[name], np.array(group, np.int64), chunks))
    return pack(files, Table(names, groups), [suffixes for _, _, suffixes in divided], sharded=True)


def _divided(names: Sequence[str], shape: tuple[int, ...], division: Division) -> tuple[list[tuple[str, ...]], tuple[Box, ...], list[str]]:
    """Of tensors with one shape and layout: the files of each one's boxes; the boxes; what stands behind their names there."""
    parts = division.parts(division.layouts[names[0]], shape)
    by_rank: dict[int, tuple[str, ...]] = {}
    files = []
    for name in names:
        first = division.first(name)
        if first not in by_rank:
            by_rank[first] = tuple(chain.from_iterable(rank_files(first + rank, len(boxes)) for rank, boxes in parts))
        files.append(by_rank[first])
    suffixes = list(chain.from_iterable(rank_suffixes(len(boxes)) for _, boxes in parts))
    return files, tuple(chain.from_iterable(boxes for _, boxes in parts)), suffixes


def folder_sink(tensors: Tensors, limit: int) -> Sink:
    """Whole tensors in the files of a Hugging Face folder, each of at most `limit` bytes unless one tensor alone is larger."""
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for at, row in enumerate(tensors.values()):
        alike.setdefault(row, []).append(at)
    groups = []
    for (dtype, shape), rows in alike.items():
        blank = np.zeros((len(rows), 1), np.int64)
        groups.append(Alike(dtype, shape, "model", WHOLE, np.array(rows, np.int64), Chunks.blank((whole(shape),), blank, blank)))
    sizes = np.zeros(len(tensors), np.int64)
    for group in groups:
        sizes[group.position] = group.nbytes
    file = _filled(sizes, limit)
    count = int(file.max(initial=0)) + 1
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = [replace(g, chunks=replace(g.chunks, file=file[g.position][:, None])) for g in groups]
    return pack(names, Table(tuple(tensors), placed), [[""]] * len(groups), sharded=False)


def _filled(sizes: Ints, limit: int) -> Ints:
    """Which of a row of files each size goes into, when each takes as many as its limit allows, and at least one that is not empty."""
    file, total, start = np.zeros(len(sizes), np.int64), np.cumsum(sizes), 0
    while True:
        before = int(total[start - 1]) if start else 0
        first = int(np.searchsorted(total, before, "right"))  # what fills an empty file may be larger than the limit
        start = max(int(np.searchsorted(total, before + limit, "right")), first + 1)
        if start >= len(sizes):
            return file
        file[start:] += 1


def pack(names: Sequence[str], table: Table, suffixes: Sequence[Sequence[str]], *, sharded: bool) -> Sink:
    """Lay the boxes that go into every file one after the other. `suffixes`: of each group, what follows the name of each of its boxes."""
    slots = _Slots.of(table)
    begin, files = np.zeros(len(slots.file), np.int64), []
    columns = [(g.dtype, box) for g in table.groups for box in g.chunks.boxes]
    kinds, behind = [(dtype, box.size) for dtype, box in columns], list(chain.from_iterable(suffixes))
    order = np.lexsort((slots.column, slots.position, -slots.width, slots.file))
    bounds = np.searchsorted(slots.file[order], np.arange(len(names) + 1)).tolist()
    for name, low, high in zip(names, bounds, bounds[1:], strict=False):
        held = order[low:high]
        which = slots.column[held].tolist()
        keys = [table.names[at] + behind[k] for at, k in zip(slots.position[held].tolist(), which, strict=True)]
        metadata = _metadata(keys, [columns[k][1].offset for k in which]) if sharded else {"format": "pt"}
        header, begins, size = build_header(keys, [kinds[k] for k in which], metadata)
        files.append(NewFile(name, header, size))
        begin[held] = begins
    groups, at = [], 0
    for g in table.groups:
        own = begin[at : at + g.chunks.file.size].reshape(g.chunks.file.shape)
        groups.append(replace(g, chunks=replace(g.chunks, begin=own)))
        at += own.size
    return Sink(tuple(files), Table(table.names, groups))


@dataclass(frozen=True)
class _Slots:
    """Every box of every tensor on its way into a file: the file, the tensor, its element's bytes, the box among those of all groups."""

    file: Ints
    position: Ints
    width: Ints
    column: Ints

    @classmethod
    def of(cls, table: Table) -> _Slots:
        rows, base = [], 0
        for g in table.groups:
            count, boxes = g.chunks.file.shape
            columns = np.tile(np.arange(base, base + boxes), count)
            rows.append((g.chunks.file.ravel(), np.repeat(g.position, boxes), np.full(count * boxes, ITEMSIZE[g.dtype]), columns))
            base += boxes
        return cls(*(np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (zip(*rows, strict=True) if rows else ((),) * 4)))


def _metadata(keys: Sequence[str], offsets: Sequence[tuple[int, ...]]) -> dict[str, str]:
    """What torch's reader of sharded safetensors wants to know: where each box lies in its tensor."""
    info = {key: {"saved_offsets": offset} for key, offset in zip(keys, offsets, strict=True)}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info, separators=(",", ":"))}


class Output:
    """The open files of a sink in a directory; headers are written when a file is first touched."""

    def __init__(self, root: Path, files: Sequence[NewFile], disk: Disk) -> None:
        self._root, self._files, self._disk = root, files, disk
        self._begun: set[int] = set()
        self._dirty: set[int] = set()
        self._lock = threading.Lock()
        self._handles = Handles(self._begin)

    @contextmanager
    def use(self, file: int) -> Iterator[int]:
        """A descriptor to write to a file."""
        with self._handles.use(file) as fd:
            try:
                yield fd
            finally:
                with self._lock:
                    self._dirty.add(file)  # only now: another thread may have synced meanwhile

    def name(self, file: int) -> str:
        return str(self._root / self._files[file].name)

    def sync(self) -> None:
        """Put everything written so far on the disk."""
        with self._lock:
            dirty, self._dirty = sorted(self._dirty), set()
        for file in dirty:
            with self._handles.use(file) as fd:
                self._disk.sync(fd)

    def finish(self) -> None:
        """Begin files that nothing was written to, and sync all."""
        for file in range(len(self._files)):
            if file not in self._begun:
                with self.use(file):
                    pass
        self.sync()

    def close(self) -> None:
        self._handles.close()

    def _begin(self, file: int) -> int:
        new = self._files[file]
        fd = self._disk.create(self._root / new.name, new.size)
        if file not in self._begun:
            try:
                self._disk.write(fd, [memoryview(new.header)], 0)
            except BaseException:
                os.close(fd)
                raise
            self._begun.add(file)
        return fd


def check_space(parent: Path, nbytes: int) -> None:
    """Refuse before writing what cannot fit on the disk."""
    info = os.statvfs(parent)
    free = info.f_bavail * info.f_frsize
    if nbytes > free:
        raise StorageError(f"{nbytes:,} bytes are to be written to {parent}, which has {free:,} free.")
