"""How evenly attention in tiles is shared out: the pairs of positions that each rank computes, counted, of a mask that is known.

documents of 200 and 312 positions, 2 ranks     rank 0 has tiles of both, rank 1 of the second alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar.ops.pairings import Pairing, Sight, Stretch, held, short
from meshpar.sharding.types import Shard


@dataclass(frozen=True)
class Visible:
    """What the queries of a sequence see of keys."""

    keys: int
    """How many there are."""
    causal: bool = False
    window: int | None = None
    any_of: Callable[[int, int], Tensor] | None = None
    """Beside that, a mask: of the queries from the first position to before the second, `[keys]`, whether any of them sees the key."""


def pairs(shown: Visible, cut: Shard, size: int, *, ring: bool = True) -> list[int]:
    """By rank: pairs of queries and keys in the tiles that are not passed over.

    `cut`: which queries each of `size` ranks has, and which keys, which go round (`ring`) or meet it all at once.

    >>> document = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    >>> mask = document == document[:, None]
    >>> pairs(Visible(8, any_of=lambda low, high: mask[low:high].any(0)), Shard(0, 1, ((8, 1),)), 2)
    [16, 16]
    """
    sight = Sight(shown.causal, shown.window)
    own = [held(cut.ranges(size, rank)) for rank in range(size)]
    keys = own if ring else [(Stretch(0, 0, shown.keys),)]
    found = []
    for queries in own:
        rows = None if shown.any_of is None else _before_each(shown.any_of, short(queries))
        found.append(sum(_area(Pairing(queries, several), sight, rows) for several in keys))
    return found


def _before_each(any_of: Callable[[int, int], Tensor], rows: Sequence[Stretch]) -> Tensor:
    """`[blocks of queries, keys + 1]`: how many of the keys before that any query of a block sees."""
    some = torch.stack([any_of(row.at, row.at + row.size) for row in rows])
    return pad(some.cumsum(1, dtype=torch.int32), (1, 0))


def _area(pairing: Pairing, sight: Sight, seen: Tensor | None) -> int:
    rows, columns = (torch.tensor(short(one)) for one in (pairing.queries, pairing.keys))
    first, last = (x[:, None] for x in (rows[:, 1], rows[:, 1] + rows[:, 2] - 1))
    low, high = columns[:, 1], columns[:, 1] + columns[:, 2]
    some = torch.ones(len(rows), len(columns), dtype=torch.bool)
    if sight.causal or sight.window is not None:
        some &= low <= last
    if sight.window is not None:
        some &= high - 1 > first - sight.window
    if seen is not None:
        seen = seen.cpu()
        some &= seen[:, high] > seen[:, low]
    return int((some * rows[:, 2:] * columns[:, 2]).sum())
