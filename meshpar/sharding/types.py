"""The types a value can have on one mesh axis: invariant, replicate, shard, partial, and ragged for the rows of experts.

| type      | value on the ranks of the axis | its gradient            |
|-----------|--------------------------------|-------------------------|
| Invariant | the same                       | the same                |
| Replicate | the same                       | partial (a pending sum) |
| Shard     | a slice of one dim             | the same slice          |
| Partial   | a pending sum                  | the same                |
| Ragged    | the rows of the rank's experts | the same rows           |
| Owned     | the value, on one rank only    | on that rank only       |

A value that needs no gradient is never `Replicate`: there `Invariant` says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Invariant:
    """The same value on every rank, and the same gradient."""

    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True, slots=True)
class Replicate:
    """The same value on every rank; its gradient is a pending sum."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Partial:
    """A pending sum over the ranks; its gradient is the same on every rank."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows sorted by expert, of which each rank holds those of its own experts: how many is known when the program runs.

    Only what treats every row alike works on it, and only the expert all-to-all makes it or takes it.
    """

    def __str__(self) -> str:
        return "E"


@dataclass(frozen=True, slots=True)
class Owned:
    """One rank has the value, the others have no part of it: the parameters of one expert among several kept as a list."""

    rank: int

    def __str__(self) -> str:
        return f"O({self.rank})"


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank holds a part of dimension `dim`.

    The dim is read as `repeat` equal stretches, each a row of segments `(units, size)`: `units` indivisible pieces of `size` elements.
    Every segment is cut into contiguous chunks of whole units as `torch.chunk` does (the first ranks get one more when it is uneven).
    A segment of `-units` is dealt out from the last rank to the first.

        Shard(0, 1, ((8, 1),))                        a plain shard of 8 rows
        Shard(0, 1, ((8, 64),))                       8 heads of 64 rows, never cut inside a head
        Shard(1, 4, ((12, 1),))                       dim 1 is "(b s)" with b = 4, the 12 positions of each sample are cut
        Shard(0, 1, ((8, 64), (2, 64), (2, 64)))      q | k | v rows of one fused weight with 8 query and 2 key/value heads
        Shard(1, 1, ((8, 1), (-8, 1)))                16 positions, of which rank 0 of 4 has the first two and the last two

    >>> Shard(0, 1, ((4, 2), (2, 1))).ranges(2, 1)
    ((4, 8), (9, 10))
    >>> [Shard(0, 1, ((4, 1), (-4, 1))).ranges(2, rank) for rank in range(2)]
    [((0, 2), (6, 8)), ((2, 6),)]
    """

    dim: int
    repeat: int = 1
    segments: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        inner = "|".join((str(abs(u)) if z == 1 else f"{abs(u)}x{z}") + "~" * (u < 0) for u, z in self.segments)
        return f"S({self.dim})" if self.is_contiguous else f"S({self.dim}: {f'{self.repeat}*' if self.repeat > 1 else ''}[{inner}])"

    @property
    def is_contiguous(self) -> bool:
        """Whether every rank holds one contiguous range."""
        return self.repeat == 1 and len(self.segments) == 1

    @property
    def length(self) -> int:
        """The global size of the dim."""
        return self.repeat * sum(abs(units) * size for units, size in self.segments)

    def ranges(self, size: int, rank: int) -> tuple[tuple[int, int], ...]:
        """The global index ranges `[start, stop)` that `rank` of `size` holds, in the order it holds them."""
        found: list[tuple[int, int]] = []
        for low, high in self.pieces(size, rank):
            if found and found[-1][1] == low:
                found[-1] = (found[-1][0], high)
            elif low < high:
                found.append((low, high))
        return tuple(found)

    def pieces(self, size: int, rank: int) -> tuple[tuple[int, int], ...]:
        """The same, one range for each segment of each stretch: as many on every rank."""
        found = []
        for base, units, unit in self._segment_starts():
            low, high = chunk(units, size, rank)
            found.append((base + low * unit, base + high * unit))
        return tuple(found)

    def local_length(self, size: int, rank: int) -> int:
        """How many elements of the dim `rank` of `size` holds."""
        total = 0
        for units, unit in self.segments:
            low, high = chunk(units, size, rank)
            total += (high - low) * unit
        return self.repeat * total

    def is_even(self, size: int) -> bool:
        """Whether every rank of `size` holds the same number of elements."""
        return all(units % size == 0 for units, _ in self.segments)

    def in_order(self, size: int) -> Shard:
        """The shard of the same dim that holds the elements in global order, cut as `torch.chunk` does: what DTensor's `Shard` says.

        >>> Shard(0, 1, ((4, 2), (2, 1))).in_order(2)
        Shard(dim=0, repeat=1, segments=((10, 1),))
        """
        ordered = plain(self.dim, self.length)
        return self if all(self.ranges(size, rank) == ordered.ranges(size, rank) for rank in range(size)) else ordered

    def _segment_starts(self) -> list[tuple[int, int, int]]:
        starts, base = [], 0
        for _ in range(self.repeat):
            for units, unit in self.segments:
                starts.append((base, units, unit))
                base += abs(units) * unit
        return starts


Type = Invariant | Replicate | Partial | Shard | Ragged | Owned
I, R, P = Invariant(), Replicate(), Partial()


def chunk(length: int, size: int, rank: int) -> tuple[int, int]:
    """The range `[start, stop)` of `length` items that `torch.chunk` gives to `rank` of `size`; of `-length`, from the last on.

    >>> [chunk(5, 4, r) for r in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    if length < 0:
        return chunk(-length, size, size - 1 - rank)
    step = -(-length // size)
    return min(rank * step, length), min((rank + 1) * step, length)


def plain(dim: int, length: int) -> Shard:
    """A contiguous shard of a dim of `length` elements."""
    return Shard(dim, 1, ((length, 1),))


def local_shape(shape: Sequence[int], type_: Type, size: int, rank: int) -> tuple[int, ...]:
    """The shape that `rank` of `size` holds of a value of global `shape`. Of ragged rows, that of an even distribution."""
    if isinstance(type_, Ragged):
        return (shape[0] // size, *shape[1:])
    if not isinstance(type_, Shard):
        return tuple(shape)
    return tuple(type_.local_length(size, rank) if d == type_.dim else n for d, n in enumerate(shape))
