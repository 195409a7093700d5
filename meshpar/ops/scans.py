"""Cumulative operators along a sequence that is cut: each piece by itself, and what all pieces before it come to.

    cumsum     rank 0: 1 1 | 1 1     rank 1: 1 1 | 1 1     totals 2 2 2 2, all-gathered; the third piece adds 2 + 2

What travels is one number for each piece and each sequence of numbers, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from meshpar.ops.collectives import s_to_r
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import on_rank
from meshpar.sharding.types import Shard


def cumulated(
    x: Tensor, how: str, dtype: torch.dtype | None, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int
) -> Tensor:
    """`cumsum`, `cumprod` or `logcumsumexp` (`how`) along the dim that is cut. `dtype`: of the first two, what they compute in.

    `x`: this rank's part, in the layout (dim, repeat, segments) of a `Shard`. Returns a tensor of the same shape: its part of the result.
    """
    cut, scan = Shard(dim, repeat, tuple(segments)), _SCANS[how]
    parts = [
        scan.along(part if dtype is None else part.to(dtype), dim)
        for part in x.split([high - low for low, high in cut.pieces(size, 0)], dim)
    ]
    totals = torch.stack([part.select(dim, -1) for part in parts])
    every = s_to_r(totals, 0, 1, ((size * len(parts), 1),), group=group, size=size, rank=rank)
    earlier = on_rank(lambda one, like: torch.tensor(_earlier(cut, size, one), device=like.device), (group, size, rank), x)
    earlier = earlier.view(len(parts), size * len(parts), *[1] * (x.dim() - 1))
    before = scan.over(torch.where(earlier, every, scan.nothing), 1).unsqueeze(dim + 1)
    return torch.cat([scan.joined(part, one) for part, one in zip(parts, before.unbind())], dim)


class _Scan(NamedTuple):
    """One cumulative operator."""

    along: Callable[..., Tensor]
    over: Callable[..., Tensor]
    """The same of several numbers at once."""
    joined: Callable[..., Tensor]
    nothing: float
    """What changes nothing."""


_SCANS = {
    "cumsum": _Scan(torch.cumsum, torch.sum, torch.add, 0.0),
    "cumprod": _Scan(torch.cumprod, torch.prod, torch.mul, 1.0),
    "logcumsumexp": _Scan(torch.logcumsumexp, torch.logsumexp, torch.logaddexp, -torch.inf),
}
SCANS = frozenset(_SCANS)
"""The operators that are done so."""


@lru_cache(maxsize=256)
def _earlier(cut: Shard, size: int, rank: int) -> tuple[tuple[bool, ...], ...]:
    """For each piece of a rank, whether each of those of all ranks lies before it."""
    every = [piece for one in range(size) for piece in cut.pieces(size, one)]
    return tuple(tuple(other[0] < own[0] for other in every) for own in cut.pieces(size, rank))
