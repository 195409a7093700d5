"""Operators that hang together become one before the program is solved: fewer variables, and far less to search.

A result with a single use is nobody else's business: the operator that makes it and the one that uses it are typed together, once for each
way in which the pair meets the world. What happens in between (also a conversion) is settled here, exactly.

    linear ── view ── transpose ─┐
    linear ── view ── transpose ─┼─ attention      4 operators and their weights with a few typings each: one group
    linear ── view ── transpose ─┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshpar.graph.facts import Info
from meshpar.sharding.types import Type

StepSource = tuple[int, int] | int
"""(step, result) inside the problem, or an index into what is given from outside."""
Convert = Callable[[Type, Type, Info, bool], "float | None"]
"""Cost of a conversion (the last argument says whether it is a parameter's), None where there is none."""

MOST = 24
"""Groups with more typings than this stay apart."""


@dataclass(frozen=True, slots=True)
class Way:
    """One typing of a group: what it uses and makes, what it costs, and the typing of each member."""

    uses: tuple[Type, ...]
    outs: tuple[Type, ...]
    cost: float
    picks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Steps typed together. The last member's results are the group's."""

    members: tuple[int, ...]
    ways: tuple[Way, ...]
    operands: tuple[StepSource, ...]
    outs: tuple[Info | None, ...]

    @property
    def is_parameter(self) -> bool:
        """Whether it makes its result from nothing."""
        return not self.operands and len(self.members) == 1


def contract(groups: Sequence[Group], wanted: frozenset[int], convert: Convert) -> tuple[Group, ...]:
    """Join what can be joined. `groups` hold one step each, in order; the results of steps in `wanted` are needed outside.

    The cheapest choice among the groups costs what the cheapest among the steps does.
    """
    uses = Counter(source for group in groups for source in group.operands)
    found: dict[int, Group] = {}
    for index, group in enumerate(groups):
        for place in reversed(range(len(groups[index].operands))):
            source = group.operands[place]
            if isinstance(source, int) or uses[source] > 1 or source[0] in wanted or len(groups[source[0]].outs) > 1:
                continue
            joined = _join(found[source[0]], group, place, convert)
            if joined is not None:
                group = joined
                del found[source[0]]
        found[index] = group
    return tuple(found.values())


def _join(maker: Group, user: Group, place: int, convert: Convert) -> Group | None:
    """Both as one group, or None when that has too many typings (or none, which the program will complain about)."""
    info = maker.outs[0]
    assert info is not None
    best: dict[tuple[tuple[Type, ...], tuple[Type, ...]], Way] = {}
    made: dict[Type, list[Way]] = {}
    for way in user.ways:
        type_ = way.uses[place]
        if type_ not in made:
            made[type_] = _made(maker, type_, info, convert)
        for before in made[type_]:
            uses = (*way.uses[:place], *before.uses, *way.uses[place + 1 :])
            cost = before.cost + way.cost
            old = best.get((uses, way.outs))
            if old is None or cost < old.cost:
                best[uses, way.outs] = Way(uses, way.outs, cost, before.picks + way.picks)
        if len(best) > MOST:
            return None
    operands = (*user.operands[:place], *maker.operands, *user.operands[place + 1 :])
    return Group(maker.members + user.members, tuple(best.values()), operands, user.outs) if best else None


def _made(maker: Group, type_: Type, info: Info, convert: Convert) -> list[Way]:
    """The ways in which `maker` leads to a result of this type, conversion included: the cheapest for each set of uses."""
    best: dict[tuple[Type, ...], Way] = {}
    for way in maker.ways:
        extra = 0.0 if way.outs[0] == type_ else convert(way.outs[0], type_, info, maker.is_parameter)
        if extra is not None:
            old = best.get(way.uses)
            if old is None or way.cost + extra < old.cost:
                best[way.uses] = Way(way.uses, (type_,), way.cost + extra, way.picks)
    return list(best.values())
