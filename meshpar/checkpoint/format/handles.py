"""Descriptors of many files, of which the first ones asked for stay open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Handles:
    """Opens files by number, with `fresh`, for many threads; at most `limit` of them stay open between uses."""

    def __init__(self, fresh: Callable[[int], int], limit: int = 256) -> None:
        self._fresh, self._limit = fresh, limit
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, file: int) -> Iterator[int]:
        """A descriptor of a file."""
        fd = self._open.get(file)
        if fd is not None:
            yield fd
            return
        with self._lock:
            fd = self._open.get(file)
            keep = fd is not None
            if fd is None:
                fd = self._fresh(file)
                keep = len(self._open) < self._limit
                if keep:
                    self._open[file] = fd
        try:
            yield fd
        finally:
            if not keep:
                os.close(fd)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
