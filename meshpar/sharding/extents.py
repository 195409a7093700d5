"""Which dims of which values are the same thing: union-find over factors of dims.

Every dim of every value is an *extent*. Operators unify extents: the output dim of a `linear` is the row dim of its weight; a view that
reads 64 as (8, 8) splits an extent into a product; a split or `cat` makes it a row of segments. What remains undivided is a factor, and one
factor is one thing that could be sharded: attention heads, MLP width, vocabulary, the positions of a sequence.

    q_proj.weight [64, 64]  ->  linear [b, s, 64]  ->  view [b, s, 8, 8]  ->  attention over 8 heads
            `-------- one extent, read as (heads d): sharding it on `heads` cuts rows of the weight by whole heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from meshpar.sharding.types import Shard

Pattern = tuple[int, tuple[tuple[int, int], ...]]
"""How a factor lies in an extent: (repeat, segments of (units, size)), the fields of a `Shard`."""


@dataclass
class Extents:
    """All extents of a graph. An extent is a number; `unify` makes two of them one."""

    _size: list[int] = field(default_factory=list)
    _link: list[int] = field(default_factory=list)
    _parts: list[tuple[str, tuple[int, ...]] | None] = field(default_factory=list)
    _patterns: dict[tuple[int, int], Pattern | None] = field(default_factory=dict)
    _fused: set[int] = field(default_factory=set)

    def new(self, size: int) -> int:
        """A new extent of `size` elements, unrelated to all others."""
        self._size.append(size)
        self._link.append(len(self._link))
        self._parts.append(None)
        return len(self._size) - 1

    def product(self, parts: Sequence[int]) -> int:
        """The extent that is the product of others, outermost first."""
        return self._combine("*", parts, prod(self._size[p] for p in parts))

    def row(self, parts: Sequence[int]) -> int:
        """The extent that holds others one after another."""
        return self._combine("+", parts, sum(self._size[p] for p in parts))

    def _combine(self, kind: str, parts: Sequence[int], size: int) -> int:
        if len(parts) == 1:
            return parts[0]
        one = self.new(size)
        self._parts[one] = (kind, tuple(parts))
        return one

    def size(self, one: int) -> int:
        """How many elements an extent has."""
        return self._size[one]

    def find(self, one: int) -> int:
        """The representative of all extents that are the same as `one`."""
        while self._link[one] != one:
            self._link[one] = self._link[self._link[one]]
            one = self._link[one]
        return one

    def unify(self, a: int, b: int) -> bool:
        """Make two extents one. False, and at most some of their factors unified, when their factors do not fit each other."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return True
        if self._size[a] != self._size[b]:
            return False
        if self._parts[a] is None:
            self._link[a] = b
            return True
        if self._parts[b] is None:
            self._link[b] = a
            return True
        kinds = {self._parts[a][0], self._parts[b][0]}  # type: ignore[index]
        if kinds == {"*"}:
            return self._match(self._flat(a, "*"), self._flat(b, "*"), product=True)
        if kinds == {"+"}:
            return self._match(self._flat(a, "+"), self._flat(b, "+"), product=False)
        return False

    def _flat(self, one: int, kind: str) -> list[int]:
        one = self.find(one)
        parts = self._parts[one]
        if parts is None or parts[0] != kind:
            return [one]
        return [f for p in parts[1] for f in self._flat(p, kind)]

    def _match(self, a: list[int], b: list[int], *, product: bool) -> bool:
        a, b = list(reversed(a)), list(reversed(b))
        while a and b:
            x, y = self.find(a.pop()), self.find(b.pop())
            if self._size[x] == self._size[y]:
                if not self.unify(x, y):
                    return False
                continue
            if self._size[x] > self._size[y]:
                x, y, a, b = y, x, b, a
            first, rest = self._divide(y, self._size[x], product=product)
            if first is None:
                return False
            if not self.unify(x, first):
                return False
            b.extend(reversed(rest))
        return not a and not b

    def _divide(self, one: int, first: int, *, product: bool) -> tuple[int | None, list[int]]:
        """Cut a leaf into a first part of size `first` and the rest, as a product or as a row."""
        size = self._size[one]
        if self._parts[one] is not None or (product and size % first):
            return None, []
        parts = (self.new(first), self.new(size // first if product else size - first))
        self._parts[one] = ("*" if product else "+", parts)
        return parts[0], [parts[1]]

    def leaves(self, one: int) -> tuple[int, ...]:
        """The undivided factors an extent is made of, outermost first."""
        one = self.find(one)
        parts = self._parts[one]
        if parts is None:
            return (one,)
        return tuple(dict.fromkeys(leaf for p in parts[1] for leaf in self.leaves(p)))

    def in_segments(self, one: int) -> bool:
        """Whether an extent is a row of several, one after another."""
        parts = self._parts[self.find(one)]
        return parts is not None and parts[0] == "+"

    def fuse(self, one: int) -> None:
        """Say that an extent is what a matrix computes: where it is a row, its segments may be cut `beside` each other.

        Call only when nothing will be unified any more.
        """
        self._fused.add(self.find(one))

    def is_fused(self, one: int) -> bool:
        """Whether that was said of it."""
        return self.find(one) in self._fused

    def cuttable(self, one: int) -> tuple[int, ...]:
        """What an extent could be cut along, best first: its undivided factors, outermost first, each product of some right after them.

        Heads that are (key/value heads, group) can be cut as a whole where neither factor alone divides.
        """
        one = self.find(one)
        parts = self._parts[one]
        if parts is None:
            return (one,)
        inner = [f for p in parts[1] for f in self.cuttable(p)]
        return tuple(dict.fromkeys([*inner, one] if parts[0] == "*" else inner))

    def pattern(self, one: int, factor: int) -> Pattern | None:
        """How `factor` lies in the extent, or None when it is not in it (or not in every one of its segments).

        Call only when nothing will be unified any more: answers are remembered.
        """
        one, factor = self.find(one), self.find(factor)
        key = (one, factor)
        if key not in self._patterns:
            self._patterns[key] = self._pattern(one, factor)
        return self._patterns[key]

    def _pattern(self, one: int, factor: int) -> Pattern | None:
        if one == factor:
            return 1, ((self._size[one], 1),)
        parts = self._parts[one]
        if parts is None:
            return None
        inner = [self.pattern(p, factor) for p in parts[1]]
        if parts[0] == "+":
            whole = beside(inner, [self._size[p] for p in parts[1]]) if self.is_fused(one) else inner
            return join([p for p in whole if p is not None]) if all(p is not None for p in whole) else None
        for at, found in enumerate(inner):
            if found is not None:
                sizes = [self._size[p] for p in parts[1]]
                return nest(prod(sizes[:at]), found, prod(sizes[at + 1 :]))
        return None


def beside(patterns: Sequence[Pattern | None], sizes: Sequence[int]) -> list[Pattern | None]:
    """The patterns of segments of which most hold a factor: the others are cut with it, each between its elements.

    So is a projection into many heads and few values that all of them share (keys of one head, the B and C of a state space): every rank
    computes its part of all, and what is shared is gathered after that. As they are where more lies beside the factor than holds it.
    """
    if 2 * sum(size for pattern, size in zip(patterns, sizes, strict=True) if pattern is not None) < sum(sizes):
        return list(patterns)
    return [(1, ((size, 1),)) if pattern is None else pattern for pattern, size in zip(patterns, sizes, strict=True)]


def nest(outer: int, pattern: Pattern, inner: int) -> Pattern:
    """The pattern of a factor in the product (outer, extent, inner)."""
    repeat, segments = pattern
    return outer * repeat, tuple((units, size * inner) for units, size in segments)


def join(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of a factor in a row of segments that all hold it."""
    if len(patterns) == 1:
        return patterns[0]
    return 1, tuple(segment for repeat, segments in patterns for _ in range(repeat) for segment in segments)


def shard(dim: int, pattern: Pattern, size: int, *, even: bool = False, chunks: int = 1) -> Shard | None:
    """The shard of `dim` over `size` ranks with this pattern in its shortest form, or None when it cannot be cut so.

    Even segments are written with single elements as units, so that equal distributions are equal shards. Uneven ones are allowed where a
    contiguous dim is cut between single elements and nobody is left with nothing (a vocabulary of 131); not where all must be `even`.

    `chunks`: how many pieces of each segment a rank gets, dealt out from the first rank to the last and back again (see `dealt_out`).
    """
    repeat, segments = pattern
    if chunks > 1:
        dealt = tuple(row for units, each in segments for row in dealt_out(units * each, chunks))
        return Shard(dim, repeat, dealt) if all(units % (chunks * size) == 0 for units, _ in segments) else None
    if all(units % size == 0 for units, _ in segments):
        return Shard(dim, repeat, tuple((units * each, 1) for units, each in segments)) if segments else None
    if not even and repeat == 1 and len(segments) == 1 and segments[0][1] == 1:
        units = segments[0][0]
        return Shard(dim, 1, segments) if (size - 1) * -(-units // size) < units else None
    return None


def dealt_out(length: int, chunks: int) -> tuple[tuple[int, int], ...]:
    """The segments of a dim of which each rank gets `chunks` pieces, dealt out back and forth: what grows along it is shared alike.

    >>> [Shard(0, 1, dealt_out(16, 4)).pieces(2, rank) for rank in range(2)]
    [((0, 2), (6, 8), (8, 10), (14, 16)), ((2, 4), (4, 6), (10, 12), (12, 14))]
    """
    return tuple((-(length // chunks) if turn % 2 else length // chunks, 1) for turn in range(chunks))
