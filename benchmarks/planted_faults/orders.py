"""Faults to plant in the order of a pipeline's actions; the check of `pipeline.schedule` has to refuse each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from meshpar.errors import ConfigError, PlanError
from meshpar.pipeline.schedule import Action, Order, check, order

SIZES: Mapping[str, tuple[int, int, int]] = {
    "gpipe": (3, 3, 4), "1f1b": (3, 3, 4), "looped-bfs": (2, 4, 4), "interleaved-1f1b": (2, 4, 4), "zero-bubble": (2, 4, 4),
    "zbv": (2, 4, 4), "dualpipev": (2, 4, 4),
}  # fmt: skip
"""Schedule -> ranks, stages, microbatches."""

Rows = list[list[Action]]
Change = Callable[[Rows], bool]
"""Changes the rows of actions; False where there is no place for it."""


def _first(rows: Rows, *kinds: str) -> tuple[list[Action], int] | None:
    """The first action of one of these kinds, on the last rank that has one."""
    return next(((row, i) for row in reversed(rows) for i, a in enumerate(row) if a.kind in kinds), None)


def drop(*kinds: str) -> Change:
    def change(rows: Rows) -> bool:
        if (found := _first(rows, *kinds)) is not None:
            del found[0][found[1]]
        return found is not None

    return change


def twice(*kinds: str) -> Change:
    def change(rows: Rows) -> bool:
        if (found := _first(rows, *kinds)) is not None:
            row, at = found
            row.insert(at, row[at])
        return found is not None

    return change


def early(*kinds: str) -> Change:
    """The last action of a kind, at once."""

    def change(rows: Rows) -> bool:
        for row in rows:
            if (at := next((i for i in reversed(range(len(row))) if row[i].kind in kinds), None)) is not None:
                row.insert(0, row.pop(at))
                return True
        return False

    return change


def other_microbatch(*kinds: str) -> Change:
    """One action on the microbatch of the next of its kind."""

    def change(rows: Rows) -> bool:
        for row in rows:
            at = [i for i, a in enumerate(row) if a.kind in kinds]
            if len(at) > 1:
                row[at[0]] = replace(row[at[0]], microbatch=row[at[1]].microbatch, stage=row[at[1]].stage)
                return True
        return False

    return change


def exchanged(*kinds: str) -> Change:
    """Two transfers of one rank change places."""

    def change(rows: Rows) -> bool:
        for row in rows:
            at = [i for i, a in enumerate(row) if a.kind in kinds]
            if len(at) > 1:
                row[at[0]], row[at[1]] = row[at[1]], row[at[0]]
                return True
        return False

    return change


def elsewhere(rows: Rows) -> bool:
    """An action on the rank of another stage."""
    rows[-1].append(rows[0].pop(next(i for i, a in enumerate(rows[0]) if a.kind == "F")))
    return True


def both_ends(rows: Rows) -> bool:
    """One value is neither sent nor received."""
    sent = next((a for row in rows for a in row if a.kind == "SEND_F"), None)
    if sent is None:
        return False
    gone = (sent, Action("RECV_F", sent.stage + 1, sent.microbatch))
    rows[:] = [[a for a in row if a not in gone] for row in rows]
    return True


CHANGES: Mapping[str, Change] = {
    "a forward is left out": drop("F"),
    "a backward is left out": drop("B", "I"),
    "a gradient of the weights is left out": drop("W"),
    "a forward runs twice": twice("F"),
    "a backward runs twice": twice("B", "I"),
    "a gradient of the weights runs twice": twice("W"),
    "a backward runs before its forward": early("B", "I"),
    "a forward runs before its input is there": early("RECV_F"),
    "gradients are summed before the last microbatch": early("REDUCE_GRAD"),
    "a forward of another microbatch": other_microbatch("F"),
    "a backward of another microbatch": other_microbatch("B", "I"),
    "a value of another microbatch is sent": other_microbatch("SEND_F"),
    "two sends change places": exchanged("SEND_F"),
    "two receives change places": exchanged("RECV_B"),
    "a send is left out": drop("SEND_F", "SEND_B"),
    "a receive is left out": drop("RECV_F", "RECV_B"),
    "a value is neither sent nor received": both_ends,
    "gradients are not summed": drop("REDUCE_GRAD"),
    "gradients are summed twice": twice("REDUCE_GRAD"),
    "a rank does what belongs to another": elsewhere,
}


def planted() -> dict[tuple[str, str], str | None]:
    """(Schedule, fault) -> what is said of it; None where nothing is."""
    found: dict[tuple[str, str], str | None] = {}
    for name, sizes in SIZES.items():
        for fault, change in CHANGES.items():
            right = order(name, *sizes)
            rows = [list(row) for row in right.actions]
            if change(rows) and tuple(map(tuple, rows)) != right.actions:
                found[name, fault] = _told(replace(right, actions=tuple(map(tuple, rows))))
    return found


def _told(wrong: Order) -> str | None:
    try:
        check(wrong)
    except (PlanError, ConfigError) as error:
        return str(error)
    return None
