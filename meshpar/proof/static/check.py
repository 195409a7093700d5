"""The static check of a program: read every graph of it forward, then follow the gradients back.

It shares no code with what decides (`sharding.solve`) and what lowers (`passes.lower`): it knows the types, the model's graph, where
parameters and inputs lie, and what operators and collectives compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from meshpar.proof.static.claims import Claims
from meshpar.proof.static.derive import Derive
from meshpar.proof.static.expanded import expanded
from meshpar.proof.static.gradients import Backward
from meshpar.proof.static.reader import LocalKey, ProgramReading
from meshpar.proof.static.report import StaticReport


@dataclass(frozen=True)
class ProgramPart:
    """One graph of a program: the whole of it, or a stage. `receives` names what the part before `sends`, one by one."""

    graph: fx.Graph
    receives: tuple[str, ...] = ()
    sends: tuple[str, ...] = ()
    returns: tuple[int, ...] = ()
    """Which values of the model's graph it returns, after what it sends."""


def check(claims: Claims, ways: Sequence[Sequence[ProgramPart]]) -> StaticReport:
    """What can be proved of a program, and what contradicts. Runs nothing. `ways`: its graph as one part, or in stages, one way or two."""
    read = _ReadOnce(claims)
    return sum((read(parts) for parts in ways if claims.axes or len(parts) > 1), StaticReport(0))


class _ReadOnce:
    """Reads a program in each of its ways. Stages that two of them begin with are read once."""

    def __init__(self, claims: Claims) -> None:
        self._claims, self._derive = claims, Derive(claims)
        self._known: dict[tuple[ProgramPart, ...], tuple[ProgramReading, list[LocalKey | None]]] = {}
        """Stages from the first one on -> what was read of them, and what the last of them sends."""

    def __call__(self, parts: Sequence[ProgramPart]) -> StaticReport:
        reading, sent = ProgramReading(self._claims, self._derive), list[LocalKey | None]()
        for stage, part in enumerate(parts):
            until = tuple(parts[: stage + 1])
            if until in self._known:
                reading, sent = self._known[until]
                continue
            reading = reading.copy()
            reading.stage = stage
            received = {name: key for name, key in zip(part.receives, sent) if key is not None}
            sent = reading.read(expanded(part.graph), received, [*(None for _ in part.sends), *part.returns])[: len(part.sends)]
            self._known[until] = reading, sent
        reading = reading.copy()
        Backward(reading).run()
        return StaticReport(reading.proved, tuple(reading.unproved), tuple(reading.faults))
