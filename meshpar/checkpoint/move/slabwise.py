"""Moving transfers one by one, slab by slab: one contiguous read per source chunk, one contiguous write per target chunk.

Where a target stretch is made of whole source stretches, it is written straight from the read buffer; else its elements are copied
together, cast on the way if asked. Checksums run along, since slabs meet every chunk from its first byte to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from meshpar.checkpoint.format.boxes import Box, inside, intersect, volume, whole
from meshpar.checkpoint.format.casts import cast, word
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import BLOCK, ITEMSIZE, BlockCrc
from meshpar.checkpoint.move.channel import Buffer, Channel
from meshpar.checkpoint.move.recipes import direct, position, shared
from meshpar.checkpoint.move.transfer import ZERO, Piece, Transfer

Writes = list[tuple[int, int, list[memoryview]]]


class State:
    """A transfer on its way: the running checksums of its pieces. `is_whole`: it is moved as one slab."""

    __slots__ = ("is_whole", "source_crc", "target_crc", "transfer")

    def __init__(self, transfer: Transfer, *, is_whole: bool) -> None:
        self.transfer, self.is_whole = transfer, is_whole
        self.source_crc: dict[int, BlockCrc] = {}
        self.target_crc: list[tuple[int, ...] | BlockCrc | None] = [None] * len(transfer.targets)

    def finish(self) -> list[int]:
        """The checksums of all targets, one after the other."""
        rows = (crc.finish() if isinstance(crc, BlockCrc) else crc or () for crc in self.target_crc)
        return [crc for row in rows for crc in row]


class Part(NamedTuple):
    """The stretch of a piece that lies in the slab at hand."""

    file: int
    offset: int
    nbytes: int
    state: State
    piece: int
    box: Box


class Held(NamedTuple):
    """A part that was read: its bytes, and its checksums where it is a whole piece."""

    view: memoryview
    crcs: tuple[int, ...] | None


class Slabs:
    """Moves slabs through the two buffers of a worker."""

    def __init__(self, channel: Channel, read: Buffer, write: Buffer) -> None:
        self._channel, self._options = channel, channel.options
        self._in, self._out = read, write

    def move(self, unit: Sequence[tuple[State, Box]]) -> None:
        """Move slabs that fit the buffers together."""
        self._in.reset()
        self._out.reset()
        sources = [_parts(state, state.transfer.sources, ITEMSIZE[state.transfer.dtype], slab) for state, slab in unit]
        views = self._read([part for parts in sources for part in parts], self._in)
        writes: Writes = []
        for (state, slab), parts in zip(unit, sources, strict=True):
            held = [(part.box, views[id(part)]) for part in parts]
            for part in _parts(state, state.transfer.targets, ITEMSIZE[state.transfer.target_dtype], slab):
                out, crcs = self._assemble(state.transfer, part, held)
                self._emit(state, part, out, crcs, writes)
        self._write(writes)

    def _read(self, parts: list[Part], buffer: Buffer) -> dict[int, Held]:
        """Fill the buffer with the parts, neighbours in one call."""
        views: dict[int, Held] = {}
        ordered = sorted(parts, key=lambda p: (p.file, p.offset))
        at = 0
        while at < len(ordered):
            first = ordered[at]
            end, stop = first.offset + first.nbytes, at + 1
            while stop < len(ordered) and ordered[stop].file == first.file and ordered[stop].offset == end and first.file != ZERO:
                end += ordered[stop].nbytes
                stop += 1
            view = buffer.take(end - first.offset, first.offset)
            self._channel.fill(first.file, first.offset, view)
            for part in ordered[at:stop]:
                start = part.offset - first.offset
                piece = view[start : start + part.nbytes]
                views[id(part)] = Held(piece, self._verify(part, piece))
            at = stop
        return views

    def _verify(self, part: Part, view: memoryview) -> tuple[int, ...] | None:
        """Compare with the recorded checksums once a piece is complete; the checksums when this was all of it."""
        piece = part.state.transfer.sources[part.piece]
        if not self._options.verify or not piece.crcs:
            return None
        full = part.box is piece.box or part.box == piece.box
        if full and part.nbytes <= self._options.source_block:
            found: tuple[int, ...] = (crc32(view),) if part.nbytes else ()
            return self._matching(part, piece, found)
        running = (
            BlockCrc(self._options.source_block)
            if full
            else part.state.source_crc.setdefault(part.piece, BlockCrc(self._options.source_block))
        )
        running.feed(view)
        if part.offset + part.nbytes < piece.begin + volume(piece.box.size) * ITEMSIZE[part.state.transfer.dtype]:
            return None
        used = self._matching(part, piece, running.finish())
        return used if full else None

    def _matching(self, part: Part, piece: Piece, found: tuple[int, ...]) -> tuple[int, ...] | None:
        """The checksums found, if they are the recorded ones and can be used for the target as well."""
        self._channel.check(part.state.transfer.name, piece, found)
        return found if self._options.source_block == BLOCK else None

    def _assemble(self, t: Transfer, part: Part, held: Sequence[tuple[Box, Held]]) -> tuple[list[memoryview], tuple[int, ...] | None]:
        """The bytes of one target stretch: pieces of the read buffer where they fit, else copied together."""
        if t.dtype == t.target_dtype and len(held) == 1 and held[0][0] == part.box:
            return [held[0][1].view], held[0][1].crcs
        pieces = shared(part.box, [(box, has.view) for box, has in held], is_all=part.state.is_whole and len(t.targets) == 1)
        if t.dtype == t.target_dtype:
            views = direct(part.box, pieces, ITEMSIZE[t.dtype])
            if views is not None:
                return views, None
        view = self._out.take(part.nbytes, part.offset)
        target = np.frombuffer(view, word(t.target_dtype)).reshape(part.box.size)
        for both, box, data in pieces:
            source = np.frombuffer(data, word(t.dtype)).reshape(box.size)[inside(both, box)]
            target[inside(both, part.box)] = cast(source, t.dtype, t.target_dtype, t.name, exact=t.exact).reshape(both.size)
        return [view], None

    def _emit(
        self,
        state: State,
        part: Part,
        out: list[memoryview],
        crcs: tuple[int, ...] | None,
        writes: Writes,
    ) -> None:
        """Add a target stretch to the writes and to the running checksum of its piece."""
        t = state.transfer
        if part.file == ZERO:
            if any(np.frombuffer(view, np.uint8).any() for view in out):
                raise CorruptError(f"{t.name} {part.box} should be padding, but holds values other than zero.")
            return
        writes.append((part.file, part.offset, out))
        if not self._options.checksums:
            return
        if crcs is not None and part.box == t.targets[part.piece].box:
            state.target_crc[part.piece] = crcs
            return
        running = state.target_crc[part.piece]
        if not isinstance(running, BlockCrc):
            running = state.target_crc[part.piece] = BlockCrc()
        for view in out:
            running.feed(view)

    def _write(self, writes: Writes) -> None:
        writes.sort(key=lambda w: w[:2])
        at = 0
        while at < len(writes):
            file, offset, views = writes[at]
            end = offset + sum(map(len, views))
            views, stop = list(views), at + 1
            while stop < len(writes) and writes[stop][0] == file and writes[stop][1] == end:
                views += writes[stop][2]
                end += sum(map(len, writes[stop][2]))
                stop += 1
            self._channel.put(file, offset, views, end - offset)
            at = stop

    def rearrange(self, state: State, slab: Box) -> None:
        """Assemble a slab whole, change its order, and write its parts; one at a time, since it uses the spare memory."""
        t = state.transfer
        assert t.rearrange is not None
        with self._channel.rearranging:
            parts = _parts(state, t.sources, ITEMSIZE[t.dtype], slab)
            buffer = Buffer(sum(p.nbytes + 16 for p in parts))
            views = self._read(parts, buffer)
            full = np.empty(slab.size, word(t.dtype))
            for part in parts:
                full[inside(part.box, slab)] = np.frombuffer(views[id(part)].view, word(t.dtype)).reshape(part.box.size)
            del views, buffer
            is_all = slab == whole(t.shape)
            full = (t.rearrange if is_all else t.rearrange.of_rows(slab.size[0])).apply(full)
            place = whole(t.rearrange.shape) if is_all else Box((slab.offset[0], *(0,) * (full.ndim - 1)), full.shape)
            for part in _parts(state, t.targets, ITEMSIZE[t.target_dtype], place):
                bits = cast(np.ascontiguousarray(full[inside(part.box, place)]), t.dtype, t.target_dtype, t.name, exact=t.exact)
                writes: Writes = []
                self._emit(state, part, [np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data], None, writes)
                self._write(writes)


def _parts(state: State, pieces: Sequence[Piece], itemsize: int, slab: Box) -> list[Part]:
    """The stretches of pieces that lie in a slab."""
    if state.is_whole:
        return [Part(p.file, p.begin, volume(p.box.size) * itemsize, state, k, p.box) for k, p in enumerate(pieces)]
    out = []
    for index, piece in enumerate(pieces):
        both = intersect(piece.box, slab)
        if both is not None:
            offset = piece.begin + position(both, piece.box) * itemsize
            out.append(Part(piece.file, offset, volume(both.size) * itemsize, state, index, both))
    return out
