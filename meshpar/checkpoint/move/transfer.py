"""What to move: transfers of tensors that are divided alike on either side, as columns, and how they may be moved.

    Transfers BF16 [64, 78]                      sources                       targets
                                       [0:32, 0:78]  [32:64, 0:78]           [0:64, 0:78]
      layers.0.weight                  file 0, 2768    file 1, 2768          file 0, 1536      a row for each tensor,
      layers.1.weight                  file 0, 7760    file 1, 7760          file 0, 11520     a column for each piece

How the pieces meet is the same in every row, and worked out once (`recipes`). `Transfer` is the view of one row, for what is moved alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from meshpar.checkpoint.format.boxes import volume
from meshpar.checkpoint.format.casts import Array
from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.format.files import BLOCK, ITEMSIZE
from meshpar.checkpoint.format.table import Chunk, Chunks, Ints
from meshpar.checkpoint.move.recipes import Recipe, recipe

ZERO = -1  # the file of a piece that is all zeros: read from nowhere, checked and dropped when it is a target
SLAB = 512 << 10  # larger writes make the system look for larger pages: at 4 GB that costs more than the calls they save
MIN_MEMORY = 1 << 20

Piece = Chunk  # a box whose bytes lie row-major in a file, in the space of a transfer instead of that of a tensor


@dataclass(frozen=True, slots=True)
class Rearrange:
    """A change of order: split the dims into factors, transpose them, merge them again. Shapes in elements."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def apply(self, array: Array) -> Array:
        return np.ascontiguousarray(array.reshape(self.split).transpose(self.order)).reshape(self.shape)

    def keeps_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether dim 0 of a tensor of this shape stays in front, whole."""
        return bool(shape) and bool(self.shape) and self.order[0] == 0 and self.split[0] == shape[0] == self.shape[0]

    def of_rows(self, rows: int) -> Rearrange:
        """The same for some of the rows, where it keeps them."""
        return Rearrange((rows, *self.split[1:]), self.order, (rows, *self.shape[1:]))


class Transfer(NamedTuple):
    """One tensor to move. Sources tile `shape`; targets tile it too, or the rearranged shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]
    target_dtype: str
    rearrange: Rearrange | None = None
    exact: bool = False  # a cast must not change any value


@dataclass(frozen=True, eq=False)
class Transfers:
    """Tensors to move that are divided alike: a row of `sources` and `targets` for each name."""

    names: Sequence[str]
    dtype: str
    shape: tuple[int, ...]
    sources: Chunks
    targets: Chunks
    target_dtype: str
    rearrange: Rearrange | None = None
    exact: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def one(self, row: int) -> Transfer:
        """A single one of them."""
        sources, targets = self.sources.row(row), self.targets.row(row)
        return Transfer(self.names[row], self.dtype, self.shape, sources, targets, self.target_dtype, self.rearrange, self.exact)

    @cached_property
    def itemsize(self) -> int:
        """Bytes of an element, on the side where it has more."""
        return max(ITEMSIZE[self.dtype], ITEMSIZE[self.target_dtype])

    @cached_property
    def nbytes(self) -> int:
        """The bytes of one of them, on the side where it has more."""
        return volume(self.shape) * self.itemsize

    @cached_property
    def room(self) -> int:
        """The bytes of a buffer that one of them may need: every stretch up to 15 more than it has, for alignment."""
        return self.nbytes + 16 * (len(self.sources.boxes) + len(self.targets.boxes))

    @cached_property
    def recipe(self) -> Recipe:
        """How the pieces of the two sides meet."""
        return recipe(self.sources.boxes, self.targets.boxes, ITEMSIZE[self.dtype])

    @cached_property
    def has_zeros(self) -> bool:
        """Whether a piece on either side is only zeros."""
        return bool((self.sources.file == ZERO).any() or (self.targets.file == ZERO).any())

    @cached_property
    def target_blocks(self) -> tuple[int, ...]:
        """How many checksums each target has."""
        sizes = self.targets.nbytes(self.target_dtype).tolist()
        is_zero = (self.targets.file == ZERO).any(axis=0).tolist()
        return tuple(0 if zero else -(-size // BLOCK) for size, zero in zip(sizes, is_zero, strict=True))

    @cached_property
    def keeps_rows(self) -> bool:
        return self.rearrange is not None and self.rearrange.keeps_rows(self.shape)

    @property
    def step_bytes(self) -> int:
        """The bytes that rearranging needs at once: a row where dim 0 stays in front, else the whole tensor."""
        return self.nbytes // max(self.shape[0], 1) if self.keeps_rows else self.nbytes


@dataclass(frozen=True)
class Order:
    """Which transfers to move, one after the other: the group of each, and its row there."""

    group: Ints
    row: Ints

    @classmethod
    def of(cls, groups: Sequence[Transfers]) -> Order:
        """All of them, as their first sources lie in the files."""
        none = np.zeros(0, np.int64)
        group = np.concatenate([none, *(np.full(len(t), k, np.int64) for k, t in enumerate(groups))])
        row = np.concatenate([none, *(np.arange(len(t), dtype=np.int64) for t in groups)])
        file, begin = (
            np.concatenate([none, *(c[:, 0] if c.shape[1] else np.zeros(len(c), np.int64) for c in columns)])
            for columns in ([t.sources.file for t in groups], [t.sources.begin for t in groups])
        )
        order = np.lexsort((begin, file))
        return cls(group[order], row[order])

    def __len__(self) -> int:
        return len(self.group)

    def take(self, which: Ints | Array) -> Order:
        return Order(self.group[which], self.row[which])


@dataclass(frozen=True)
class Options:
    """How to move: bytes of memory, threads, whether source checksums are verified and target ones computed."""

    memory: int = 256 << 20
    workers: int = 1
    verify: bool = True
    checksums: bool = True
    source_block: int = BLOCK
    slab: int = SLAB
    smallest: int = 1 << 16

    @property
    def buffer(self) -> int:
        """Bytes of each of the two buffers of a worker."""
        return max(min(self.slab, self.memory // (4 * self.workers)), self.smallest)

    @property
    def spare(self) -> int:
        """Bytes for tensors that must be rearranged in memory."""
        return self.memory - 2 * self.workers * self.buffer


def check_memory(transfers: Sequence[Transfers], options: Options) -> None:
    """Refuse before any I/O what could only be done with more memory."""
    if options.memory < MIN_MEMORY:
        raise ImpossibleError(f"--max-memory is {options.memory} bytes; at least {MIN_MEMORY} are needed.")
    for t in [t for t in transfers if t.rearrange is not None]:
        step = 3 * t.step_bytes
        if step > options.spare:
            need = min(2 * step, step + 2 * options.workers * options.slab)  # the buffers take half of it, or less
            raise ImpossibleError(
                f"{t.names[0]} {list(t.shape)} must be transposed in memory: --max-memory {-(-need >> 20)}MiB or more would do."
            )
