"""A pipeline whose ranks share the cores of one machine: whoever can compute does, and all do so more slowly the more there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meshpar.pipeline.schedule import Action, Order, needs
from meshpar.pipeline.timing import Costs
from meshpar.planner.measured import Measured


def crowded(order: Order, costs: Costs, machine: Measured, copies: int) -> float:
    """Seconds from the first start to the last end of a pipeline that runs `copies` times at once on a machine.

    `costs` are those while min(ranks, cores) compute, as `planner.cost` gives them.
    """
    usual = machine.slower(min(order.ranks * copies, machine.cores))
    return _last(_SharedRun(order, costs, lambda active: machine.slower(active * copies) / usual))


class _SharedRun:
    """Actions under way, each with the seconds that are left of it, alone."""

    def __init__(self, order: Order, costs: Costs, slower: Callable[[int], float]) -> None:
        self.order, self.costs, self.slower = order, costs, slower
        self.waiting = [[action for action in reversed(row) if action is not None] for row in order.compute]
        self.ended: dict[Action, float] = {}
        self.ranks: dict[Action, int] = {}
        self.left: dict[int, tuple[Action, float]] = {}
        self.now = 0.0

    def start(self) -> float | None:
        """Start what can be started now; the next moment at which something arrives."""
        soon = None
        for rank, row in enumerate(self.waiting):
            if rank in self.left or not row:
                continue
            arrival = self._arrival(row[-1])
            if arrival is None:
                continue
            if arrival <= self.now:
                action = row.pop()
                self.left[rank] = action, self.costs.of(action.kind, action.stage)
            else:
                soon = arrival if soon is None else min(soon, arrival)
        return soon

    def _arrival(self, action: Action) -> float | None:
        moments = [0.0]
        for alternatives in needs(action, self.order.stages):
            found = next((one for one in alternatives if one in self.ended), None)
            if found is None:
                return None
            moments.append(self.ended[found] + self.costs.send * (self.ranks[found] != self.order.place[action.stage]))
        return max(moments)


def _last(run: _SharedRun) -> float:
    for _ in _moments(run):
        pass
    return run.now


def _moments(run: _SharedRun) -> Iterator[float]:
    """Every moment at which an action ends, or a result arrives."""
    while True:
        soon = run.start()
        if not run.left and soon is None:
            return
        slower = run.slower(len(run.left)) if run.left else 1.0
        step = min((left * slower for _, left in run.left.values()), default=float("inf"))
        if soon is not None:
            step = min(step, soon - run.now)
        run.now += step
        for rank, (action, left) in list(run.left.items()):
            rest = left - step / slower
            if rest <= 1e-12:
                del run.left[rank]
                run.ended[action], run.ranks[action] = run.now, rank
            else:
                run.left[rank] = action, rest
        yield run.now
