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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from meshpar.checkpoint.boxes import Box, volume, whole
from meshpar.checkpoint.division import Division
from meshpar.checkpoint.faults import StorageError
from meshpar.checkpoint.files import ITEMSIZE, Disk, build_header
from meshpar.checkpoint.manifest import FileRecord
from meshpar.checkpoint.transfer import Piece

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
    """All files of a checkpoint and, per tensor, the pieces it is written as."""

    files: tuple[NewFile, ...]
    pieces: Mapping[str, tuple[Piece, ...]]

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)


class Slot(NamedTuple):
    """A box of a tensor on its way into a file."""

    tensor: str
    key: str
    dtype: str
    box: Box


def rank_slots(rank: int, tensor: str, dtype: str, boxes: Sequence[Box]) -> Iterator[tuple[str, Slot]]:
    """The file name and the slot of every box that a rank writes of a tensor."""
    for k, box in enumerate(boxes):
        inline = len(boxes) > COMPANIONS
        suffix = "" if k == 0 or inline else f"_{k}"
        yield f"rank-{rank:05d}{suffix}.safetensors", Slot(tensor, f"{tensor}#{k}" if inline else tensor, dtype, box)


def rank_sink(tensors: Tensors, division: Division) -> Sink:
    """Files per rank, as a division says. Tensors keep their order, wide elements first, so that every tensor is aligned."""
    groups: dict[str, list[Slot]] = {}
    for name, (dtype, shape) in tensors.items():
        for rank, boxes in division.pieces(name, shape):
            for file, slot in rank_slots(rank, name, dtype, boxes):
                groups.setdefault(file, []).append(slot)
    return pack([(file, groups[file]) for file in sorted(groups)], tensors, sharded=True)


def folder_sink(tensors: Tensors, limit: int) -> Sink:
    """Whole tensors in the files of a Hugging Face folder, each of at most `limit` bytes unless one tensor alone is larger."""
    groups: list[list[Slot]] = [[]]
    filled = 0
    boxes = {shape: whole(shape) for shape in {shape for _, shape in tensors.values()}}  # shared: equal boxes are compared quickly
    for name, (dtype, shape) in tensors.items():
        nbytes = volume(shape) * ITEMSIZE[dtype]
        if filled and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(Slot(name, name, dtype, boxes[shape]))
        filled += nbytes
    count = len(groups)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return pack(list(zip(names, groups, strict=True)), tensors, sharded=False)


def pack(groups: Sequence[tuple[str, list[Slot]]], tensors: Tensors, *, sharded: bool) -> Sink:
    """Lay the slots of every file one after the other."""
    files = []
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for index, (name, slots) in enumerate(groups):
        slots.sort(key=lambda s: -ITEMSIZE[s.dtype])
        header, begins, size = build_header(((s.key, s.dtype, s.box.size) for s in slots), _metadata(slots, sharded))
        files.append(NewFile(name, header, size))
        for slot, begin in zip(slots, begins, strict=True):
            pieces[slot.tensor].append(Piece(slot.box, index, begin))
    return Sink(tuple(files), {name: tuple(rows) for name, rows in pieces.items()})


def _metadata(slots: Sequence[Slot], sharded: bool) -> dict[str, str]:
    """What torch's reader of sharded safetensors wants to know: where each box lies in its tensor."""
    if not sharded:
        return {"format": "pt"}
    info = {s.key: {"saved_offsets": list(s.box.offset)} for s in slots}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info, separators=(",", ":"))}


class Output:
    """The open files of a sink in a directory; headers are written when a file is first touched."""

    def __init__(self, root: Path, files: Sequence[NewFile], disk: Disk, limit: int = 256) -> None:
        self._root, self._files, self._disk, self._limit = root, files, disk, limit
        self._open: dict[int, int] = {}
        self._begun: set[int] = set()
        self._dirty: set[int] = set()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, file: int) -> Iterator[int]:
        """A descriptor to write to a file."""
        with self._lock:
            self._dirty.add(file)
            fd = self._open.get(file)
            keep = fd is not None
            if fd is None:
                fd = self._begin(file)
                keep = len(self._open) < self._limit
                if keep:
                    self._open[file] = fd
        try:
            yield fd
        finally:
            if not keep:
                os.close(fd)

    def name(self, file: int) -> str:
        return str(self._root / self._files[file].name)

    def sync(self) -> None:
        """Put everything written so far on the disk."""
        with self._lock:
            dirty, self._dirty = sorted(self._dirty), set()
            for file in dirty:
                fd = self._open.get(file)
                if fd is not None:
                    self._disk.sync(fd)
                    continue
                fd = self._begin(file)
                self._disk.sync(fd)
                os.close(fd)

    def finish(self) -> None:
        """Begin files that nothing was written to, and sync all."""
        for file in range(len(self._files)):
            if file not in self._begun:
                with self.use(file):
                    pass
        self.sync()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

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
