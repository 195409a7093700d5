"""Numbers that depend on the shape of a batch: which is which, told by the values they had for earlier shapes.

    for lengths 16, 20    16, 20     17, 21     64, 80     8, 8
    for length 23         23         24         92         8

A number that is seen in the forward had a value for every known shape, and has one for the new shape. Whatever else had the same values for
all known shapes is the same number. Where two numbers had the same values and differ now, nothing is said: one of them does not follow from
the sizes as it seemed to (`min(length, 20)`), or the known shapes are too alike (4 samples of 4 heads).
"""

from __future__ import annotations

from collections.abc import Sequence

Number = int | float
Values = tuple[Number, ...]


class Differs(Exception):
    """The program of the new shape is not that of the known ones with other numbers; the reason, for the user."""


class NewNumbers:
    """Values for known shapes -> value for the new one.

    >>> numbers = NewNumbers([[16, 8, 17], [20, 8, 21]], [23, 8, 24])
    >>> numbers.now((17, 21)), numbers.now((3, 3))
    (24, 3)
    """

    def __init__(self, known: Sequence[Sequence[Number]], now: Sequence[Number]) -> None:
        self._now: dict[tuple[type, Values], Number] = {}
        for key, value in dict.fromkeys(zip(zip(*known, strict=True), now, strict=True)):
            self.add(key, value)

    def add(self, key: Values, value: Number) -> None:
        """Learn one more. Raises Differs where that contradicts what is known."""
        if all(one == key[0] for one in key) and value != key[0]:
            raise Differs(f"a number that was {key[0]} for the shapes known is {value} now")
        if self._now.setdefault((type(value), key), value) != value:
            raise Differs(f"two numbers that were {' and '.join(map(str, key))} for the shapes known differ now")

    def now(self, key: Values) -> Number:
        """The value for the new shape. Raises Differs for a number that was not seen."""
        if all(one == key[0] for one in key):
            return key[0]
        found = self._now.get((type(key[0]), key))
        if found is None and type(key[0]) is float and (count := self._now.get((int, key))) is not None:
            return float(count)  # (a mean divides by how many there are)
        if found is None:
            raise Differs(f"a number was {' and '.join(map(str, key))} for the shapes known, which the forward does not show")
        return found
