"""Reading any part of a tensor, with the checksums of every block that is touched."""

from __future__ import annotations

from math import prod

import numpy as np

from meshpar.checkpoint.format.boxes import Box, inside, intersect, whole
from meshpar.checkpoint.format.casts import Array, word
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import ITEMSIZE, BlockCrc, Disk
from meshpar.checkpoint.format.opened import Checkpoint, Pool
from meshpar.checkpoint.format.table import Chunk
from meshpar.checkpoint.move.jobs import slabs
from meshpar.errors import ConfigError, near

COVER = 32 << 20


class Reader:
    """Reads boxes of tensors of one checkpoint. Use as a context manager; it holds files open."""

    def __init__(self, checkpoint: Checkpoint, disk: Disk | None = None, *, verify: bool = True) -> None:
        self.checkpoint, self._disk, self._verify = checkpoint, disk or Disk(), verify
        self._pool = Pool(checkpoint, self._disk)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def read(self, name: str, box: Box | None = None, out: Array | None = None) -> Array:
        """A box of a tensor (all of it without one), as unsigned words of its element size; into `out`, an array of its size, if given.

        Raises CorruptError when a block read on the way does not match its checksum.
        """
        stored = self.checkpoint.manifest.tensors.get(name)
        if stored is None:
            raise ConfigError(f"{self.checkpoint.root} holds no tensor {name}.{near(name, self.checkpoint.manifest.tensors)}")
        box = whole(stored.shape) if box is None else box
        out = np.empty(box.size, word(stored.dtype)) if out is None else out
        for chunk in stored.chunks:
            both = intersect(chunk.box, box) if all(box.size) else None
            if both is None:
                continue
            for part in slabs(both.size, _row_cost(chunk, both, ITEMSIZE[stored.dtype]), COVER):
                piece = Box(tuple(map(sum, zip(part.offset, both.offset, strict=True))), part.size)
                out[inside(piece, box)] = self._piece(name, chunk, piece, stored.dtype)
        return out

    def _piece(self, name: str, chunk: Chunk, piece: Box, dtype: str) -> Array:
        """Read the stretch of a chunk from the first to the last element of a piece, and pick the piece out of it."""
        size = ITEMSIZE[dtype]
        strides = [prod(chunk.box.size[d + 1 :]) for d in range(len(chunk.box.size))]
        first = sum((o - b) * s for o, b, s in zip(piece.offset, chunk.box.offset, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(piece.size, strides, strict=True))
        data = self._stretch(name, chunk, first * size, (last + 1) * size)
        flat = np.frombuffer(data, word(dtype))
        return np.lib.stride_tricks.as_strided(flat, piece.size, [s * size for s in strides], writeable=False)

    def _stretch(self, name: str, chunk: Chunk, start: int, stop: int) -> bytearray:
        out = bytearray(stop - start)
        with self._pool.use(chunk.file) as fd:
            if not (self._verify and chunk.crcs):
                self._disk.read(fd, [memoryview(out)], chunk.begin + start)
                return out
            block = self.checkpoint.manifest.block
            total = prod(chunk.box.size) * ITEMSIZE[self.checkpoint.manifest.tensors[name].dtype]
            for index in range(start // block, -(-stop // block)):
                low, high = index * block, min((index + 1) * block, total)
                buffer = memoryview(bytearray(high - low))
                self._disk.read(fd, [buffer], chunk.begin + low)
                self._check(name, chunk, index, buffer, low)
                a, b = max(low, start), min(high, stop)
                out[a - start : b - start] = buffer[a - low : b - low]
        return out

    def _check(self, name: str, chunk: Chunk, index: int, data: memoryview, low: int) -> None:
        running = BlockCrc(len(data))
        running.feed(data)
        (found,) = running.finish()
        if found != chunk.crcs[index]:
            raise CorruptError(
                f"{self._pool.name(chunk.file)}, tensor {name} {chunk.box}, bytes {chunk.begin + low}..{chunk.begin + low + len(data)}: "
                f"crc32 is {found:08x}, the manifest says {chunk.crcs[index]:08x}."
            )


def _row_cost(chunk: Chunk, both: Box, size: int) -> int:
    """Bytes to read for one element of the box, counting what lies between its rows."""
    inner = next((d for d in range(len(both.size)) if both.size[d] > 1), len(both.size))
    read = prod(chunk.box.size[inner + 1 :])
    used = prod(both.size[inner + 1 :])
    return -(-size * read // max(used, 1))
