"""Arithmetic of shards: one form for each way to cut a dim, and what rearranging a tensor makes of it.

A shard is read along the flat order of the elements: `outer` stretches, each a row of segments, each dealt out to the ranks.

    [4, 12, 64] with S(2: [8x8]) on 2 ranks       outer 48, segments ((2, 32),)        ->    as [4, 12, 8, 8]: S(2) of 8 heads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from meshpar.sharding.types import Shard

CutLayout = tuple[int, tuple[tuple[int, int], ...]]
"""Repeat and segments of a shard, without its dim."""


def normal(layout: CutLayout, ranks: int) -> CutLayout:
    """The same cut in one form: even segments as a piece for each rank, equal rows of segments as repeats.

    >>> normal((1, ((8, 4), (8, 4))), 2)
    (2, ((2, 16),))
    """
    repeat, segments = layout
    even = tuple(_even(units, size, ranks) for units, size in segments)
    for period in range(1, len(even)):
        if len(even) % period == 0 and even == even[:period] * (len(even) // period):
            return repeat * (len(even) // period), even[:period]
    return repeat, even


def _even(units: int, size: int, ranks: int) -> tuple[int, int]:
    if units % ranks:
        return units, size
    return (-ranks if units < 0 else ranks), abs(units) // ranks * size


def layout_of(shard: Shard, ranks: int) -> CutLayout:
    """The normal form of a shard."""
    return normal((shard.repeat, shard.segments), ranks)


def of_layout(dim: int, layout: CutLayout) -> Shard:
    """The shard of a dim in this layout."""
    return Shard(dim, *layout)


def reshaped(shard: Shard, before: Sequence[int], after: Sequence[int], ranks: int) -> list[Shard]:
    """What a shard of a tensor of shape `before` is of the same elements in shape `after`; none where no dim is cut like that.

    >>> reshaped(Shard(2, 1, ((8, 8),)), (4, 12, 64), (4, 12, 8, 8), 2)
    [Shard(dim=2, repeat=1, segments=((2, 4),))]
    """
    repeat, segments = layout_of(shard, ranks)
    tail = prod(before[shard.dim + 1 :])
    outer, flat = normal((prod(before[: shard.dim]) * repeat, tuple((u, s * tail) for u, s in segments)), ranks)
    found = []
    for dim, size in enumerate(after):
        tail, lead = prod(after[dim + 1 :]), prod(after[:dim])
        if size > 1 and tail and lead and outer % lead == 0 and all(s % tail == 0 for _, s in flat):
            found.append(of_layout(dim, normal((outer // lead, tuple((u, s // tail) for u, s in flat)), ranks)))
    return found


def inside(factors: Sequence[str], sizes: Mapping[str, int], layout: CutLayout) -> tuple[str, CutLayout] | None:
    """Which factor of a product is cut, and how; None where no single one is.

    >>> inside(("b", "s"), {"b": 4, "s": 12}, (4, ((2, 6),)))
    ('s', (1, ((2, 6),)))
    """
    repeat, segments = layout
    for at, name in enumerate(factors):
        lead, inner = prod(sizes[f] for f in factors[:at]), prod(sizes[f] for f in factors[at + 1 :])
        if repeat % lead == 0 and all(size % inner == 0 for _, size in segments):
            return name, (repeat // lead, tuple((units, size // inner) for units, size in segments))
    return None


def around(factors: Sequence[str], sizes: Mapping[str, int], name: str, layout: CutLayout) -> CutLayout:
    """How a product of factors is cut where one of them is."""
    at = list(factors).index(name)
    lead, inner = prod(sizes[f] for f in factors[:at]), prod(sizes[f] for f in factors[at + 1 :])
    return layout[0] * lead, tuple((units, size * inner) for units, size in layout[1])


def written_out(layout: CutLayout) -> list[tuple[int, int]]:
    """The segments of all repeats."""
    return list(layout[1]) * layout[0]


def between(layout: CutLayout, start: int, stop: int) -> CutLayout | None:
    """The layout of the elements from `start` to `stop`, where no segment is cut through."""
    found, at = [], 0
    for units, size in written_out(layout):
        length = abs(units) * size
        if start <= at and at + length <= stop:
            found.append((units, size))
        elif at < stop and start < at + length:
            return None
        at += length
    return (1, tuple(found)) if found else None


def joined(layouts: Sequence[CutLayout]) -> CutLayout:
    """The layout of parts put one after the other."""
    return 1, tuple(segment for layout in layouts for segment in written_out(layout))
