"""Where a graph may be cut: between blocks, and at places where few bytes cross, never inside attention or among rows of experts."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import fx

from meshpar.compile.ground import Ground
from meshpar.graph.cost import flops
from meshpar.graph.facts import facts, infos_of
from meshpar.graph.operators import operator_of

NARROW, WIDE = 1.25, 4.0
"""A place is narrow when at most this many times the fewest bytes near it cross, and no more values; none is wider than WIDE times."""
PLACES = 512
"""So many places are compared; of more, the narrowest in equal stretches of cost."""


def places_by_kind(ground: Ground, stages: int) -> dict[str, list[int]]:
    """The places to choose from, those that are preferred first.

    What crosses is compared with what crosses within half a stage, and on to the next ends of blocks.
    """
    mean = float(ground.cost[-1]) / stages
    inner = [p for p in range(1, ground.count) if min(ground.cost[p], ground.cost[-1] - ground.cost[p]) > 0.1 * mean]
    kinds: dict[str, list[int]] = {"between blocks": [], "at narrow places": [], "wherever it is not too wide": []}
    boundaries = [p for p in inner if ground.is_boundary(p)]
    bytes_, values, forbidden = _Fewest(ground.crossing), _Fewest(ground.values), _attention(ground) | rows_cross(ground)
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


def _step(ground: Ground, places: Sequence[int]) -> float:
    """The cost between places that keeps them few enough to compare all pairs."""
    return float(ground.cost[-1]) / PLACES if len(places) > PLACES else 0.0


def _distinct(ground: Ground, places: Sequence[int], step: float) -> list[int]:
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


def rows_cross(ground: Ground) -> set[int]:
    """Places that rows of experts cross: how many there are is told by the routing of each batch, and a stage must know what it is sent."""
    forbidden: set[int] = set()
    for place, node in enumerate(ground.calls):
        for value in [node, *(user for user in node.users if user.target is operator.getitem)]:
            if any(info is not None and info.rows for info in infos_of(value)):
                users = [ground.index[user] for user in value.users if user in ground.index]
                forbidden.update(range(place + 1, max(users, default=place) + 1))
    return forbidden


def _attention(ground: Ground) -> set[int]:
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
    ground: Ground, start: fx.Node, towards: Callable[[fx.Node], Sequence[fx.Node]], far: Callable[[Sequence[int]], int]
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
