"""What a verification found, as numbers and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, prod
from typing import Any

import torch

from meshpar.errors import MeshparError
from meshpar.mesh import format_mesh
from meshpar.proof.expected import few
from meshpar.report.text import Legible


class VerificationError(MeshparError, AssertionError):
    """The parallel program does not compute what the model computes."""


@dataclass(frozen=True)
class Difference:
    """How far one quantity of the parallel program is from the original's: the largest relative difference, and where it is."""

    quantity: str
    compared: int
    largest: float
    worst: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, repr=False)
class Report(Legible):
    """What `verify` found. Its text is a table."""

    model: str
    mesh: Mapping[str, int]
    ranks: str
    """"simulated ranks", "gloo processes" or "ranks"."""
    dtype: torch.dtype
    steps: int
    tolerance: float
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    """Why the comparison proves nothing, where it does not."""
    silent: tuple[str, ...] = ()
    """The parameters of which it proves nothing: a program without their gradients would pass."""
    where: tuple[str, ...] = ()
    """On a difference, where values or gradients part first."""

    @property
    def ok(self) -> bool:
        """Whether every difference is within the tolerance, and that says something."""
        return not self.unproved and self.agrees

    @property
    def agrees(self) -> bool:
        """Whether every difference is within the tolerance."""
        return all(d.largest <= self.tolerance for d in self.differences)

    def __getitem__(self, quantity: str) -> Difference:
        return next(d for d in self.differences if d.quantity == quantity)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        differences = [{**asdict(d), "ok": d.largest <= self.tolerance} for d in self.differences]
        return {"ok": self.ok, **own, "mesh": dict(self.mesh), "dtype": str(self.dtype).removeprefix("torch."), "differences": differences}

    def raise_if_failed(self) -> Report:
        """Raise VerificationError with the table unless all is well; returns the report."""
        if not self.ok:
            raise VerificationError(str(self))
        return self


def difference(quantity: str, values: Mapping[str, float]) -> Difference:
    """One quantity, from the distances of its parts by name."""
    worst = sorted(values.items(), key=lambda item: -item[1])[:3]
    return Difference(quantity, len(values), worst[0][1] if worst else 0.0, tuple(worst))


def _lines(report: Report) -> Iterator[str]:
    name = str(report.dtype).removeprefix("torch.")
    verdict = "FAILED" if not report.agrees else "PROVES NOTHING" if report.unproved else "OK"
    yield (
        f"verify {report.model} on {format_mesh(report.mesh)} ({prod(report.mesh.values())} {report.ranks}) against one device, in {name}: "
        f"{verdict}"
    )
    width = max(len(d.quantity) for d in report.differences)
    if report.dtype == torch.bfloat16:
        yield f"  {'':{width}}  compared  in units of what {name} does to the model on one device   (tolerance {report.tolerance:g})"
    else:
        yield f"  {'':{width}}  compared  largest relative difference   (tolerance {report.tolerance:.0e})"
    for d in report.differences:
        state = "ok" if d.largest <= report.tolerance else "FAILED"
        yield f"  {d.quantity:{width}}  {d.compared:8}  {_number(d.largest)}  {state:6}  {_worst(d, report.tolerance)}".rstrip()
    for reason in report.unproved:
        yield f"  proves nothing: {reason}"
    if report.silent and not report.unproved:
        yield f"  of {few(report.silent)} nothing is proved: zero gradients on one device, or too small beside others to be missed."
    for line in report.where:
        yield f"  {line}"
    for note in report.notes:
        yield f"  note: {note}"


def _number(value: float) -> str:
    return f"{value:.1e}" if value < inf else "   inf "


def _worst(d: Difference, tolerance: float) -> str:
    """The worst name, and when it failed the worst three."""
    if d.compared <= 1:
        return ""
    return ", ".join(f"{name} {_number(value).strip()}" for name, value in d.worst[: 3 if d.largest > tolerance else 1])
