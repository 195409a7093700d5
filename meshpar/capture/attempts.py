"""Ways to do one thing, in order: the first that works is taken, and if none does the error says what each of them met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from meshpar.errors import CaptureError

T = TypeVar("T")


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """One way. `way`: in words, after "tried as well"; `when`: whether it is worth trying, asked after all earlier ones have failed.

    `tells`: kinds of errors of this way that say more than those of the way before.
    """

    way: str
    run: Callable[[], T]
    when: Callable[[], bool] = _always
    tells: tuple[type[CaptureError], ...] = ()


def first_that_works(attempts: Sequence[Attempt[T]]) -> T:
    """The result of the first attempt that raises no CaptureError.

    Raises the error of the first one (or of one that tells more), with the first line of what the others met.

    >>> first_that_works([Attempt("as it is", lambda: 1), Attempt("otherwise", lambda: 2)])
    1
    """
    failed: list[tuple[str, CaptureError]] = []
    told: CaptureError | None = None
    for attempt in attempts:
        if failed and not attempt.when():
            continue
        try:
            return attempt.run()
        except CaptureError as error:
            told = error if told is None or (isinstance(error, attempt.tells) and len(failed) == 1) else told
            failed.append((attempt.way, error))
    assert told is not None
    rest = dict.fromkeys(f"Tried as well, {way}: {_first_line(error)}" for way, error in failed if _first_line(error) != _first_line(told))
    raise type(told)("\n  ".join((str(told), *rest))) from told.__cause__


def _first_line(error: CaptureError) -> str:
    return str(error).partition("\n")[0]
