"""Many small transfers at once: what lies side by side in a file is read or written by one call, and what is divided alike moves by strided
copies between the buffers, one for each stretch of the recipe instead of one for each tensor.

    read buffer                             write buffer
    |s0 of a|s0 of b|s0 of c| ...           |s0 of a|s1 of a|s0 of b|s1 of b|s0 of c|s1 of c| ...
    |s1 of a|s1 of b|s1 of c| ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np

from meshpar.checkpoint.format.casts import Array
from meshpar.checkpoint.format.table import Chunks, Crcs, Ints
from meshpar.checkpoint.move.channel import Buffer, Channel
from meshpar.checkpoint.move.transfer import Options, Transfers

SHORT = 1 << 16  # longer pieces are worth a call of their own instead of a copy
FEW = 33  # to work checksums out takes a table, made of as many checksums of the same length
SOME = 3  # fewer transfers that are alike are moved faster one by one


class Stack(NamedTuple):
    """Some rows of transfers: what a batch moves of them."""

    transfers: Transfers
    rows: Ints
    sources: Chunks
    targets: Chunks

    @classmethod
    def of(cls, transfers: Transfers, rows: Ints) -> Stack:
        return cls(transfers, rows, transfers.sources.take(rows), transfers.targets.take(rows))


def is_simple(t: Transfers, options: Options) -> bool:
    """Whether transfers only put short stretches of bytes side by side."""
    recipe = t.recipe
    short = recipe.longest <= min(options.source_block, SHORT)
    return short and recipe.parts is not None and t.dtype == t.target_dtype and not t.has_zeros


def move(stacks: Sequence[Stack], channel: Channel, read: Buffer, write: Buffer) -> list[Crcs]:
    """Move simple transfers that fit the buffers. Of each stack: the checksums of the targets, a row for each transfer."""
    sources = _place([(s.sources, s.transfers.recipe.nbytes) for s in stacks], read, channel.fill)
    found = [_verified(s, at, channel, read.data) for s, at in zip(stacks, sources, strict=True)]
    writes: list[tuple[int, int, memoryview]] = []
    targets = _place([(s.targets, s.transfers.recipe.target_nbytes) for s in stacks], write, lambda *run: writes.append(run))
    crcs = []
    for stack, at, to, known in zip(stacks, sources, targets, found, strict=True):
        _gather(stack, at, to, read.data, write.data)
        crcs.append(_checksums(stack, to, known, write.data) if channel.options.checksums else np.zeros((len(stack.rows), 0), np.uint32))
    for file, begin, view in writes:
        channel.put(file, begin, [view], len(view))
    return crcs


def _place(groups: Sequence[tuple[Chunks, tuple[int, ...]]], buffer: Buffer, act: Callable[[int, int, memoryview], None]) -> list[Ints]:
    """Give every stretch its place in the buffer, neighbours in a file side by side; `act(file, begin, view)` on every row of them."""
    if len(groups) == 1 and _is_one_run_each(*groups[0]):
        return [_place_columns(*groups[0], buffer, act)]
    file, begin = np.concatenate([c.file.ravel() for c, _ in groups]), np.concatenate([c.begin.ravel() for c, _ in groups])
    nbytes = np.concatenate([np.tile(np.array(sizes, np.int64), len(c)) for c, sizes in groups])
    order = np.lexsort((nbytes, begin, file))
    f, b, n = file[order], begin[order], nbytes[order]
    breaks = np.flatnonzero((f[1:] != f[:-1]) | (b[1:] != b[:-1] + n[:-1])) + 1
    firsts = np.concatenate(([0], breaks))[: len(f)]
    lasts = np.concatenate((breaks, [len(f)]))[: len(firsts)] - 1
    shift = np.zeros(len(firsts), np.int64)
    for k, (i, j) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
        base, end = int(b[i]), int(b[j] + n[j])
        if end > base:
            act(int(f[i]), base, buffer.take(end - base, base))
            shift[k] = buffer.used - end
    placed = np.empty(len(f), np.int64)
    placed[order] = b + np.repeat(shift, lasts - firsts + 1)
    ends = np.cumsum([c.file.size for c, _ in groups])
    return [placed[end - c.file.size : end].reshape(c.file.shape) for (c, _), end in zip(groups, ends.tolist(), strict=True)]


def _is_one_run_each(chunks: Chunks, nbytes: tuple[int, ...]) -> bool:
    """Whether the stretches of every column follow each other in one file: the usual case, told without sorting."""
    file, begin = chunks.file, chunks.begin
    return bool((file == file[0]).all() and (begin[1:] - begin[:-1] == nbytes).all())


def _place_columns(chunks: Chunks, nbytes: tuple[int, ...], buffer: Buffer, act: Callable[[int, int, memoryview], None]) -> Ints:
    """`_place` where every column is one run."""
    shifts = []
    for file, base, size in zip(chunks.file[0].tolist(), chunks.begin[0].tolist(), nbytes, strict=True):
        if size:
            act(file, base, buffer.take(size * len(chunks), base))
        shifts.append(buffer.used - base - size * len(chunks))
    return chunks.begin + np.array(shifts, np.int64)


def _verified(stack: Stack, at: Ints, channel: Channel, data: memoryview) -> Crcs | None:
    """The checksums of the sources, compared with those recorded; None where there are none, or nobody asks."""
    sources = stack.sources
    if not channel.options.verify or not sources.crcs.shape[1]:
        return None
    found = _crcs(data, at, at + np.array(stack.transfers.recipe.nbytes, np.int64))
    recorded = [k for k, count in enumerate(sources.blocks) if count]
    wrong = found[:, recorded] != sources.crcs
    for row, k in np.argwhere(wrong)[:1].tolist() if wrong.any() else ():
        t, box = stack.transfers.one(int(stack.rows[row])), recorded[k]
        channel.check(t.name, t.sources[box], (int(found[row, box]),))
    return found


def _crcs(data: memoryview, begin: Ints, end: Ints) -> Crcs:
    """The crc32 of each stretch."""
    flat = [crc32(data[a:b]) for a, b in zip(begin.ravel().tolist(), end.ravel().tolist(), strict=True)]
    return np.array(flat, np.uint32).reshape(begin.shape)


def _gather(stack: Stack, at: Ints, to: Ints, source: memoryview, target: memoryview) -> None:
    """Copy the stretches that make up the targets."""
    parts = stack.transfers.recipe.parts
    assert parts is not None
    for k, row in enumerate(parts):
        place = to[:, k]
        for s, start, stop in row:
            _copy(target, place, source, at[:, s] + start, stop - start)
            place = place + (stop - start)


def _checksums(stack: Stack, to: Ints, found: Crcs | None, data: memoryview) -> Crcs:
    """The checksums of the targets: worked out from those of the sources they consist of, else from their bytes."""
    recipe = stack.transfers.recipe
    assert recipe.parts is not None
    columns = []
    for k, parts in enumerate(recipe.parts):
        if not recipe.target_nbytes[k]:
            continue
        if found is None or len(found) < FEW or not all(map(recipe.is_whole, parts)):
            columns.append(_crcs(data, to[:, k], to[:, k] + recipe.target_nbytes[k]))
            continue
        crc = found[:, parts[0][0]]
        for s, _, stop in parts[1:]:
            crc = _shifted(crc, stop) ^ found[:, s]
        columns.append(crc)
    return np.stack(columns, 1) if columns else np.zeros((len(stack.rows), 0), np.uint32)


def _shifted(crc: Crcs, nbytes: int) -> Crcs:
    """What checksums contribute to that of a longer stretch when `nbytes` bytes follow.

    crc32(a + b) == _shifted(crc32(a), len(b)) ^ crc32(b)
    """
    table = _shift(nbytes)
    return table[0, crc & 255] ^ table[1, crc >> 8 & 255] ^ table[2, crc >> 16 & 255] ^ table[3, crc >> 24]


@lru_cache(maxsize=256)
def _shift(nbytes: int) -> Crcs:
    """The contribution of each byte of a checksum; it is linear in its bits, so those of 32 single bits tell all."""
    zeros = bytes(nbytes)
    bits = np.array([crc32(zeros, 1 << k) ^ crc32(zeros) for k in range(32)], np.uint32).reshape(4, 8)
    table = np.zeros((4, 256), np.uint32)
    for k in range(8):
        table[:, 1 << k : 2 << k] = table[:, : 1 << k] ^ bits[:, k : k + 1]
    return table


def _copy(target: memoryview, to: Ints, source: memoryview, at: Ints, nbytes: int) -> None:
    """Copy `nbytes` bytes from each place to each other place; by one call where the places are evenly spaced."""
    if len(to) > 2 and _even(to) and _even(at):
        _rows(target, to, nbytes)[:] = _rows(source, at, nbytes)
        return
    for a, b in zip(to.tolist(), at.tolist(), strict=True):
        target[a : a + nbytes] = source[b : b + nbytes]


def _even(places: Ints) -> bool:
    steps = np.diff(places)
    return bool(steps[0] > 0 and (steps == steps[0]).all())


def _rows(data: memoryview, places: Ints, nbytes: int) -> Array:
    """A view of evenly spaced stretches, as wide words as fit."""
    first, step = int(places[0]), int(places[1] - places[0])
    size = next(n for n in (8, 4, 2, 1) if not nbytes % n)
    return np.ndarray((len(places), nbytes // size), f"u{size}", data, first, (step, size))
