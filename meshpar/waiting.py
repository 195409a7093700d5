"""What takes longer than two seconds says so to whoever watches: a terminal, or a notebook that somebody runs.

    with working("reading weights"):
        for name in each(names):
            ...

    ⠋ reading weights ━━━━━━━━━━━━╺━━━━━━━━━━━ 151/291 0:00:07        on the error stream of rank 0, gone when it is done
    ⠙ capturing Net 0:00:03                                           where the number of steps is not known

In a notebook it is a line below the cell. Nothing is shown where nobody watches (logs, pipes, tests, notebooks that a program runs), on
other ranks, without rich (on terminals), and after `mp.progress(False)`. What runs inside another one changes its words.
"""

from __future__ import annotations

import contextvars
import html
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

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
    """Say `text` to whoever watches while the body runs, once it has run for two seconds."""
    outer = _LINE.get()
    if outer is not None:
        with outer.saying(Doing(text)):
            yield
        return
    screen = _screen()
    if screen is None:
        yield
        return
    line = WaitingLine(text, screen)
    token = _LINE.set(line)
    try:
        yield
    finally:
        _LINE.reset(token)
        line.end()


def each(items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """`items`, one after the other, as what the `working` around it does: it says how many of them are done. Alone, nothing is said.

    `total`: their number, where `items` has no length.
    """
    line = _LINE.get()
    if line is None:
        yield from items
        return
    phase = Doing(line.phase.text, len(items) if isinstance(items, Sized) else total)
    with line.saying(phase):
        for item in items:
            yield item
            phase.done += 1


@dataclass
class Doing:
    """What is being done, and how much of it is."""

    text: str
    total: int | None = None
    done: int = 0


class WaitingLine:
    """One line of a screen, which a thread writes again and again; it starts when something has lasted."""

    def __init__(self, text: str, screen: Callable[[], Screen]) -> None:
        self.phase, self._begun, self._screen = Doing(text), time.monotonic(), screen
        self._ended = threading.Event()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)
        self._thread.start()

    @contextmanager
    def saying(self, phase: Doing) -> Iterator[None]:
        """Other words for a while."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def end(self) -> None:
        """Take the line away."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        if self._ended.wait(AFTER):
            return
        screen = self._screen()
        try:
            while not self._ended.is_set():
                screen.show(self.phase, self._elapsed())
                self._ended.wait(0.2)
        finally:
            screen.close()

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._begun)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class Screen(Protocol):
    """Where the line is written."""

    def show(self, phase: Doing, elapsed: str) -> None:
        """Write it anew."""

    def close(self) -> None:
        """Leave nothing behind."""


def _screen() -> Callable[[], Screen] | None:
    """Who watches this process; None where nobody does, or does not want to."""
    if not _WANTED.get() or _is_other_rank():
        return None
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            import rich.progress  # noqa: F401
        except ImportError:
            return None
        return Terminal
    return Notebook if _in_notebook() else None


def _is_other_rank() -> bool:
    dist: Any = sys.modules.get("torch.distributed")  # (what needs no torch does not wait for it)
    return bool(dist and dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake" and dist.get_rank() != 0)


def _in_notebook() -> bool:
    """Whether this is the process of a notebook that somebody could be asked for input in: programs that run notebooks say they cannot."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None or multiprocessing.parent_process() is not None else ipython.get_ipython()
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


class Terminal:
    """The last line of a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn

        text, elapsed = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[elapsed]}")
        self._open: tuple[ProgressColumn, ...] = (SpinnerColumn(), text, elapsed)
        self._known: tuple[ProgressColumn, ...] = (SpinnerColumn(), text, BarColumn(24), MofNCompleteColumn(), elapsed)
        self._bar = Progress(*self._open, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._task = self._bar.add_task("", total=None, elapsed="")
        self._bar.start()

    def show(self, phase: Doing, elapsed: str) -> None:
        """Write it anew."""
        self._bar.columns = self._open if phase.total is None else self._known
        self._bar.update(self._task, description=phase.text, completed=phase.done, total=phase.total, elapsed=elapsed, refresh=True)

    def close(self) -> None:
        """Leave nothing behind."""
        self._bar.stop()


class Notebook:
    """A line below a cell."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, phase: Doing, elapsed: str) -> None:
        """Write it anew."""
        counts = "" if phase.total is None else f" {phase.done}/{phase.total}"
        bar = "" if phase.total is None else f'<progress value="{phase.done}" max="{phase.total}"></progress>'
        self._put(f"{phase.text}{counts} {elapsed}", f"{html.escape(phase.text)} {bar}{counts} {elapsed}")

    def close(self) -> None:
        """Leave nothing behind."""
        self._put("", "")

    def _put(self, plain: str, rich: str) -> None:
        from IPython.display import display

        data = {"text/plain": plain, "text/html": rich}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
