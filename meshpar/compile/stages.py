"""Where pipeline stages begin: the most even cuts among the narrow places of a graph.

    cost of calls      | embed |  layer 0  |  layer 1  |  layer 2  |  layer 3  |    head + loss    |
    bytes that cross   0       h   2h+..   h   2h+..   h           h           h     vocabulary    0
    stages=3                                           ^ 1                     ^ 2

A place is narrow where about as few bytes cross as anywhere near it; places inside attention are never taken, and boundaries of blocks are
preferred where they are nearly as even. The answer is the names of the calls at which stages begin, for `mark`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import fx

from meshpar.compile.ground import Budget, Ground, Seconds, Staging
from meshpar.compile.narrow import places_by_kind, rows_cross
from meshpar.errors import PlanError, near, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts
from meshpar.graph.regions import members
from meshpar.report.text import count
from meshpar.sharding.price import Price

NEARLY = {"between blocks": 1.05, "at narrow places": 1.25}
"""A kind of place is chosen when its most costly stage costs at most this many times that of the kinds that allow more."""


def choose(
    captured: Captured,
    stages: int,
    *,
    where: Sequence[int] | Sequence[str] | None = None,
    wanted: Collection[int] | None = None,
    price: Price | None = None,
    cost: Callable[[fx.Node], float] | None = None,
    memory: Budget | None = None,
) -> Staging:
    """Where `stages` stages begin in a captured graph. Pure and deterministic.

    `where`: None balances the cost; numbers say how many blocks of the longest list each stage takes; names of modules say where stages
    1, 2, ... begin. `wanted`: which outputs the last stage returns (None: all). `cost`: seconds of a call, forward and backward, instead
    of what `price` makes of its FLOPs and bytes.

    Raises PlanError when there are fewer places to cut than asked for, when `where` does not fit the model, or when no cuts meet the
    limit of `memory`.

    >>> print(choose(captured, 4))                                            # doctest: +SKIP
    """
    if stages < 1:
        raise PlanError(f"stages={stages}: at least 1.")
    ground = Ground(captured, wanted, cost or Seconds(price or Price()), memory or Budget())
    if where is None:
        return _balanced(ground, stages)
    if all(isinstance(part, str) for part in where):
        places = _at_modules(ground, stages, [str(part) for part in where])
        why = "as named"
    else:
        places = _by_layers(ground, stages, [int(part) for part in where])
        why = f"{', '.join(map(str, where))} blocks each"
    return ground.staging([0, *places, ground.count], why)


def _balanced(ground: Ground, stages: int) -> Staging:
    """Cuts between blocks, or else at narrow places, or else at wider ones: whichever first comes near the best."""
    kinds = places_by_kind(ground, stages)
    best, why = list[int](), ""
    for kind, places in reversed(kinds.items()):
        chosen = _search(ground, [0, *places, ground.count], stages) if len(places) >= stages - 1 else None
        if chosen is not None and _largest(ground, chosen) <= NEARLY.get(kind, 1.0) * _largest(ground, best or chosen):
            best, why = chosen, f"balanced by cost {kind}"
    if best:
        return ground.staging(best, why)
    places = kinds["wherever it is not too wide"]
    if len(places) + 1 < stages:
        raise PlanError(
            f"stages={stages}: this graph has {len(places)} places to cut (where not too much crosses, outside attention and "
            f"layers of experts), so at most {len(places) + 1} stages are possible."
        )
    raise PlanError(_too_much_memory(ground, [0, *places, ground.count], stages))


def _largest(ground: Ground, places: Sequence[int]) -> float:
    return float(max(ground.cost[b] - ground.cost[a] for a, b in pairwise(places)))


def _search(ground: Ground, places: Sequence[int], stages: int) -> list[int] | None:
    """The cuts whose most costly stage costs least; among those, the most even ones that hand on least.

    Dynamic programming over (stage, place), twice: `reach[i]` is the least largest cost, then the least sum, of stages that end at place i.
    """
    cost, held, kept = ground.spans(places)
    count = len(places)
    legal = [(cost > 0) & np.triu(np.ones((count, count), dtype=bool), 1) for _ in range(stages)]
    if ground.memory.limit is not None:
        legal = [ok & (held + kept * ground.in_flight(s, stages) <= ground.memory.limit) for s, ok in enumerate(legal)]
    reach = np.full(count, np.inf)
    reach[0] = 0.0
    for ok in legal:
        reach = np.where(ok, np.maximum(reach[:, None], cost), np.inf).min(axis=0)
    bound = reach[-1]
    if not np.isfinite(bound):
        return None
    mean = ground.cost[-1] / stages
    widest = max(1, int(ground.crossing.max()))
    price = (cost / mean) ** 2 + 1e-6 * (ground.crossing[np.asarray(places)] / widest)[None, :]
    reach = np.full(count, np.inf)
    reach[0] = 0.0
    back = []
    for ok in legal:
        sums = np.where(ok & (cost <= bound), reach[:, None] + price, np.inf)
        back.append(sums.argmin(axis=0))
        reach = sums.min(axis=0)
    at, chosen = count - 1, [places[-1]]
    for before in reversed(back):
        at = int(before[at])
        chosen.append(places[at])
    return chosen[::-1]


def _too_much_memory(ground: Ground, places: Sequence[int], stages: int) -> str:
    """What the limit would have to be."""
    _, held, kept = ground.spans(places)
    reach = np.full(len(places), np.inf)
    reach[0] = 0.0
    for stage in range(stages):
        size = np.where(np.triu(np.ones_like(held, dtype=bool), 1), held + kept * ground.in_flight(stage, stages), np.inf)
        reach = np.maximum(reach[:, None], size).min(axis=0)
    assert ground.memory.limit is not None
    return (
        f"no cuts into {stages} stages keep every stage within {count(ground.memory.limit, 'B')}: the best take {count(reach[-1], 'B')}. "
        "Use more stages, smaller microbatches or recompute, or allow more."
    )


def _by_layers(ground: Ground, stages: int, layers: Sequence[int]) -> list[int]:
    """The places after the first layers[0] blocks, after layers[1] more, ..."""
    lists: dict[str, dict[str, None]] = {}
    for place in range(ground.count):
        if (region := ground.region(place)) is not None:
            lists.setdefault(next(members(region))[0], {})[region] = None
    longest = max(lists.values(), key=len, default={})
    everything = list(dict.fromkeys(region for found in lists.values() for region in found))
    asked = sum(layers)
    blocks = list(longest) if asked == len(longest) else everything
    complaints = []
    if len(layers) != stages:
        complaints.append(f"{list(layers)} has {len(layers)} entries for {stages} stages: one per stage.")
    if asked != len(blocks) or not blocks:
        known = ", ".join(f"{name} has {len(found)}" for name, found in lists.items()) or "the graph has none"
        both = f", together {len(everything)}" if len(lists) > 1 else ""
        complaints.append(f"{list(layers)} is {asked} blocks, but {known}{both}. The numbers must add up to one of these.")
    raise_all(PlanError, "layers per stage:", complaints)
    first = {region: next(p for p in range(ground.count) if ground.region(p) == region) for region in blocks}
    behind = max(p for p in range(ground.count) if ground.region(p) in first) + 1
    after = list(accumulate(layers[:-1]))
    places = [first[blocks[n]] if n < len(blocks) else behind for n in after]
    return _checked(ground, places, [f"after {n} blocks" for n in after], "layers per stage:")


def _at_modules(ground: Ground, stages: int, names: Sequence[str]) -> list[int]:
    """The place of the first call of each module."""
    first: dict[str, int] = {}
    for place, node in enumerate(ground.calls):
        parts = (facts(node).module or "").split(".")
        for n in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:n]), place)
    complaints = []
    if len(names) != stages - 1:
        complaints.append(f"{list(names)} has {len(names)} names for {stages} stages: name where stages 1 to {stages - 1} begin.")
    complaints += [f"{name!r} is no module that computes anything.{near(name, first)}" for name in names if name not in first]
    raise_all(PlanError, "stages at modules:", complaints)
    return _checked(ground, [first[name] for name in names], [repr(name) for name in names], "stages at modules:")


def _checked(ground: Ground, places: list[int], labels: Sequence[str], heading: str) -> list[int]:
    """Every stage needs something to compute."""
    complaints = [
        f"the stage that begins {'at ' if label.startswith(chr(39)) else ''}{label} would begin no later than the one before it."
        for place, before, label in zip(places, [0, *places], labels)
        if place <= before
    ]
    among = rows_cross(ground)
    complaints += [
        f"rows of experts cross where {label} begins, as many as the routing of each batch says, which no stage knows beforehand: begin "
        "before the layer of experts, or after it."
        for place, label in zip(places, labels)
        if place in among
    ]
    complaints += [f"nothing is computed from {label} on." for place, label in zip(places, labels) if place >= ground.count]
    raise_all(PlanError, heading, complaints)
    return places
