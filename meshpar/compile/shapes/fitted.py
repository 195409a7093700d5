"""A number of a program at sizes that were not seen, told by its values at sizes that were, and by what the forward computes with.

sizes 16, 20, 32            numbers of the forward         16 20 32    17 21 33    128 160 256        at 24:   24    25    192
a number of the program     8 10 16                        half of the first                          12
                            3 4 6                          none of them: not told
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from meshpar.compile.shapes.numbers import Differs, Number, Values


class Fitted:
    """Values at the known sizes -> value at new ones.

    `known`: for each of the known sizes, the numbers of the forward; `now`: those at the new ones. Raises Differs where one of these was
    the same for all known sizes, and is not any more: whatever else was the same may follow from it.

    >>> fitted = Fitted([[16, 17], [20, 21], [32, 33]], [24, 25])
    >>> fitted.now((8, 10, 16)), fitted.now((18, 22, 34)), fitted.now((3, 3, 3))
    (12, 26, 3)
    """

    def __init__(self, known: Sequence[Sequence[Number | None]], now: Sequence[Number | None]) -> None:
        rows: dict[Values, Number] = {}
        for row, value in zip(zip(*known, strict=True), now, strict=True):
            if value is not None and not any(one is None for one in row):
                rows[row] = value
                if value != row[0] and all(one == row[0] for one in row):  # what follows from it looks like a constant
                    raise Differs(f"a number that was {row[0]} for all shapes known is {value} now")
        self._rows = rows
        self._found: dict[tuple[type, Values], Number] = {}

    def now(self, values: Values) -> Number:
        """The value at the new sizes. Raises Differs for one that nothing tells, or several things differently."""
        if all(one == values[0] for one in values):
            return values[0]
        key = type(values[0]), values
        if key not in self._found:
            self._found[key] = self._told(values)
        return self._found[key]

    def _told(self, values: Values) -> Number:
        ways = (_float,) if isinstance(values[0], float) else (_multiple, _shifted)
        for way in ways:
            found = {told for row, value in self._rows.items() if (told := way(values, row, value)) is not None}
            if len(found) == 1:
                return found.pop()
            if found:
                break
        raise Differs(f"a number was {', '.join(map(str, values))} for the shapes known, which does not tell what it is now")


def _multiple(values: Values, row: Values, now: Number) -> Number | None:
    """A fixed part, or a multiple, of a number of the forward."""
    if isinstance(now, float) or row[0] == 0 or any(v * row[0] != values[0] * r for v, r in zip(values, row, strict=True)):
        return None
    return _whole(Fraction(int(values[0]), int(row[0])) * now)


def _shifted(values: Values, row: Values, now: Number) -> Number | None:
    """The same, and a constant."""
    if isinstance(now, float) or any(isinstance(r, float) for r in row) or len(set(zip(values, row, strict=True))) < 3:
        return None
    low, high = min(range(len(row)), key=lambda i: row[i]), max(range(len(row)), key=lambda i: row[i])
    if row[low] == row[high]:
        return None
    slope = Fraction(int(values[high] - values[low]), int(row[high] - row[low]))
    if any(values[low] + slope * int(r - row[low]) != v for v, r in zip(values, row, strict=True)):
        return None
    return _whole(int(values[low]) + slope * int(now - row[low]))


def _whole(found: Fraction) -> int | None:
    return int(found) if found.denominator == 1 else None


def _float(values: Values, row: Values, now: Number) -> Number | None:
    """A number of the forward, or a whole number over one."""
    if all(v == r for v, r in zip(values, row, strict=True)):
        return float(now)
    over = round(values[0] * row[0])
    if not over or not now or 0 in row or any(over / r != v for v, r in zip(values, row, strict=True)):
        return None
    return over / now
