"""Where pipeline stages begin: the most even cuts among the narrow places of a graph.

    cost of calls      | embed |  layer 0  |  layer 1  |  layer 2  |  layer 3  |    head + loss    |
    bytes that cross   0       h   2h+..   h   2h+..   h           h           h     vocabulary    0
    stages=3                                           ^ 1                     ^ 2

A place is narrow where about as few bytes cross as anywhere near it; places inside attention are never taken, and boundaries of blocks are
preferred where they are nearly as even. The answer is the names of the calls at which stages begin, for `mark`.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from meshpar.compile.split import needed, remade
from meshpar.errors import PlanError, near, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.cost import flops, nbytes
from meshpar.graph.facts import Info, facts, gives_several, info_of, infos_of
from meshpar.graph.operators import operator_of
from meshpar.graph.regions import members
from meshpar.report.text import count
from meshpar.sharding.price import Price

NARROW, WIDE = 1.25, 4.0
"""A place is narrow when at most this many times the fewest bytes near it cross, and no more values; none is wider than WIDE times."""
NEARLY = {"between blocks": 1.05, "at narrow places": 1.25}
"""A kind of place is chosen when its most costly stage costs at most this many times that of the kinds that allow more."""
PLACES = 512
"""So many places are compared; of more, the narrowest in equal stretches of cost."""


@dataclass(frozen=True)
class Staging:
    """A decision about stages, and what it costs."""

    starts: tuple[str, ...]
    """The first call of stages 1, 2, ..."""
    begins: tuple[str, ...]
    """Where each stage begins, in words: a block, a module or a call."""
    seconds: tuple[float, ...]
    """Estimated time of each stage, forward and backward of one microbatch."""
    crossing: tuple[int, ...]
    """Bytes handed over at each cut, forward, per microbatch."""
    memory: tuple[int, ...]
    """Estimated bytes of each stage: parameters with gradients and optimizer state, and activations of the microbatches in flight."""
    why: str

    @property
    def imbalance(self) -> float:
        """The most costly stage over the mean: what the pipeline loses to unevenness."""
        return max(self.seconds) * len(self.seconds) / sum(self.seconds)

    def __str__(self) -> str:
        total = sum(self.seconds)
        lines = [f"{len(self.seconds)} stages, {self.why}; the most costly takes {self.imbalance:.3f} times the mean"]
        for index, (begin, seconds, held) in enumerate(zip(self.begins, self.seconds, self.memory)):
            sent = f", hands on {count(self.crossing[index], 'B')}" if index < len(self.crossing) else ""
            lines.append(f"  stage {index} from {begin}: {100 * seconds / total:.1f}% of the cost, {count(held, 'B')}{sent}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Budget:
    """What a stage may hold, and how it is counted."""

    limit: float | None = None
    """Bytes per stage; None: no limit."""
    state: float = 4.0
    """Bytes kept per byte of a trained parameter: itself, its gradient and two moments of Adam."""
    microbatches: int | None = None
    """At most so many are in flight; stage i of n holds n - i of them under 1F1B."""


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
    ground = _Ground(captured, wanted, cost or _Seconds(price or Price()), memory or Budget())
    if where is None:
        return _balanced(ground, stages)
    if all(isinstance(part, str) for part in where):
        places = _at_modules(ground, stages, [str(part) for part in where])
        why = "as named"
    else:
        places = _by_layers(ground, stages, [int(part) for part in where])
        why = f"{', '.join(map(str, where))} blocks each"
    return ground.staging([0, *places, ground.count], why)


# -- what a stage costs ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seconds:
    """The time of a call, forward and backward: a matrix product is done again for every operand that needs a gradient."""

    price: Price

    def __call__(self, node: fx.Node) -> float:
        work, moved = flops(node), nbytes(node)
        spent = self.price.compute(work, moved)
        infos = [facts(source).info for source in node.all_input_nodes]
        again = sum(isinstance(i, Info) and i.requires_grad and len(i.shape) > 1 for i in infos)
        if again:
            products = 2.5 if operator_of(node.target).kind == "attention" else min(again, 2)
            written = sum(i.nbytes for i in infos if isinstance(i, Info) and i.requires_grad)
            spent += self.price.compute(products * work, moved + written)
        return spent


def _nbytes(node: fx.Node) -> int:
    return sum(i.nbytes for i in infos_of(node) if isinstance(i, Info))


class _Ground:
    """The calls that stages are made of, and what lies between any two places. Place p is before the p-th of them.

    Costs are whole femtoseconds, so that equal blocks cost exactly the same wherever they are.
    """

    def __init__(self, captured: Captured, wanted: Collection[int] | None, cost: Callable[[fx.Node], float], memory: Budget) -> None:
        graph = captured.graph
        values: Any = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
        count = len(values) - len(captured.mutations)
        returned = [values[i] for i in (range(count) if wanted is None else sorted(wanted))]
        alive, self.copied = needed(graph, (*returned, *values[count:])), remade(graph, captured.parameters)
        self.calls: list[fx.Node] = []
        spent: list[int] = []
        kept: list[int] = []
        waiting = 0  # what is copied is paid for where it is first needed
        for node in graph.nodes:
            if node.op != "call_function" or node not in alive:
                continue
            seconds = round(cost(node) * 1e15)
            if node in self.copied or (node.target is operator.getitem and self.calls):
                waiting += seconds
                continue
            self.calls.append(node)
            spent.append(seconds + waiting)
            kept.append(_kept(node))
            waiting = 0
        self.index = {node: i for i, node in enumerate(self.calls)}
        self.memory, self.count = memory, len(self.calls)
        self.cost = np.concatenate([[0], np.cumsum(spent)]).astype(np.int64)
        self.kept = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        self.crossing, self.values = self._crossing([v for v in returned if isinstance(v, fx.Node)])
        self.uses = self._uses(graph, frozenset(captured.parameters))

    def place(self, node: fx.Node) -> int:
        """The number of the call that makes a value: results of a call with several are made by it."""
        while node.target is operator.getitem:
            node = node.all_input_nodes[0]
        return self.index[node]

    def _crossing(self, returned: Sequence[fx.Node]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes, and number of values, that cross at every place."""
        change = np.zeros((2, self.count + 2), dtype=np.int64)
        ends = {node: self.count for node in returned}
        for node in self.calls:
            items = [u for u in node.users if u.target is operator.getitem] if gives_several(node) else [node]
            for value in items:
                users = [self.place(user) for user in value.users if user in self.index]
                last = max([*users, ends.get(value, 0)], default=0)
                if last > self.index[node]:
                    change[:, self.index[node] + 1] += (_nbytes(value), 1)
                    change[:, last + 1] -= (_nbytes(value), 1)
        bytes_, values = np.cumsum(change, axis=1)[:, : self.count + 1]
        return bytes_, values

    def _uses(self, graph: fx.Graph, parameters: frozenset[str]) -> list[tuple[int, int, int]]:
        """Every use of a parameter: place, place of its use before (-1: none), bytes of it and its training state."""
        found = []
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in parameters:
                info, before = info_of(node), -1
                held = round(info.nbytes * (self.memory.state if info.requires_grad else 1.0))
                for use in sorted(set(self._users(node))):
                    found.append((use, before, held))
                    before = use
        return found

    def _users(self, node: fx.Node) -> list[int]:
        """The calls that a copied node reaches."""
        found = []
        for user in node.users:
            if user in self.index:
                found.append(self.index[user])
            elif user in self.copied:
                found += self._users(user)
        return found

    def spans(self, places: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For every pair of places: cost, bytes of parameters and their state, bytes of activations of one microbatch, between them."""
        at = np.asarray(places)
        held = np.zeros((len(at) + 1, len(at) + 1), dtype=np.int64)
        for use, before, size in self.uses:  # counted in spans that begin after the use before and end after this one
            low, high, end = np.searchsorted(at, [before, use, use], side="right")
            held[low, end] += size
            held[high, end] -= size
        held = np.cumsum(np.cumsum(held, axis=0), axis=1)[: len(at), : len(at)]
        return self.cost[at][None, :] - self.cost[at][:, None], held, self.kept[at][None, :] - self.kept[at][:, None]

    def in_flight(self, stage: int, stages: int) -> int:
        """How many microbatches a stage holds under 1F1B."""
        return min(stages - stage, self.memory.microbatches or stages)

    def staging(self, places: Sequence[int], why: str) -> Staging:
        """The record of a choice; `places` begins with 0 and ends with the number of calls."""
        stages = len(places) - 1
        cost, held, kept = self.spans(places)
        numbers = range(stages)
        return Staging(
            tuple(self.calls[p].name for p in places[1:-1]),
            ("the start", *(self.describe(p) for p in places[1:-1])),
            tuple(float(cost[s, s + 1]) / 1e15 for s in numbers),
            tuple(int(self.crossing[p]) for p in places[1:-1]),
            tuple(int(held[s, s + 1] + kept[s, s + 1] * self.in_flight(s, stages)) for s in numbers),
            why,
        )

    def region(self, place: int) -> str | None:
        """The block a call belongs to."""
        return facts(self.calls[place]).region

    def is_boundary(self, place: int) -> bool:
        """Whether a block begins or ends here."""
        return 0 < place < self.count and self.region(place - 1) != self.region(place)

    def describe(self, place: int) -> str:
        """Where a place is: the block that begins there, else the call and its module."""
        region, node = self.region(place), self.calls[place]
        if region is not None and self.is_boundary(place):
            return region
        return f"{node.name} ({facts(node).module or 'the model itself'})"


def _kept(node: fx.Node) -> int:
    """Bytes that backward keeps of a call: its results, unless they are views of others."""
    flows = any(isinstance(i, Info) and i.requires_grad for i in infos_of(node))
    return _nbytes(node) if flows and nbytes(node) else 0


# -- the most even cuts --------------------------------------------------------------------------------------------------------------------


def _balanced(ground: _Ground, stages: int) -> Staging:
    """Cuts between blocks, or else at narrow places, or else at wider ones: whichever first comes near the best."""
    kinds = _kinds(ground, stages)
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
            f"stages={stages}: this graph has {len(places)} places to cut (where not too much crosses, outside attention), "
            f"so at most {len(places) + 1} stages are possible."
        )
    raise PlanError(_too_much_memory(ground, [0, *places, ground.count], stages))


def _largest(ground: _Ground, places: Sequence[int]) -> float:
    return float(max(ground.cost[b] - ground.cost[a] for a, b in pairwise(places)))


def _search(ground: _Ground, places: Sequence[int], stages: int) -> list[int] | None:
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


def _too_much_memory(ground: _Ground, places: Sequence[int], stages: int) -> str:
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


# -- narrow places -------------------------------------------------------------------------------------------------------------------------


def _kinds(ground: _Ground, stages: int) -> dict[str, list[int]]:
    """The places to choose from, those that are preferred first.

    What crosses is compared with what crosses within half a stage, and on to the next ends of blocks.
    """
    mean = float(ground.cost[-1]) / stages
    inner = [p for p in range(1, ground.count) if min(ground.cost[p], ground.cost[-1] - ground.cost[p]) > 0.1 * mean]
    kinds: dict[str, list[int]] = {"between blocks": [], "at narrow places": [], "wherever it is not too wide": []}
    boundaries = [p for p in inner if ground.is_boundary(p)]
    bytes_, values, forbidden = _Fewest(ground.crossing), _Fewest(ground.values), _attention(ground)
    lows = np.searchsorted(ground.cost, ground.cost - mean / 2).tolist()
    highs = np.searchsorted(ground.cost, ground.cost + mean / 2, side="right").tolist()
    for p in inner:
        if p in forbidden:
            continue
        before, after = bisect_right(boundaries, p), bisect_left(boundaries, p)
        low = max(inner[0], min(lows[p], p, *boundaries[max(0, before - 1) : before]))
        high = min(inner[-1], max(highs[p] - 1, p, *boundaries[after : after + 1]))
        width, few = ground.crossing[p] / max(1, bytes_(low, high)), ground.values[p] <= values(low, high)
        if width <= WIDE:
            kinds["wherever it is not too wide"].append(p)
            if ground.is_boundary(p):
                kinds["between blocks"].append(p)
            if ground.is_boundary(p) or (width <= NARROW and few):
                kinds["at narrow places"].append(p)
    steps = {"between blocks": 0.05 * mean}
    return {kind: _distinct(ground, places, max(steps.get(kind, 0.0), _step(ground, places))) for kind, places in kinds.items()}


def _step(ground: _Ground, places: Sequence[int]) -> float:
    """The cost between places that keeps them few enough to compare all pairs."""
    return float(ground.cost[-1]) / PLACES if len(places) > PLACES else 0.0


def _distinct(ground: _Ground, places: Sequence[int], step: float) -> list[int]:
    """Of places that at most `step` of cost lies between, one: where a block begins or ends, and there or else the narrowest."""

    def rank(place: int) -> tuple[bool, int, bool, int]:
        return not ground.is_boundary(place), int(ground.crossing[place]), ground.region(place) is None, place

    groups: list[list[int]] = []
    for place in places:
        if groups and ground.cost[place] - ground.cost[groups[-1][0]] <= step:
            groups[-1].append(place)
        else:
            groups.append([place])
    return [min(group, key=rank) for group in groups]


class _Fewest:
    """The least of any stretch of values, from tables of stretches of 1, 2, 4, ... of them."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self.tables = [values]
        while 2 ** len(self.tables) <= len(values):
            last, half = self.tables[-1], 2 ** (len(self.tables) - 1)
            self.tables.append(np.minimum(last[:-half], last[half:]))

    def __call__(self, low: int, high: int) -> int:
        """The least of values[low], ..., values[high]."""
        level = (high - low + 1).bit_length() - 1
        table = self.tables[level]
        return int(min(table[low], table[high + 1 - 2**level]))


def _attention(ground: _Ground) -> set[int]:
    """Places between the projections before an attention and the one after it: a stretch around every softmax, up to products with
    parameters, inside one block."""
    forbidden: set[int] = set()
    for place, node in enumerate(ground.calls):
        if operator_of(node.target).weighs:
            low = _projections(ground, node, lambda n: n.all_input_nodes, min)
            high = _projections(ground, node, lambda n: tuple(n.users), max)
            forbidden.update(range(min(low, place) + 1, max(high, place) + 1))
    return forbidden


def _projections(
    ground: _Ground, start: fx.Node, towards: Callable[[fx.Node], Sequence[fx.Node]], far: Callable[[Sequence[int]], int]
) -> int:
    """The place of the farthest of the first products with a parameter that are met on the way; that of `start` where there are none."""
    region, seen, stack, met = facts(start).region, {start}, [start], list[int]()
    while stack:
        for node in towards(stack.pop()):
            if node in seen or node.op != "call_function" or node in ground.copied or facts(node).region != region:
                continue
            seen.add(node)
            if node not in ground.index and node.target is not operator.getitem:
                continue
            if flops(node) and any(source in ground.copied for source in node.all_input_nodes[:3] if source.op == "get_attr"):
                met.append(ground.index[node])
            else:
                stack.append(node)
    return far(met) if met else ground.index[start]


# -- as told -------------------------------------------------------------------------------------------------------------------------------


def _by_layers(ground: _Ground, stages: int, layers: Sequence[int]) -> list[int]:
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


def _at_modules(ground: _Ground, stages: int, names: Sequence[str]) -> list[int]:
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


def _checked(ground: _Ground, places: list[int], labels: Sequence[str], heading: str) -> list[int]:
    """Every stage needs something to compute."""
    complaints = [
        f"the stage that begins {'at ' if label.startswith(chr(39)) else ''}{label} would begin no later than the one before it."
        for place, before, label in zip(places, [0, *places], labels)
        if place <= before
    ]
    complaints += [f"nothing is computed from {label} on." for place, label in zip(places, labels) if place >= ground.count]
    raise_all(PlanError, heading, complaints)
    return places
