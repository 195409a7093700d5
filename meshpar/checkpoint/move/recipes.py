"""How the pieces of two divisions of a tensor meet: which stretches of the sources, one after the other, make up a target.

sources (rows)             target (columns 0:2)            recipe
s0 |a b c d|                  |a b|                        None: rows interleave, elements are copied together
s1 |e f g h|                  |e f|

s0 |a b c d|                  |a b c d|                    source 0, all of it; then source 1, all of it
s1 |e f g h|                  |e f g h|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshpar.checkpoint.format.boxes import Box, intersect, volume


@dataclass(frozen=True, slots=True)
class Recipe:
    """The bytes of each source and target, and what the targets are made of, in order.

    `parts` is None when rows interleave, so that bytes must be copied together.
    """

    nbytes: tuple[int, ...]
    target_nbytes: tuple[int, ...]
    parts: tuple[tuple[tuple[int, int, int], ...], ...] | None  # per target: source, first byte, byte after the last

    @property
    def longest(self) -> int:
        """The bytes of the largest piece on either side."""
        return max((*self.nbytes, *self.target_nbytes), default=0)

    def is_whole(self, part: tuple[int, int, int]) -> bool:
        """Whether a part is all of its source."""
        return part[1:] == (0, self.nbytes[part[0]])


def recipe(sources: Sequence[Box], targets: Sequence[Box], itemsize: int) -> Recipe:
    """Work out how sources make up targets that tile the same tensor."""
    nbytes = tuple(volume(box.size) * itemsize for box in sources)
    made = tuple(volume(box.size) * itemsize for box in targets)
    out = []
    for target in targets:
        parts = []
        for s, source in enumerate(sources):
            both = intersect(source, target)
            if both is None:
                continue
            if not (is_one_stretch(both, source) and is_one_stretch(both, target)):
                return Recipe(nbytes, made, None)
            start = position(both, source) * itemsize
            parts.append((position(both, target), s, start, start + volume(both.size) * itemsize))
        out.append(tuple((s, start, stop) for _, s, start, stop in sorted(parts)))
    return Recipe(nbytes, made, tuple(out))


def shared(target: Box, held: Sequence[tuple[Box, memoryview]], *, is_all: bool = False) -> list[tuple[Box, Box, memoryview]]:
    """What a target stretch shares with each source stretch: with `is_all`, each of them whole, which is quick to tell."""
    if is_all:
        return [(box, box, view) for box, view in held]
    out = []
    for box, view in held:
        both = intersect(target, box)
        if both is not None:
            out.append((both, box, view))
    return out


def direct(target: Box, pieces: Sequence[tuple[Box, Box, memoryview]], itemsize: int) -> list[memoryview] | None:
    """The target's bytes as stretches of the source buffers, in order, or None when rows interleave."""
    out = []
    for both, box, view in pieces:
        if not ((both is box or is_one_stretch(both, box)) and is_one_stretch(both, target)):
            return None
        start = position(both, box) * itemsize if both is not box else 0
        out.append((position(both, target), view[start : start + volume(both.size) * itemsize]))
    return [view for _, view in sorted(out, key=lambda row: row[0])]


def is_one_stretch(inner: Box, outer: Box) -> bool:
    """Whether the elements of `inner` follow each other in the row-major order of `outer`."""
    dim = 0
    while dim < len(inner.size) and inner.size[dim] == 1:
        dim += 1
    return inner.size[dim + 1 :] == outer.size[dim + 1 :]


def position(inner: Box, outer: Box) -> int:
    """The first element of `inner`, counted in the row-major order of `outer`."""
    at = 0
    for start, base, length in zip(inner.offset, outer.offset, outer.size, strict=True):
        at = at * length + start - base
    return at
