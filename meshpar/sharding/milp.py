"""A 0-1 program over the typings of a group of operators: pick one typing each and pay for the conversions in between.

Variables: one per (operator, typing); one per (value, type it is made in, type it is wanted in), shared by all who want it so, so that
three projections of one input pay for one all-gather. Every use must find its value made in that type or converted to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_matrix, csr_matrix

from meshpar.errors import PlanError
from meshpar.graph.facts import Info
from meshpar.sharding.contract import Group, StepSource, Way, contract
from meshpar.sharding.conversions import ALL_GATHER, cost, wire_bytes
from meshpar.sharding.price import Price
from meshpar.sharding.types import Owned, Partial, Ragged, Replicate, Shard, Type
from meshpar.sharding.typings import Choice

_GATHERED = 1000.0
"""Gathering a parameter that was cut is for rules that ask for nothing else: data parallelism does that better."""
_EXACT, _NEAR, _ANY = 1e-5, 1e-2, 1e9
"""How far from the best a solution may be, relative to it, for the search to end."""
_LARGE = 1000
"""Of more variables the best is found in seconds, and proved to be the best in minutes, closer than any price is true: `_NEAR` will do."""
_OUT_OF_TIME, _OPTIMAL = 1, 0
"""Status of SciPy's milp."""


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """One operator of the program: its typings, and for each operand the (step, result) that makes it, or an index into `given`."""

    options: tuple[Choice, ...]
    operands: tuple[tuple[int, int] | int, ...]
    outs: tuple[Info | None, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A group of operators. `given`: values from outside with their type. `wanted`: (step, result, type) someone outside needs."""

    steps: tuple[ProgramStep, ...]
    given: tuple[tuple[Info, Type], ...]
    wanted: tuple[tuple[int, int, Type], ...]
    size: int


@dataclass(frozen=True, slots=True)
class Choices:
    """The index of the chosen typing of every step, and what they cost together, in seconds."""

    picks: tuple[int, ...]
    seconds: float


def choose(problem: Problem, price: Price, *, time_limit: float = 20.0) -> Choices:
    """The cheapest typings that are consistent.

    After `time_limit` seconds the best that were found are taken, with a warning; if there are none yet, the first that are, within ten
    times as long. Raises PlanError when no combination of typings is consistent, or none was found.
    """
    return _Model(problem, price).solve(time_limit)


class _Model:
    def __init__(self, problem: Problem, price: Price) -> None:
        self.problem, self.price = problem, price
        self.unit = unit_of(problem.steps, problem.size, price)
        self.groups = contract(self._alone(), frozenset(w[0] for w in problem.wanted), self._convert)
        self.costs: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.first: list[int] = []
        for group in self.groups:
            self.first.append(len(self.costs))
            self.costs.extend(way.cost for way in group.ways)
        self.place = {group.members[-1]: at for at, group in enumerate(self.groups)}
        self._pick_one()
        self._uses()
        self.gap = _NEAR if len(self.costs) > _LARGE else _EXACT

    def _alone(self) -> list[Group]:
        """Every step as a group of its own; of equally cheap typings the first is preferred."""
        found = []
        for index, step in enumerate(self.problem.steps):
            ways = tuple(Way(o.uses, o.outs, o.cost / self.unit + 1e-6 * k, (k,)) for k, o in enumerate(step.options))
            found.append(Group((index,), ways, step.operands, step.outs))
        return found

    def _convert(self, before: Type, after: Type, info: Info, parameter: bool) -> float | None:
        if not possible(before, after, info):
            return None
        seconds = cost(before, after, info, self.problem.size, self.price, parameter=parameter)
        return seconds / self.unit + 1e-5 + (_GATHERED if parameter and isinstance(before, Shard) else 0.0)

    def _row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        row = len(self.low)
        self.entries.extend((row, column, value) for column, value in terms)
        self.low.append(low)
        self.high.append(high)

    def _pick_one(self) -> None:
        for group, first in zip(self.groups, self.first, strict=True):
            self._row([(first + k, 1.0) for k in range(len(group.ways))], 1.0, 1.0)

    def _uses(self) -> None:
        wanted: dict[StepSource, dict[Type, list[list[int]]]] = {}
        for group, first in zip(self.groups, self.first, strict=True):
            for place, operand in enumerate(group.operands):
                by_type: dict[Type, list[int]] = {}
                for k, way in enumerate(group.ways):
                    by_type.setdefault(way.uses[place], []).append(first + k)
                for type_, columns in by_type.items():
                    wanted.setdefault(operand, {}).setdefault(type_, []).append(columns)
        for producer, result, type_ in self.problem.wanted:
            wanted.setdefault((producer, result), {}).setdefault(type_, []).append([])
        for source, by in wanted.items():
            self._source(source, by)

    def _source(self, source: StepSource, wanted: dict[Type, list[list[int]]]) -> None:
        made, info, parameter = self._made(source)
        for type_, users in wanted.items():
            terms = [(column, -1.0) for column in made.get(type_, [])]
            constant = 1.0 if type_ in made and not made[type_] else 0.0
            for before, columns in made.items():
                extra = None if before == type_ else self._convert(before, type_, info, parameter)
                if extra is None:
                    continue
                convert = len(self.costs)
                self.costs.append(extra)
                if columns:
                    self._row([(convert, 1.0), *((c, -1.0) for c in columns)], -np.inf, 0.0)
                terms.append((convert, -1.0))
            for user in users:
                needed = [(c, 1.0) for c in user]
                self._row([*needed, *terms], -np.inf, constant if user else constant - 1.0)

    def _made(self, source: StepSource) -> tuple[dict[Type, list[int]], Info, bool]:
        """Types a value can be made in -> the variables that make it so (an empty list: it just is so); and whether it is a parameter."""
        if isinstance(source, int):
            info, type_ = self.problem.given[source]
            return {type_: []}, info, False
        at = self.place[source[0]]
        group, made = self.groups[at], dict[Type, list[int]]()
        for k, way in enumerate(group.ways):
            made.setdefault(way.outs[source[1]], []).append(self.first[at] + k)
        out = group.outs[source[1]]
        assert out is not None
        return made, out, group.is_parameter

    def _search(self, matrix: csr_matrix, time_limit: float, gap: float) -> OptimizeResult:
        return milp(
            np.asarray(self.costs),
            integrality=np.ones(len(self.costs)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self.low, self.high),
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )

    def _tell(self, found: OptimizeResult, time_limit: float) -> None:
        """Raise PlanError where nothing was found, warn of what may not be the best."""
        count = len(self.problem.steps)
        if found.x is None and found.status == _OUT_OF_TIME:
            raise PlanError(
                f"no plan for {count} operators was found in {11 * time_limit:.0f} s on this machine. Try again when it is less busy, make "
                f"the plan elsewhere and pass it as plan=, or decide more by rules=."
            )
        if found.x is None:
            raise PlanError(f"no consistent typing of {count} operators: {found.message}")
        if found.status != _OPTIMAL or found.mip_gap > self.gap:
            warnings.warn(
                f"the search for the cheapest plan of {count} operators ended after {time_limit:.0f} s, at most "
                f"{100 * min(found.mip_gap, 9.99):.1f} % from the best: what it computes is right, and another run may find another plan.",
                stacklevel=2,
            )

    def solve(self, time_limit: float) -> Choices:
        rows, columns, values = zip(*self.entries, strict=True)
        matrix = coo_matrix((values, (rows, columns)), shape=(len(self.low), len(self.costs))).tocsr()
        found = self._search(matrix, time_limit, gap=self.gap)
        if found.x is None and found.status == _OUT_OF_TIME:
            found = self._search(matrix, 10 * time_limit, gap=_ANY)
        self._tell(found, time_limit)
        picked = [0] * len(self.problem.steps)
        for first, group in zip(self.first, self.groups, strict=True):
            way = group.ways[int(np.argmax(found.x[first : first + len(group.ways)]))]
            for member, pick in zip(group.members, way.picks, strict=True):
                picked[member] = pick
        return Choices(tuple(picked), float(found.fun) * self.unit)


def unit_of(steps: Sequence[ProgramStep], size: int, price: Price) -> float:
    """Seconds to gather the largest result of any operator: the unit in which a program counts, so that its numbers are near 1."""
    largest = max((i.nbytes for s in steps if s.operands for i in s.outs if i is not None), default=0)
    return price.collective(wire_bytes(ALL_GATHER, largest, size))


def possible(before: Type, after: Type, info: Info) -> bool:
    """Whether a conversion makes sense for this value: pending sums only of numbers, replicate only of what has a gradient.

    Rows sorted by expert are never put together or taken apart.
    """
    if any(isinstance(t, (Ragged, Owned)) or (info.rows and isinstance(t, Shard) and t.dim == 0) for t in (before, after)):
        return False
    if isinstance(after, Partial) and info.dtype.itemsize == 1 and not info.dtype.is_floating_point:
        return False
    return info.requires_grad or not isinstance(after, Replicate)
