"""The two ends of a move: files to read from and files to write to, with what went through them, and the buffers in between."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.move.transfer import ZERO, Options, Piece


class Files(Protocol):
    """Where pieces are read from or written to."""

    def use(self, file: int) -> AbstractContextManager[int]: ...

    def name(self, file: int) -> str: ...


@dataclass
class Traffic:
    """Bytes and calls as they happened."""

    read: int = 0
    written: int = 0
    reads: int = 0
    writes: int = 0


@dataclass
class Channel:
    """What all workers share."""

    source: Files
    target: Files
    options: Options
    disk: Disk
    traffic: Traffic = field(default_factory=Traffic)
    rearranging: threading.Lock = field(default_factory=threading.Lock)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, file: int, offset: int, view: memoryview) -> None:
        """Read bytes of a source into a view."""
        if file == ZERO:
            np.frombuffer(view, np.uint8)[:] = 0
        elif len(view):
            with self.source.use(file) as fd:
                self.disk.read(fd, [view], offset)
            with self.counting:
                self.traffic.read += len(view)
                self.traffic.reads += 1

    def put(self, file: int, offset: int, views: Sequence[memoryview], nbytes: int) -> None:
        """Write `nbytes` bytes of views, one after the other, to a target."""
        with self.target.use(file) as fd:
            self.disk.write(fd, views, offset)
        with self.counting:
            self.traffic.written += nbytes
            self.traffic.writes += 1

    def check(self, name: str, piece: Piece, found: tuple[int, ...]) -> None:
        """Raise CorruptError if these are not the recorded checksums of a source piece."""
        if found == piece.crcs:
            return
        block = self.options.source_block
        bad = next(i for i, (a, b) in enumerate(zip(found, piece.crcs, strict=True)) if a != b)
        raise CorruptError(
            f"{self.source.name(piece.file)}, tensor {name} {piece.box}, bytes from {piece.begin + bad * block} (block {bad}): "
            f"crc32 is {found[bad]:08x}, the manifest says {piece.crcs[bad]:08x}. Copy this file again from where it was written."
        )


class Buffer:
    """A reused stretch of memory, handed out front to back, as aligned as the file offsets are."""

    def __init__(self, size: int) -> None:
        self.data = np.empty(size + 64, np.uint8).data.cast("B")
        self.used = 0

    def reset(self) -> None:
        self.used = 0

    def take(self, nbytes: int, offset: int) -> memoryview:
        start = self.used + (offset - self.used) % 16
        self.used = start + nbytes
        if self.used > len(self.data):
            # only hundreds of stretches in one slab get here: alignment took more than the slack
            return np.empty(nbytes, np.uint8).data.cast("B")
        return self.data[start : self.used]
