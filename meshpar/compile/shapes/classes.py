"""The graphs of a model by kind of batch: those of new shapes are made of those that were captured, where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from meshpar.capture.witness import Unseen
from meshpar.compile.shapes.numbers import Differs
from meshpar.compile.shapes.template import Template, Testify
from meshpar.compile.signature import BatchSignature
from meshpar.graph.captured import Captured

TEMPLATES = 4
"""Graphs that are kept for one kind of batch: a forward that branches on a size has several."""


@dataclass
class Count:
    """How often graphs were captured and made of others, and why they were not."""

    captured: int = 0
    made: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class KnownShapes:
    """Graphs of known shapes. `count` says what became of the new ones."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[Template]] = {}
        self.count = Count()

    def captured(self, kind: Hashable, capture: Callable[[], Captured], testify: Testify, again: Testify) -> Captured:
        """The graph for a batch of this kind. `testify`: watches its forward; `again`: the same at any later time."""
        templates = self._kinds.setdefault(kind, [])
        witness, reasons = None, dict[str, None]()
        for template in templates:
            try:
                witness = witness or testify(template.captured)
                found = template.at(witness)
                self.count.made += 1
                return found
            except (Differs, Unseen) as error:
                reasons[str(error)] = None
        self.count.captured += 1
        for reason in reasons:
            self.count.reasons[reason] = self.count.reasons.get(reason, 0) + 1
        captured = capture()
        if not any(template.add(captured, witness) for template in templates):
            templates.insert(0, Template(captured, witness, again))
            del templates[TEMPLATES:]
        return captured

    def told(self, plans: int) -> tuple[str, ...]:
        """What became of new shapes, for `explain`. `plans`: how many of their plans were made of others."""
        count = self.count
        lines = [f"{count.captured} graphs captured, {count.made} made of these by sizes alone, with {plans} plans made of others"]
        return (*lines, *(f"captured because {reason} ({times}x)" for reason, times in count.reasons.items()))


def kind_of(signature: BatchSignature, *more: Hashable) -> Hashable:
    """What batches have alike whose graphs may differ in numbers alone: all but the sizes of tensors."""
    leaves = tuple((len(leaf[0]), *leaf[1:]) if isinstance(leaf[0], tuple) else leaf for leaf in signature.leaves)
    return str(signature.spec), leaves, signature.training, *more
