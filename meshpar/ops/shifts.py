"""Positions moved along a sequence that is cut, zeros where nothing comes from: a rank fetches the few before its own, not all.

by 1     rank 0: 0 1 2 3     rank 1: 4 5 6 7     rank 1 fetches 3; rank 0 begins with a zero
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from meshpar.ops.layouts import Segments
from meshpar.ops.near import Near, fetched
from meshpar.sharding.types import Shard


def shifted(x: Tensor, *, dim: int, by: int) -> Tensor:
    """At position i of `dim` what was at i - by; zeros where that is none.

    >>> shifted(torch.tensor([1, 2, 3]), dim=0, by=1)
    tensor([0, 1, 2])
    """
    n, few = x.shape[dim], min(abs(by), x.shape[dim])
    zeros = x.new_zeros(*x.shape[:dim], few, *x.shape[dim + 1 :])
    return torch.cat([zeros, x.narrow(dim, 0, n - few)] if by > 0 else [x.narrow(dim, few, n - few), zeros], dim)


def halo_shifted(x: Tensor, place: int, repeat: int, segments: Segments, *, dim: int, by: int, group: str, size: int, rank: int) -> Tensor:
    """The same of a sequence of which ranks have the parts (place, repeat, segments) of a `Shard`; returns this rank's part.

    Each piece costs `by` positions forward, and their gradients backward.
    """
    front = x.movedim(dim, 0)
    rows = fetched(front.flatten(1), before(Shard(place, repeat, tuple(segments)), by, size), (group, size, rank))
    return rows.unflatten(1, front.shape[1:]).movedim(0, dim) if x.dim() > 1 else rows.flatten()


@lru_cache(maxsize=256)
def before(cut: Shard, by: int, size: int) -> Near:
    """What each rank reads: as many positions as it has, `by` earlier."""
    return Near(cut, tuple(tuple((low - by, high - by) for low, high in cut.pieces(size, rank)) for rank in range(size)))
