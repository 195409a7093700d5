"""Slices of tensors as shards lay them out: taken, joined, packed into pieces of one length, and which ranges go where.

A layout is the fields of one `sharding.types.Shard`: (dim, repeat, segments). Everything here is local to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar.sharding.types import Shard, chunk

Segments = tuple[tuple[int, int], ...]


def ranks_inside(y: Tensor, local: tuple[int, ...], dim: int, repeat: int, size: int) -> Tensor:
    """`[size * local[0], ...]`, one local tensor after the other, put in global order along `dim`.

    rank 0: | a0 b0 |   rank 1: | a1 b1 |    ->    a0 a1 b0 b1     (repeat 2)
    """
    shape = (*local[:dim], local[dim] * size, *local[dim + 1 :])
    outer = prod(local[:dim]) * repeat
    if outer == 1 or y.numel() == 0:
        return y.view(shape)
    return y.view(size, outer, -1).transpose(0, 1).reshape(shape)


def ranks_first(x: Tensor, dim: int, repeat: int, size: int) -> Tensor:
    """The slices of all ranks, one after the other: `[size, the slice flattened]`."""
    outer = prod(x.shape[:dim]) * repeat
    inner = x.numel() // (outer * size) if outer else 0
    return x.reshape(outer, size, inner).transpose(0, 1).contiguous().view(size, outer * inner)


@torch.compiler.assume_constant_result
def _cuts(segments: Segments, size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank and segment: the range it holds inside one stretch."""
    return _cached_cuts(segments, size)


