"""When every action of a pipeline schedule runs, expected or measured, and how much of the time ranks are idle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from meshpar.errors import ConfigError, PlanError, raise_all
from meshpar.pipeline.schedule import COMPUTE, Action, Event, Kind, Order, needs


@dataclass(frozen=True)
class Costs:
    """How long the parts of one microbatch take: one number for all stages, or a sequence with one for each.

    A whole backward takes `backward_input` + `backward_weight`. `send` passes between the end of an action and the moment its result is on
    the other rank; both ranks compute meanwhile.
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    send: float = 0.0

    def of(self, kind: str, stage: int) -> float:
        """The time of an action of computation."""
        parts = {
            "F": (self.forward,),
            "I": (self.backward_input,),
            "W": (self.backward_weight,),
            "B": (self.backward_input, self.backward_weight),
        }
        return float(sum(part[stage] if isinstance(part, Sequence) else part for part in parts[kind]))


def simulate(order: Order, costs: Costs | None = None) -> tuple[Event, ...]:
    """The order run without delay: each rank computes in turn, every action as soon as what it needs is there. Sorted by start and rank.

    Sends are events too where they take time. Raises `ConfigError` for costs that are negative or not one for each stage.

    >>> from meshpar.pipeline.schedule import order
    >>> [(e.kind, e.start) for e in simulate(order("1f1b", 2, 2, 1)) if e.rank == 0]
    [('F', 0.0), ('B', 4.0)]
    """
    costs = costs or Costs()
    raise_all(ConfigError, "Costs:", list(_cost_complaints(costs, order.stages)))
    ended: dict[Action, Event] = {}
    free = [0.0] * order.ranks
    waiting = [[action for action in reversed(row) if action is not None] for row in order.compute]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(waiting):
            while row and (arrivals := _arrivals(row[-1], order, ended, costs.send)) is not None:
                action = row.pop()
                start = max([free[rank], *arrivals])
                free[rank] = start + costs.of(action.kind, action.stage)
                ended[action] = Event(rank, action.stage, action.microbatch, action.kind, start, free[rank])
                moved = True
    if any(waiting):
        raise PlanError(f"ranks wait for each other: next are {', '.join(str(row[-1]) for row in waiting if row)}")
    events = [*ended.values(), *_sends(ended.values(), order.place, costs.send)]
    return tuple(sorted(events, key=lambda event: (event.start, event.rank, event.end)))


def bubble(events: Iterable[Event], ranks: int, *, steady: bool = False) -> float:
    """Idle time of the ranks as a fraction of the time they compute (r; of the whole time it is r / (1 + r)).

    A step lasts from the first start to the last end of a computation on any rank. With `steady`, from the first start to the last end on
    the rank where that is longest: what remains when steps follow each other without waiting for all ranks, the measure of
    arXiv 2401.10241. Raises `ConfigError` when no event computes.

    >>> from meshpar.pipeline.schedule import order
    >>> bubble(simulate(order("1f1b", 4, 4, 8)), 4)
    0.375
    """
    computing = [event for event in events if event.kind in COMPUTE]
    ideal = sum(event.end - event.start for event in computing) / ranks
    if ideal <= 0:
        raise ConfigError("bubble: there is no event of computation that takes time; give the events of a whole step.")
    groups = [[e for e in computing if e.rank == rank] for rank in range(ranks)] if steady else [computing]
    length = max(max(e.end for e in group) - min(e.start for e in group) for group in groups if group)
    return (length - ideal) / ideal


def expected_bubble(
    schedule: str, p: int, m: int, v: int = 1, f: float = 1.0, b: float = 1.0, w: float = 1.0, *, steady: bool = False
) -> float | None:
    """The `bubble` of p ranks, m microbatches and v stages per rank in closed form, None where there is none.

    f, b, w: times of forward, input gradient and weight gradient of one microbatch on one stage, alike for all stages; sends cost nothing.

    - gpipe, 1f1b: (p-1)/m; looped-bfs, interleaved-1f1b: (p-1)/(v m), for m >= p (arXiv 2104.04473, 2211.05953).
    - zero-bubble: (p-1)(f + b - w) idle for m >= p and w <= f, b (ZB-H1 of arXiv 2401.10241); (p-1) b for f < w and f <= b, as then a
      weight gradient hides no more than a forward (derived).
    - zbv: with f = b = w and m >= 2p-1 nothing when `steady` (arXiv 2401.10241), else the (p-1) f in which the last rank waits for its
      first input (derived); no closed form otherwise.
    - dualpipev: none for an order whose overlapped pairs run one after the other; `simulate` it.

    >>> round(100 * expected_bubble("interleaved-1f1b", 8, 128, 2), 2)
    2.73
    """
    if schedule in ("gpipe", "1f1b"):
        return (p - 1) / m
    ideal = v * m * (f + b + w)
    if schedule in ("looped-bfs", "interleaved-1f1b") and m >= p:
        return (p - 1) / (v * m)
    if schedule == "zero-bubble" and m >= p and b >= min(f, w):
        return (p - 1) * (f + b - min(f, w)) / ideal
    if schedule == "zbv" and f == b == w and m >= 2 * p - 1:
        return 0.0 if steady else (p - 1) * f / ideal
    return None


def measured_costs(events: Iterable[Event], stages: int) -> Costs:
    """Costs made of events: the median of every kind on every stage. A backward that never ran in halves counts as two equal ones.

    Raises `ConfigError` naming the stages that no event computes.
    """
    took: dict[tuple[str, int], list[float]] = {}
    for event in events:
        took.setdefault((event.kind, event.stage), []).append(event.end - event.start)
    lost = [f"stage {stage} has no forward among the events." for stage in range(stages) if ("F", stage) not in took]
    raise_all(ConfigError, "measured_costs:", lost)

    def per_stage(half: str) -> tuple[float, ...]:
        halves = [took.get((half, s)) or [t / 2 for t in took.get(("B", s), [0.0])] for s in range(stages)]
        return tuple(map(median, halves))

    return Costs(tuple(median(took["F", stage]) for stage in range(stages)), per_stage("I"), per_stage("W"))


def _arrivals(action: Action, order: Order, ended: dict[Action, Event], send: float) -> list[float] | None:
    """When each thing an action needs is on its rank, or None while one is not done."""
    arrivals = []
    for alternatives in needs(action, order.stages):
        found = next((ended[one] for one in alternatives if one in ended), None)
        if found is None:
            return None
        arrivals.append(found.end + send * (found.rank != order.place[action.stage]))
    return arrivals


def _sends(events: Iterable[Event], place: Sequence[int], send: float) -> Iterator[Event]:
    kinds: dict[str, tuple[Kind, int]] = {"F": ("SEND_F", 1), "B": ("SEND_B", -1), "I": ("SEND_B", -1)}
    for event in events if send else ():
        kind, step = kinds.get(event.kind, ("SEND_F", 0))
        if 0 <= event.stage + step < len(place) and place[event.stage + step] != event.rank:
            yield Event(event.rank, event.stage, event.microbatch, kind, event.end, event.end + send)


def _cost_complaints(costs: Costs, stages: int) -> Iterator[str]:
    for name in ("forward", "backward_input", "backward_weight", "send"):
        value = getattr(costs, name)
        if isinstance(value, Sequence) and len(value) != stages:
            yield f"{name} has {len(value)} numbers for {stages} stages. Give one for each, or one number for all."
        if min(value if isinstance(value, Sequence) else [value], default=0) < 0:
            yield f"{name}={value!r} is negative."
