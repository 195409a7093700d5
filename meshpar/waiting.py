"""What takes longer than two seconds says so on a terminal, and nowhere else.

    with working("capturing Net"):
        ...

    ⠋ capturing Net 0:00:07            on the error stream of rank 0, gone when it is done

Nothing is shown where the error stream is no terminal (logs, pipes, notebooks, tests), on other ranks, without rich, and after
`mp.progress(False)`. What runs inside another one changes its words.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

AFTER = 2.0
"""Seconds of silence."""
_WANTED: ContextVar[bool] = ContextVar("wanted", default=True)
_LINE: ContextVar[WaitingLine | None] = ContextVar("line", default=None)


def progress(on: bool) -> None:
    """Switch what takes long to say so on (as it is at first) or off, from here on.

    >>> progress(False)
    >>> progress(True)
    """
    _WANTED.set(bool(on))


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say `text` on the terminal while the body runs, once it has run for two seconds."""
    outer = _LINE.get()
    if outer is not None:
        with outer.saying(text):
            yield
        return
    if not _shown():
        yield
        return
    line = WaitingLine(text)
    token = _LINE.set(line)
    try:
        yield
    finally:
        _LINE.reset(token)
        line.end()


def _shown() -> bool:
    stream = sys.stderr
    if not _WANTED.get() or stream is None or not stream.isatty():
        return False
    dist: Any = sys.modules.get("torch.distributed")  # (what needs no torch does not wait for it)
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake" and dist.get_rank() != 0:
        return False
    try:
        import rich.console  # noqa: F401
    except ImportError:
        return False
    return True


class WaitingLine:
    """One line of a terminal, which a thread writes again and again; it starts when something has lasted."""

    def __init__(self, text: str) -> None:
        self._text, self._begun = text, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def saying(self, text: str) -> Iterator[None]:
        """Other words for a while."""
        before, self._text = self._text, text
        try:
            yield
        finally:
            self._text = before

    def end(self) -> None:
        """Take the line away."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        if self._ended.wait(AFTER):
            return
        from rich.console import Console

        with Console(stderr=True).status(self._said()) as status:
            while not self._ended.wait(0.5):
                status.update(self._said())

    def _said(self) -> Any:
        from rich.text import Text

        seconds = int(time.monotonic() - self._begun)
        return Text(f"{self._text} {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}")