@lru_cache(maxsize=4096)
def _cached_cuts(segments: Segments, size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    starts = [0]
    for units, unit in segments:
        starts.append(starts[-1] + abs(units) * unit)
    bounds = [[chunk(units, size, rank) for units, _ in segments] for rank in range(size)]
    return tuple(
        tuple((starts[i] + low * segments[i][1], starts[i] + high * segments[i][1]) for i, (low, high) in enumerate(row)) for row in bounds
    )


def _local_length(layout: Any, size: int, rank: int) -> int:
    return layout[1] * sum(high - low for low, high in _cuts(layout[2], size)[rank])


def local_shape(shape: tuple[int, ...], layout: Any, size: int, rank: int) -> tuple[int, ...]:
    """The shape of `rank`'s slice of a tensor of `shape`."""
    return (*shape[: layout[0]], _local_length(layout, size, rank), *shape[layout[0] + 1 :])


def take(x: Tensor, layout: Any, size: int, rank: int) -> Tensor:
    """`rank`'s slice of the whole `x` (a view where that is possible)."""
    dim, repeat, segments = layout
    stretches, along = _stretched(x, dim, repeat)
    pieces = [stretches.narrow(along, low, high - low) for low, high in _cuts(segments, size)[rank]]
    taken = pieces[0] if len(pieces) == 1 else torch.cat(pieces, along)
    return taken if repeat == 1 else taken.flatten(dim, along)


def join(parts: Sequence[Tensor], layout: Any, size: int) -> Tensor:
    """The whole tensor from the slices of all ranks."""
    dim, repeat, segments = layout
    cuts = _cuts(segments, size)
    places = [0] * size
    pieces = []
    for segment, (units, _) in enumerate(segments):
        for rank in range(size) if units >= 0 else reversed(range(size)):
            low, high = cuts[rank][segment]
            stretches, along = _stretched(parts[rank], dim, repeat)
            pieces.append(stretches.narrow(along, places[rank], high - low))
            places[rank] += high - low
    joined = torch.cat(pieces, along)
    return joined if repeat == 1 else joined.flatten(dim, along)


def _stretched(x: Tensor, dim: int, repeat: int) -> tuple[Tensor, int]:
    """`x` with the stretches of `dim` as a dim of their own, and the dim inside the stretches."""
    if repeat == 1:
        return x, dim
    return x.unflatten(dim, (repeat, x.shape[dim] // repeat)), dim + 1


def surround(x: Tensor, layout: Any, size: int, rank: int) -> Tensor:
    """The whole tensor with `x` as `rank`'s slice and zeros as the others."""
    dim, repeat, segments = layout
    if repeat == 1 and len(segments) == 1:
        low, high = _cuts(segments, size)[rank][0]
        return pad(x, (0, 0) * (x.dim() - 1 - dim) + (low, segments[0][0] * segments[0][1] - high))
    parts = [x if r == rank else x.new_zeros(local_shape(x.shape, layout, size, r)) for r in range(size)]
    return join(parts, layout, size)


def padded(flat: Tensor, length: int) -> Tensor:
    """`flat` with zeros up to `length`."""
    return flat if flat.numel() == length else pad(flat, (0, length - flat.numel()))


def unpadded(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `shape` at the start of `flat`."""
    return flat[: prod(shape)].view(shape)


def pack(pieces: Sequence[Tensor], length: int) -> Tensor:
    """The pieces as rows of one length."""
    return torch.stack([padded(piece.reshape(-1), length) for piece in pieces]).view(-1)


def unpack(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of `shapes` that `pack` put into rows."""
    return [unpadded(row, shape) for row, shape in zip(flat.view(len(shapes), -1), shapes)]


def local_shapes(shape: tuple[int, ...], layout: Any, size: int) -> list[tuple[int, ...]]:
    """The shapes of the slices of all ranks."""
    return [local_shape(shape, layout, size, rank) for rank in range(size)]


def numels(shape: tuple[int, ...], layout: Any, size: int) -> list[int]:
    """How many elements the slices of all ranks have."""
    return [prod(local) for local in local_shapes(shape, layout, size)]


def pieces_for(shape: tuple[int, ...], here: Any, there: Any, size: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what `rank` gets from every rank when `here` becomes `there` on another dim."""
    return local_shapes(local_shape(shape, there, size, rank), here, size)


def piece_numel(shape: tuple[int, ...], here: Any, there: Any, size: int) -> int:
    """The most elements that one rank sends another when `here` becomes `there`."""
    return max(prod(piece) for rank in range(size) for piece in pieces_for(shape, here, there, size, rank))


Spans = tuple[tuple[int, int], ...]


Moves = tuple[tuple[Spans, ...], ...]


@torch.compiler.assume_constant_result
def moves_between(repeat: int, segments: Segments, to_repeat: int, to_segments: Segments, size: int) -> Moves:
    """`moves[p][q]`: the global ranges that rank p holds before and rank q after, ascending."""
    return _cached_moves(repeat, segments, to_repeat, to_segments, size)


@lru_cache(maxsize=1024)
def _cached_moves(repeat: int, segments: Segments, to_repeat: int, to_segments: Segments, size: int) -> Moves:
    here, there = Shard(0, repeat, segments), Shard(0, to_repeat, to_segments)
    after = [there.ranges(size, rank) for rank in range(size)]
    return tuple(tuple(_common(here.ranges(size, rank), wanted) for wanted in after) for rank in range(size))


def _common(a: Spans, b: Spans) -> Spans:
    """The intersection of two ascending lists of ranges.

    >>> _common(((0, 4), (8, 12)), ((2, 9),))
    ((2, 4), (8, 9))
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low < high:
            found.append((low, high))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def largest_move(moves: Moves) -> int:
    """The most rows that one rank sends another."""
    return max(_length(ranges) for row in moves for ranges in row)


def _length(ranges: Spans) -> int:
    return sum(high - low for low, high in ranges)


def pack_moves(x: Tensor, dim: int, moves: Moves, rank: int) -> Tensor:
    """What `rank` sends to each rank, padded to one length."""
    rows = x.movedim(dim, 0)
    lengths = [(low, to, high - low) for to, ranges in enumerate(moves[rank]) for low, high in ranges]
    pieces: list[list[Tensor]] = [[rows[:0]] for _ in moves]
    place = 0
    for _, to, length in sorted(lengths):  # the rank's rows lie in global order
        pieces[to].append(rows.narrow(0, place, length))
        place += length
    return pack([torch.cat(piece) for piece in pieces], largest_move(moves) * prod(rows.shape[1:]))


def unpack_moves(y: Tensor, shape: tuple[int, ...], dim: int, moves: Moves, rank: int) -> Tensor:
    """This rank's rows from what every rank sent it, in global order. `shape` is that of its tensor before."""
    rest = (*shape[:dim], *shape[dim + 1 :])
    sent = unpack(y, [(_length(row[rank]), *rest) for row in moves])
    found: list[tuple[int, Tensor]] = []
    for piece, row in zip(sent, moves):
        lengths = [high - low for low, high in row[rank]]
        found += zip((low for low, _ in row[rank]), piece.split(lengths))
    found.sort(key=lambda item: item[0])
    return torch.cat([sent[0][:0], *(piece for _, piece in found)]).movedim(0, dim).contiguous()
