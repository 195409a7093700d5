"""Numbers and tables as text: the one place that does so."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Legible:
    """Something whose text is a table: shells show it as it reads, notebooks by sections that can be folded."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(str(self))


class Readable(Legible, str):
    """A string that shells and notebooks show as it reads."""

    __slots__ = ()


def as_html(text: str) -> str:
    """A text as notebooks show it: what stands between empty lines is a section, headed by its first line, the first of them unfolded.

    >>> as_html("Memory of a rank")
    '<div><div><b>Memory of a rank</b></div></div>'
    """
    sections = [section.strip("\n").partition("\n") for section in text.split("\n\n") if section.strip()]
    return f"<div>{''.join(_section(head, body, not at) for at, (head, _, body) in enumerate(sections))}</div>"


def _section(head: str, body: str, unfolded: bool) -> str:
    if not body:
        return f"<div><b>{escape(head)}</b></div>"
    style = "margin:0 0 .5em 1em;line-height:1.25"
    return f'<details{" open" * unfolded}><summary><b>{escape(head)}</b></summary><pre style="{style}">{escape(body)}</pre></details>'


def count(n: float, unit: str = "") -> str:
    """A number of bytes (or of anything) in three digits at most: "1.5 MiB" with unit "B".

    >>> count(1572864, "B"), count(12)
    ('1.5 MiB', '12')
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
