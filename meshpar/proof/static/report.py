"""What the static check found: how many calls are proved, which are not and why, and what contradicts the model's graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from meshpar.errors import ProgramFault, raise_all
from meshpar.graph.facts import facts
from meshpar.report.text import Legible


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where something is, in the user's world; `node` is the name in the lowered graph, for those who print it."""

    node: str
    call: str
    module: str | None
    source: str | None
    stage: int = 0

    def __str__(self) -> str:
        return f"{self.call} in {self.module or 'the model'} ({self.source or 'source unknown'})"


@dataclass(frozen=True, slots=True)
class Finding:
    """One call that is not proved, or that contradicts the model, and on which axis."""

    place: NodePlace
    axis: str
    told: str

    def __str__(self) -> str:
        return f"{self.place}{f', axis {self.axis}' if self.axis else ''}: {self.told}"


class Contradiction(Exception):
    """A call cannot give what it is to give."""


class Unproved(Exception):
    """Nothing is known of a call on values that are not whole."""


@dataclass(frozen=True, repr=False)
class StaticReport(Legible):
    """The result of a static check.

    `proved` counts calls whose result and gradients were derived; `unproved` holds those of which that could not be said (what follows
    from them was derived from what the plan says of them), `faults` what was proved to be wrong.
    """

    proved: int
    unproved: tuple[Finding, ...] = ()
    faults: tuple[Finding, ...] = ()

    @property
    def share(self) -> float:
        """The proved calls over all."""
        return self.proved / max(1, self.proved + len(self.unproved))

    def check(self) -> None:
        """Raise ProgramFault if anything contradicts the model."""
        raise_all(ProgramFault, HEADING, [str(fault) for fault in self.faults[:MOST]])

    def __add__(self, other: StaticReport) -> StaticReport:
        return StaticReport(self.proved + other.proved, self.unproved + other.unproved, self.faults + other.faults)

    def __str__(self) -> str:
        lines = [f"{self.proved} calls proved, {len(self.unproved)} not proved, {len(self.faults)} faults"]
        reasons = Counter(f"{finding.place.call}: {finding.told}" for finding in self.unproved)
        first = {f"{finding.place.call}: {finding.told}": finding.place for finding in reversed(self.unproved)}
        lines += [f"  not proved ({count}x, first at {first[why]}): {why}" for why, count in reasons.most_common(MOST)]
        return "\n".join([*lines, *(f"  fault: {fault}" for fault in self.faults[:MOST])])


HEADING = (
    "the static check finds that the program does not compute what the model computes. Whether the program is wrong or the check, "
    "mp.verify tells by numbers; either is an error of meshpar: please report it, with these lines."
)
MOST = 8
"""So many findings are written out."""


def place_of(node: fx.Node, stage: int = 0) -> NodePlace:
    """Where a node of a lowered graph is."""
    known = facts(node)
    return NodePlace(node.name, spoken(node), known.module, known.source, stage)


def spoken(node: fx.Node) -> str:
    """What a node calls, in a word; a parameter or an input by its name."""
    if node.op != "call_function":
        return "the output" if node.op == "output" else str(node.target)
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
