"""Layers repeat: what was derived of one call holds for every other that says the same of values of the same kinds.

Said the same: the operator, everything among its arguments but the values, and which of these is the same as which; the call of the
model's graph that it is said to stand for is of the same kind (operator, arguments, shapes), reads the values that it is handed, in
their order, and these lie as they did. What a call's surroundings enter (random numbers, sums that are made means, stacks of experts) is
derived each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from meshpar.graph.facts import facts
from meshpar.graph.op import op_name, value_of
from meshpar.graph.operators import draws
from meshpar.proof.static.claims import Claims, LocalValue, Types, written
from meshpar.proof.static.reader import GradientEdge, GradientStep, Made, ProgramReading, key_of

_SURROUNDED = frozenset(("sum", "mean"))
"""A mean may be made of a sum."""


@dataclass(frozen=True, slots=True)
class Saying:
    """What a call says, and what it says it of."""

    key: Any
    origin: fx.Node
    operands: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class _Derived:
    results: tuple[tuple[int, Types], ...]
    edges: tuple[tuple[tuple[int, tuple[GradientStep, ...]], ...], ...]
    """For each result, the ways back, by the number of the operand."""


class Repeated:
    """What was derived in a check."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._known: dict[Any, _Derived] = {}

    def saying(self, reading: ProgramReading, node: fx.Node) -> Saying | None:
        """What a call says; None where more than that enters."""
        about = facts(node)
        part = about.part_of
        origin = None if part is None else self._claims.nodes.get(part.origin)
        if part is None or origin is None or origin.op != "call_function" or op_name(origin.target) in _SURROUNDED:
            return None
        if facts(origin).expert_stack or facts(origin).seed is not None or draws(origin) or op_name(node.target) in _SURROUNDED:
            return None
        places: dict[fx.Node, int] = {}
        text = written((node.args, node.kwargs), places)
        operands, theirs = tuple(places), origin.all_input_nodes
        if len(operands) != len(theirs):
            return None
        types = []
        for mine, wanted in zip(operands, theirs, strict=True):
            held = reading.held.get(key_of(mine))
            if held is None or held.value != value_of(wanted):
                return None
            types.append(held.types)
        return Saying((node.target, text, self._claims.kinds[origin], part.typed, part.index, tuple(types)), origin, operands)

    def made(self, saying: Saying) -> Made | None:
        """What a call that says the same makes, of the values of this one."""
        known = self._known.get(saying.key)
        if known is None:
            return None
        results = tuple(LocalValue((saying.origin, index), types) for index, types in known.results)
        keys = [key_of(n) for n in saying.operands]
        return Made(results, tuple(tuple(GradientEdge(keys[at], steps) for at, steps in edges) for edges in known.edges))

    def learn(self, saying: Saying, made: Made) -> None:
        """Keep what was derived of a call, if it is of its operands alone."""
        at = {key_of(n): i for i, n in enumerate(saying.operands)}
        own = all(r is not None and r.value[0] is saying.origin for r in made.results)
        if not own or any(edge.operand not in at for edges in made.edges for edge in edges):
            return
        results = tuple((r.value[1], r.types) for r in made.results if r is not None)
        self._known[saying.key] = _Derived(results, tuple(tuple((at[e.operand], e.steps) for e in edges) for edges in made.edges))
