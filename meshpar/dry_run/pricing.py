"""Seconds of a step that was read off a program, on any hardware."""

from __future__ import annotations

from dataclasses import dataclass

from meshpar.dry_run.crowd import crowded
from meshpar.pipeline.schedule import Event, Order
from meshpar.pipeline.timing import Costs, simulate
from meshpar.planner import Constants, Hardware, Stack, StepTime, Workload
from meshpar.planner.cost import Memo, Times, rates, timed


@dataclass(frozen=True)
class Pricing:
    """What a step's time follows from, beside the hardware."""

    work: Workload
    order: Order | None
    software: Stack
    constants: Constants

    def on(self, part: Hardware) -> StepTime:
        """The time of a step."""
        order = self.order
        speed = rates(part, self.software, self.constants)
        return timed(self.work, speed, Memo(), pipeline=None if order is None else lambda times: self._lasts(order, part, times))

    def events(self, part: Hardware) -> tuple[Event, ...]:
        """When every rank of the pipeline computes what; without one, the first three microbatches of a rank.

        On a measured machine, as if its ranks did not share the cores.
        """
        seen: list[Times] = []

        def see(times: Times) -> float:
            seen.append(times)
            return 1.0

        timed(self.work, rates(part, self.software, self.constants), Memo(), pipeline=see)
        costs = Costs(seen[0].forward, seen[0].input, seen[0].weight, seen[0].send)
        if self.order is not None:
            return simulate(self.order, costs)
        forward, backward = costs.of("F", 0), costs.of("B", 0)
        found: list[Event] = []
        for m in range(min(3, self.work.microbatches)):
            start = m * (forward + backward)
            middle = start + forward
            found += [Event(0, 0, m, "F", start, middle), Event(0, 0, m, "B", middle, middle + backward)]
        return tuple(found)

    def spread(self, part: Hardware, kind: str) -> tuple[float, float]:
        """Measured / estimated time, 10th and 90th percentile."""
        return (self.constants if part.measured is None else part.measured.constants(self.constants)).spread[kind]

    def _lasts(self, order: Order, part: Hardware, times: Times) -> float:
        """How long a pipeline takes; on a measured machine its ranks, and those of its copies, share the cores."""
        costs = Costs(times.forward, times.input, times.weight, times.send)
        if part.measured is None:
            return max(event.end for event in simulate(order, costs))
        return crowded(order, costs, part.measured, self.work.gpus // self.work.ranks)
