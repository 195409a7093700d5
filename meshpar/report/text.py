"""Numbers and tables as text: the one place that does so."""

from __future__ import annotations

from collections.abc import Sequence


class Readable(str):
    """A string that shells and notebooks show as it reads."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def count(n: float, unit: str = "") -> str:
    """A number of bytes (or of anything) in three digits: "1.50 MiB" with unit "B".

    >>> count(1572864, "B"), count(12)
    ('1.50 MiB', '12')
    """
    base, prefixes = (
        (1024.0, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000.0, ("", " thousand", " million", " billion", " trillion"))
    )
    index = 0
    while n >= base and index < len(prefixes) - 1:
        n, index = n / base, index + 1
    number = f"{n:.0f}" if index == 0 or n >= 100 else f"{n:.3g}"
    return f"{number} {prefixes[index]}{unit}".strip() if unit else f"{number}{prefixes[index]}"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Rows of cells as lines, columns as wide as they must be; those in `right` are flush right. The first row is the heading."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
