"""Stored tensors as columns: those that are divided alike share one description, and only numbers say what differs between them.

    Alike BF16 [64, 78], chunks [0:32, 0:78] and [32:64, 0:78]

      position    file     first byte       crc32
      0           0  1     2768  2768       8f0cbdc2  1b2a55e0      a row for each tensor, a column for each chunk
      1           0  1     7760  7760       5ac2de0f  9f0d7f31
      3           0  1    12752 12752       11a1c7a8  02d94c66

Models have thousands of tensors and few kinds of them, so what is done to a table is done to whole columns. A `Table` is also a mapping of
names to `Stored`: the view of a single tensor, made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np

from meshpar.checkpoint.format.boxes import Box, volume
from meshpar.checkpoint.format.division import WHOLE, Layout
from meshpar.checkpoint.format.files import BLOCK, ITEMSIZE

Ints = np.ndarray[Any, np.dtype[np.int64]]
Crcs = np.ndarray[Any, np.dtype[np.uint32]]
T = TypeVar("T")


class Chunk(NamedTuple):
    """One box of a tensor: the file (an index), its first byte there, and the crc32 of every block of its bytes."""

    box: Box
    file: int
    begin: int
    crcs: tuple[int, ...] = ()


class Stored(NamedTuple):
    """One tensor as it lies on disk. `kind` says what it is: model, optimizer, extra, or rank (one row per rank, never resharded)."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    kind: str = "model"
    layout: Layout = WHOLE

    @property
    def nbytes(self) -> int:
        return volume(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of tensors that are divided alike: a row for each tensor, a column for each box.

    `blocks` says how many checksums are known of each box; they stand in `crcs` one after the other, those of the first box first.
    """

    boxes: tuple[Box, ...]
    file: Ints
    begin: Ints
    blocks: tuple[int, ...]
    crcs: Crcs

    @classmethod
    def of(cls, rows: Sequence[Sequence[Chunk]]) -> Chunks:
        """Columns from rows, which must agree in their boxes and in how many checksums they have."""
        first = rows[0]
        size = len(rows), len(first)
        crcs = np.array([[crc for c in row for crc in c.crcs] for row in rows], np.uint32).reshape(len(rows), -1)
        file, begin = (np.array([[c[field] for c in row] for row in rows], np.int64).reshape(size) for field in (1, 2))
        return cls(tuple(c.box for c in first), file, begin, tuple(len(c.crcs) for c in first), crcs)

    @classmethod
    def blank(cls, boxes: tuple[Box, ...], file: Ints, begin: Ints) -> Chunks:
        """Columns without checksums."""
        return cls(boxes, file, begin, (0,) * len(boxes), np.zeros((len(file), 0), np.uint32))

    def __len__(self) -> int:
        return len(self.file)

    @classmethod
    def beside(cls, parts: Sequence[Chunks]) -> Chunks:
        """The chunks of the same tensors, row for row: the columns of one part after those of the other."""
        if len(parts) == 1:
            return parts[0]
        file, begin, crcs = (np.concatenate(columns, 1) for columns in zip(*((c.file, c.begin, c.crcs) for c in parts), strict=True))
        return cls(sum((c.boxes for c in parts), ()), file, begin, sum((c.blocks for c in parts), ()), crcs)

    @classmethod
    def below(cls, parts: Sequence[Chunks]) -> Chunks:
        """The chunks of different tensors that are divided alike: the rows of one part after those of the other."""
        file, begin, crcs = (np.concatenate(rows) for rows in zip(*((c.file, c.begin, c.crcs) for c in parts), strict=True))
        return cls(parts[0].boxes, file, begin, parts[0].blocks, crcs)

    def nbytes(self, dtype: str) -> Ints:
        """The bytes of each box."""
        return np.array([volume(box.size) * ITEMSIZE[dtype] for box in self.boxes], np.int64)

    def take(self, rows: Ints) -> Chunks:
        """Some of the rows, in the order given."""
        return Chunks(self.boxes, self.file[rows], self.begin[rows], self.blocks, self.crcs[rows])

    def row(self, k: int) -> tuple[Chunk, ...]:
        """The chunks of one tensor."""
        crcs = self.crcs[k].tolist()
        places = zip(self.boxes, self.file[k].tolist(), self.begin[k].tolist(), self.blocks, accumulate(self.blocks), strict=True)
        return tuple([Chunk(box, file, begin, tuple(crcs[end - n : end])) for box, file, begin, n, end in places])


@dataclass(frozen=True, eq=False)
class Alike:
    """Tensors that only differ in their names, in where their bytes lie, and in what these are. `position`: of each, among all names."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    layout: Layout
    position: Ints
    chunks: Chunks

    @property
    def nbytes(self) -> int:
        """The bytes of one of them."""
        return volume(self.shape) * ITEMSIZE[self.dtype]

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many checksums each chunk has, where they are recorded."""
        return tuple(-(-size // BLOCK) for size in self.chunks.nbytes(self.dtype).tolist())

    def with_crcs(self, crcs: Crcs) -> Alike:
        """The same with a checksum for each block of each chunk: a row for each tensor."""
        return replace(self, chunks=replace(self.chunks, blocks=self.blocks, crcs=crcs))

    def stored(self, row: int) -> Stored:
        return Stored(self.dtype, self.shape, self.chunks.row(row), self.kind, self.layout)


class Table(Mapping[str, Stored]):
    """All tensors of a checkpoint, in their order; `groups` hold every one of them once."""

    def __init__(self, names: Sequence[str], groups: Sequence[Alike]) -> None:
        self.names, self.groups = tuple(names), tuple(groups)
        self.group = np.zeros(len(self.names), np.int64)
        self.row = np.zeros(len(self.names), np.int64)
        for k, group in enumerate(self.groups):
            self.group[group.position] = k
            self.row[group.position] = np.arange(len(group.position))
        self._made: dict[str, Stored] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, Stored]) -> Table:
        """Put together what is alike."""
        alike: dict[Any, list[int]] = {}
        stored = list(tensors.values())
        for at, t in enumerate(stored):
            key = t.dtype, t.shape, t.kind, t.layout, tuple([(c.box, len(c.crcs)) for c in t.chunks])
            alike.setdefault(key, []).append(at)
        return cls(tuple(tensors), [_alike([stored[k] for k in rows], rows) for rows in alike.values()])

    @classmethod
    def together(cls, names: Sequence[str], groups: Sequence[Alike]) -> Table:
        """Put together the groups that are alike."""
        alike: dict[Any, list[Alike]] = {}
        for g in groups:
            alike.setdefault((g.dtype, g.shape, g.kind, g.layout, g.chunks.boxes, g.chunks.blocks), []).append(g)
        joined = []
        for parts in alike.values():
            if len(parts) == 1:
                joined += parts
                continue
            position = np.concatenate([g.position for g in parts])
            joined.append(replace(parts[0], position=position, chunks=Chunks.below([g.chunks for g in parts])))
        return cls(names, joined)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The position of each name."""
        return {name: k for k, name in enumerate(self.names)}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(g.nbytes * len(g.position) for g in self.groups)

    def each(self, fact: Callable[[Alike], T]) -> dict[str, T]:
        """What is true of each tensor because of its group, by name."""
        facts = [fact(g) for g in self.groups]
        return dict(zip(self.names, map(facts.__getitem__, self.group.tolist()), strict=True))

    def __getitem__(self, name: str) -> Stored:
        made = self._made.get(name)
        if made is None:
            at = self.index[name]
            made = self._made[name] = self.groups[self.group[at]].stored(int(self.row[at]))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.index


def _alike(stored: Sequence[Stored], position: Sequence[int]) -> Alike:
    t = stored[0]
    return Alike(t.dtype, t.shape, t.kind, t.layout, np.array(position, np.int64), Chunks.of([s.chunks for s in stored]))
