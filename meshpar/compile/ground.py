"""What stages are made of: the calls of a graph in order, what each costs, what crosses between them and what they keep."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from meshpar.compile.split import calls_in_order, needed, remade, terms_of
from meshpar.graph.captured import Captured
from meshpar.graph.cost import flops, nbytes
from meshpar.graph.facts import Info, facts, gives_several, info_of, infos_of
from meshpar.graph.operators import operator_of
from meshpar.report.text import count
from meshpar.sharding.price import Price


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


@dataclass(frozen=True)
class Seconds:
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


class Ground:
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
        self.index: dict[fx.Node, int] = {}
        """Which call; of a term of parameters alone, the one that it comes behind: no stage begins between the two."""
        terms, _ = terms_of(graph, captured.parameters)
        waiting = 0  # what is copied is paid for where it is first needed
        for node in calls_in_order(graph, frozenset(captured.parameters)):
            if node not in alive:
                continue
            seconds = round(cost(node) * 1e15)
            if node in self.copied or (node.target is operator.getitem and self.calls):
                waiting += seconds
                continue
            if node in terms and self.calls:
                self.index[node] = len(self.calls) - 1
                spent[-1] += seconds
                kept[-1] += _kept(node)
                continue
            self.index[node] = len(self.calls)
            self.calls.append(node)
            spent.append(seconds + waiting)
            kept.append(_kept(node))
            waiting = 0
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
        for node in self.index:
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
