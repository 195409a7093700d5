"""What a layout means, written down once more in the plainest way: the oracle of the tests beside it."""

from __future__ import annotations

import torch

from meshpar.sharding.types import Shard

Layout = tuple[int, int, tuple[tuple[int, int], ...]]


def part(x: torch.Tensor, layout: Layout, size: int, rank: int) -> torch.Tensor:
    """`rank`'s slice of the whole `x`, by index."""
    dim, repeat, segments = layout
    index, start = [], 0
    for _ in range(repeat):
        for units, unit in segments:
            step = -(-units // size)
            for u in range(units):
                if u // step == rank if step else False:
                    index += range(start + u * unit, start + (u + 1) * unit)
            start += units * unit
    assert start == x.shape[dim]
    return x.index_select(dim, torch.tensor(index, dtype=torch.long))


def only(x: torch.Tensor, layout: Layout, size: int, rank: int) -> torch.Tensor:
    """`x` with everything that is not `rank`'s set to zero."""
    place = torch.arange(x.numel()).view(x.shape)
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[part(place, layout, size, rank).flatten()] = True
    return x * mask.view(x.shape)


def fields(shard: Shard) -> Layout:
    return shard.dim, shard.repeat, shard.segments


# Layouts of a [12, 8, 3] tensor.
SHAPE = (12, 8, 3)
LAYOUTS: dict[str, Layout] = {
    "plain": (0, 1, ((12, 1),)),
    "plain dim 1": (1, 1, ((8, 1),)),
    "plain last dim": (2, 1, ((3, 1),)),
    "heads": (0, 1, ((6, 2),)),
    "uneven heads": (1, 1, ((4, 2),)),
    "fewer units than ranks": (1, 1, ((2, 4),)),
    "one unit": (1, 1, ((1, 8),)),
    "repeat": (0, 3, ((4, 1),)),
    "repeat dim 1": (1, 2, ((4, 1),)),
    "segments": (0, 1, ((4, 2), (2, 1), (2, 1))),
    "uneven segments": (0, 1, ((5, 2), (1, 1), (1, 1))),
    "segments and repeat": (1, 2, ((2, 1), (1, 2))),
}
