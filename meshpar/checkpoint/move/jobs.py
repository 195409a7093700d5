"""Cutting the work: large tensors into slabs, small ones put together, so that every job fits the buffers of a worker.

global tensor          source chunks          target chunks
+-------------+        +------+------+        +-------------+
|### slab ####|        |######|######|        |#############|     A slab is a range of rows that fits the buffers. In every chunk,
+-------------+   <-   |      |      |   ->   +-------------+     source or target, the rows of a slab are one stretch of bytes,
|             |        |      |      |        |             |     and slabs meet every chunk from its first byte to its last,
+-------------+        +------+------+        +-------------+     so checksums are computed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from meshpar.checkpoint.format.boxes import Box, whole
from meshpar.checkpoint.move.transfer import Options, Order, Transfers


@dataclass(frozen=True)
class Batch:
    """Small transfers that are moved whole, together."""

    order: Order


@dataclass(frozen=True)
class Large:
    """One transfer, moved slab by slab."""

    group: int
    row: int
    slabs: tuple[Box, ...]


Job = Batch | Large
"""Work that must stay in one thread."""


def jobs(transfers: Sequence[Transfers], order: Order, options: Options) -> Iterator[Job]:
    """All of the work, in order."""
    is_small = np.array([t.rearrange is None and t.room <= options.buffer for t in transfers], bool)[order.group]
    small, large = np.flatnonzero(is_small), np.flatnonzero(~is_small)
    room = np.cumsum(np.array([t.room if t.room <= options.buffer else 0 for t in transfers], np.int64)[order.group[small]])
    at = start = 0
    while start < len(small):
        before = int(room[start - 1]) if start else 0
        stop = int(np.searchsorted(room, before + options.buffer, "right"))
        while at < len(large) and large[at] < small[stop - 1]:
            yield _large(transfers, order, int(large[at]), options)
            at += 1
        yield Batch(order.take(small[start:stop]))
        start = stop
    for k in large[at:].tolist():
        yield _large(transfers, order, k, options)


def _large(transfers: Sequence[Transfers], order: Order, at: int, options: Options) -> Large:
    group, row = int(order.group[at]), int(order.row[at])
    t = transfers[group]
    if t.rearrange is None:
        limit = max(options.buffer - (t.room - t.nbytes), options.buffer // 2)
        return Large(group, row, tuple(slabs(t.shape, t.itemsize, limit)))
    limit = max(options.spare // 3, 1)
    return Large(group, row, tuple(slabs(t.shape, t.itemsize, limit)) if t.keeps_rows else (whole(t.shape),))


def slabs(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """Cut a tensor into row ranges of at most `limit` bytes, in the order of its bytes.

    >>> [str(b) for b in slabs((3, 4), 1, 8)]
    ['[0:2, 0:4]', '[2:3, 0:4]']
    """
    dim = 0
    while dim < len(shape) - 1 and prod(shape[dim + 1 :]) * itemsize > limit:
        dim += 1
    if not shape or prod(shape) * itemsize <= limit:
        yield whole(shape)
        return
    rows = max(limit // (prod(shape[dim + 1 :]) * itemsize), 1)
    for lead in product(*(range(n) for n in shape[:dim])):
        for start in range(0, shape[dim], rows):
            size = min(rows, shape[dim] - start)
            yield Box((*lead, start, *(0,) * (len(shape) - dim - 1)), ((1,) * dim + (size, *shape[dim + 1 :])))
