"""A convolution along the positions of a sequence that is cut: a rank fetches the few positions around its own, not all.

    kernel 3, causal     rank 0: 0 1 2 3     rank 1: 4 5 6 7     rank 1 fetches 2 and 3; before 0 there are zeros

Where a rank has several pieces, there is such a fringe at each of them, all in one message.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from meshpar.ops.layouts import Segments
from meshpar.ops.near import Near, fetched
from meshpar.sharding.types import Shard


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, left: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> Tensor:
    """A convolution of `[b, c, s]` with `[o, c / groups, k]`, zeros around: one result for every `stride` positions, `[b, o, s / stride]`.

    Result j begins at position j * stride - left: with `left = dilation * (k - 1)` and no stride it is causal.

    >>> convolved(torch.ones(1, 1, 4), torch.ones(1, 1, 3), left=2)
    tensor([[[1., 2., 3., 3.]]])
    """
    right = dilation * (weight.shape[-1] - 1) + 1 - stride - left
    if left == right:
        return F.conv1d(x, weight, bias, stride, left, dilation, groups)
    return F.conv1d(F.pad(x, (left, right)), weight, bias, stride, 0, dilation, groups)


def halo_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    out: Segments,
    left: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """The results of `convolved` that this rank is to have, in the segments `out`.

    `x`: `[b, c, s_local]`, cut along its positions in the layout (dim, repeat, segments) of a `Shard`; `weight`: `[o, c / groups, k]`.
    Returns `[b, o, s_local / stride]`. Backward sends the gradients of what was fetched back; that of `weight` is a pending sum.
    """
    results = Shard(dim, 1, tuple(out))
    near = around(Shard(dim, repeat, tuple(segments)), results, weight.shape[-1], left, stride, dilation, size)
    read = fetched(rearrange(x, "b c s -> s (b c)"), near, (group, size, rank))
    read = rearrange(read, "s (b c) -> b c s", b=x.shape[0])
    pieces = read.split([high - low for low, high in near.reads[max(rank, 0)]], -1)  # as many on every rank
    found = [F.conv1d(piece, weight, bias, stride, 0, dilation, groups) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


@lru_cache(maxsize=256)
def around(cut: Shard, results: Shard, kernel: int, left: int, stride: int, dilation: int, size: int) -> Near:
    """What each rank reads for its pieces of the results, of positions cut as `cut`."""
    reach = dilation * (kernel - 1) + 1
    return Near(
        cut,
        tuple(
            tuple((low * stride - left, (high - 1) * stride - left + reach) for low, high in results.pieces(size, rank))
            for rank in range(size)
        ),
    )
