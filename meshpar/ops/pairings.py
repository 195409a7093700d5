"""Queries and keys that meet, as stretches of positions, and which of them are computed together as tiles.

    queries 0-1 4-5     keys 0-1 4-5 8-9, causal        0-1 with 0-1, and beside it 4-5 with 0-1 and 4-5; nobody sees 8-9

A tile has at most SIDE x SIDE pairs. Short stretches of queries have more keys each, and several of them lie side by side in one tile, each
with keys of its own: the shorter the stretches are, the less is computed in vain, and there are no more tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

SIDE = 256
"""The most queries of a tile, and the most keys of a stretch."""


class Stretch(NamedTuple):
    """Positions in a row, held in a row."""

    held: int
    """Where the first is held."""
    at: int
    """Its position."""
    size: int


@dataclass(frozen=True, slots=True)
class Pairing:
    """A part of the table of all pairs. What is held may be of any positions."""

    queries: tuple[Stretch, ...]
    keys: tuple[Stretch, ...]

    @property
    def numbers(self) -> list[int]:
        """As operators take it, one pairing after the other."""
        return [len(self.queries), len(self.keys), *(n for stretch in (*self.queries, *self.keys) for n in stretch)]

    @staticmethod
    def read(numbers: Sequence[int]) -> list[Pairing]:
        """The other way."""
        found, at = list[Pairing](), 0
        while at < len(numbers):
            queries, keys = numbers[at : at + 2]
            flat = numbers[at + 2 : at + 2 + 3 * (queries + keys)]
            stretches = [Stretch(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
            found.append(Pairing(tuple(stretches[:queries]), tuple(stretches[queries:])))
            at += 2 + len(flat)
        return found


def held(ranges: Sequence[tuple[int, int]]) -> tuple[Stretch, ...]:
    """Ranges of positions that are held one after the other.

    >>> held([(0, 2), (6, 8)])
    (Stretch(held=0, at=0, size=2), Stretch(held=2, at=6, size=2))
    """
    found, start = list[Stretch](), 0
    for low, high in ranges:
        found.append(Stretch(start, low, high - low))
        start += high - low
    return tuple(found)


def short(stretches: Sequence[Stretch], side: int | None = None) -> tuple[Stretch, ...]:
    """The same in stretches of at most `side`, that of a tile.

    >>> short([Stretch(0, 8, 3)], 2)
    (Stretch(held=0, at=8, size=2), Stretch(held=2, at=10, size=1))
    """
    side = SIDE if side is None else side
    return tuple(Stretch(x + i, at + i, min(side, size - i)) for x, at, size in stretches for i in range(0, size, side))


@dataclass(frozen=True, slots=True)
class Sight:
    """Which keys a query sees by its position."""

    causal: bool = False
    """The query at position i sees the keys up to i alone."""
    window: int | None = None
    """Of those, how many of the last."""

    def none(self, rows: Stretch, columns: Stretch) -> bool:
        """Whether none of the queries sees any of the keys."""
        late = (self.causal or self.window is not None) and columns.at > rows.at + rows.size - 1
        return late or (self.window is not None and columns.at + columns.size - 1 <= rows.at - self.window)

    def all(self, rows: Stretch, columns: Stretch) -> bool:
        """Whether each of the queries sees each of the keys."""
        past = columns.at + columns.size - 1 <= rows.at or not (self.causal or self.window is not None)
        return past and (self.window is None or columns.at > rows.at + rows.size - 1 - self.window)


class ShortStretches(NamedTuple):
    """Stretches of at most SIDE queries and of at most SIDE keys, and which of those each of these sees by its position."""

    rows: tuple[Stretch, ...]
    columns: tuple[Stretch, ...]
    seen: tuple[tuple[int, ...], ...]


def blocks(pairing: Pairing, sight: Sight) -> ShortStretches:
    """The short stretches of what meets."""
    return _blocks(pairing, sight, SIDE)


@lru_cache(maxsize=512)
def _blocks(pairing: Pairing, sight: Sight, side: int) -> ShortStretches:
    rows, columns = short(pairing.queries, side), short(pairing.keys, side)
    return ShortStretches(rows, columns, tuple(tuple(j for j, c in enumerate(columns) if not sight.none(r, c)) for r in rows))


TilePart = tuple[Stretch, tuple[Stretch, ...]]
"""Queries of one stretch, and the keys that they meet."""


def tiling(found: ShortStretches, seen: Sequence[Sequence[int]]) -> Iterator[list[TilePart]]:
    """The parts of each tile, of equally many queries, no query twice. `seen`: of each stretch of queries, those of keys."""
    waiting: dict[tuple[int, int], list[TilePart]] = {}
    for row, places in zip(found.rows, seen, strict=True):
        for turn, columns in enumerate(_enough(row, [found.columns[j] for j in places])):
            if row.size == SIDE:
                yield [(row, columns)]
            else:
                waiting.setdefault((row.size, turn), []).append((row, columns))
    for (size, _), parts in waiting.items():
        tile, most = list[TilePart](), 0
        for part in sorted(parts, key=lambda part: count(part[1])):
            if tile and (len(tile) + 1) * size * max(most, count(part[1])) > SIDE * SIDE:
                yield tile
                tile, most = [], 0
            tile.append(part)
            most = max(most, count(part[1]))
        yield tile


def count(stretches: Sequence[Stretch]) -> int:
    """How many positions there are."""
    return sum(one.size for one in stretches)


def _enough(row: Stretch, columns: Sequence[Stretch]) -> Iterator[tuple[Stretch, ...]]:
    """Keys that make a tile with these queries as large as any."""
    most, found = min(4 * SIDE, SIDE * SIDE // row.size), list[Stretch]()
    for one in columns:
        if found and count(found) + one.size > most:
            yield tuple(found)
            found = []
        found.append(one)
    if found:
        yield tuple(found)
