"""Pipeline schedules as plain data: what every rank computes, sends and receives, in order.

The orders of computation are torch's (`torch.distributed.pipelining`), as are the places of sends and receives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meshpar.errors import ConfigError, PlanError, near, raise_all

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD"]
COMPUTE = ("F", "B", "I", "W")
V_SHAPED = ("zbv", "dualpipev")
"""Schedules that put stages 0, 1, ..., p-1 on ranks 0 to p-1 and the next p stages on the same ranks backwards."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a rank does: F forward, B backward, I and W its two halves (gradient of the input, of the weights), or a transfer.

    A transfer names the stage of its own rank. `REDUCE_GRAD` (sum the stage's gradients over the data ranks) has microbatch -1.

    >>> str(Action("F", 2, 0))
    '2F0'
    """

    kind: Kind
    stage: int
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"


@dataclass(frozen=True, slots=True)
class Event:
    """An action of a rank and when it began and ended, in seconds; expected ones in the unit of the costs."""

    rank: int
    stage: int
    microbatch: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class Order:
    """A schedule laid out for given sizes. Its rows are ranks."""

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    place: tuple[int, ...]
    """Stage -> rank."""
    compute: tuple[tuple[Action | None, ...], ...]
    """Computation in slots of one action each, all rows equally long; None where a rank waits for another."""
    actions: tuple[tuple[Action, ...], ...]
    """Everything a rank does, with sends and receives, and `REDUCE_GRAD` after a stage's last weight gradient.

    Ranks that wait at every transfer until the other side is there do not hang. Stages that meet on one rank need no transfer.
    """

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in the order of the model."""
        return tuple(stage for stage, at in enumerate(self.place) if at == rank)

    def defers(self, rank: int | None = None) -> bool:
        """Whether weight gradients are put off, on a rank or on any."""
        rows = self.actions if rank is None else (self.actions[rank],)
        return any(action.kind == "W" for row in rows for action in row)

    def in_flight(self, rank: int) -> tuple[Mapping[int, int], ...]:
        """After each computation of a rank, how many microbatches each of its stages keeps: forward done, backward (or W) not.

        >>> max(held[0] for held in order("1f1b", 4, 4, 8).in_flight(0)), max(held[3] for held in order("1f1b", 4, 4, 8).in_flight(3))
        (4, 1)
        """
        held = dict.fromkeys(self.stages_of(rank), 0)
        found = []
        for action in self.actions[rank]:
            if action.kind in ("F", "B", "W"):
                held[action.stage] += 1 if action.kind == "F" else -1
                found.append(dict(held))
        return tuple(found)


def order(schedule: str, ranks: int, stages: int, microbatches: int) -> Order:
    """The order of a training step. Raises `ConfigError` with everything that the schedule does not allow about the sizes.

    >>> [str(action) for action in order("1f1b", 2, 2, 2).actions[1]]
    ['1RECV_F0', '1F0', '1RECV_F1', '1B0', '1SEND_B0', '1F1', '1B1', '1SEND_B1', '1REDUCE_GRAD']
    """
    _check_sizes(schedule, ranks, stages, microbatches)
    from meshpar._torch import pipeline_compute

    # torch's 1f1b wants a microbatch per rank: what is too many is left out
    enough = max(microbatches, ranks) if schedule == "1f1b" else microbatches
    rows = pipeline_compute(schedule, ranks, stages, enough)
    compute = [[_action(*parts) for parts in row if parts[2] < microbatches] for row in rows]
    return _lay_out(schedule, _place(schedule, ranks, stages), compute, microbatches)


def forward_order(schedule: str, ranks: int, stages: int, microbatches: int) -> Order:
    """The order of an evaluation with the schedule's placement of stages: only forwards, each as soon as its input is there.

    Any number of microbatches will do. Of several stages that could run, the last goes first: it frees memory.

    >>> [str(action) for action in forward_order("zbv", 1, 2, 2).actions[0]]
    ['0F0', '1F0', '0F1', '1F1']
    """
    _check_sizes(schedule, ranks, stages, microbatches, training=False)
    place = _place(schedule, ranks, stages)
    done = [0] * stages  # stage -> microbatches that have gone through
    compute: list[list[Action]] = [[] for _ in range(ranks)]
    while done[-1] < microbatches:
        before = [microbatches, *done]
        for rank, row in enumerate(compute):
            ready = [stage for stage, at in enumerate(place) if at == rank and done[stage] < before[stage]]
            if ready:
                row.append(Action("F", ready[-1], done[ready[-1]]))
                done[ready[-1]] += 1
    return _lay_out(schedule, place, compute, microbatches)


def schedule_table(order: Order | Iterable[Event]) -> str:
    """An order, or the order in which events ran, as text: a row per rank, a column per slot, a dot where a rank waits.

    F0 is the forward of microbatch 0; with several stages on a rank, 2F0 that of stage 2.

    >>> from meshpar.pipeline.schedule import order
    >>> print(schedule_table(order("1f1b", 2, 2, 2)))
    rank 0 | F0 F1 .  B0 .  B1
    rank 1 | .  F0 B0 F1 B1 .
    """
    rows = order.compute if isinstance(order, Order) else _slots_of(order)
    several = any(len({a.stage for a in row if a is not None}) > 1 for row in rows)
    cells = [["." if a is None else str(a).removeprefix("" if several else str(a.stage)) for a in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    margin = len(f"rank {len(rows) - 1}")
    return "\n".join(
        f"{f'rank {rank}':<{margin}} | {' '.join(cell.ljust(width) for cell, width in zip(row, widths))}".rstrip()
        for rank, row in enumerate(cells)
    )


def check(order: Order) -> None:
    """Raise `PlanError` unless every stage does its work once per microbatch and the ranks, waiting at every transfer, never hang."""
    raise_all(PlanError, f"schedule {order.schedule!r} does not run:", [*_miscounted(order), *_hanging(order)])


def needs(action: Action, stages: int) -> Iterator[tuple[Action, ...]]:
    """What must be done, on any rank, before an action of computation: one of each of these."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F" and stage > 0:
        yield (Action("F", stage - 1, microbatch),)
    elif kind in ("B", "I"):
        yield (Action("F", stage, microbatch),)
        if stage < stages - 1:
            yield (Action("B", stage + 1, microbatch), Action("I", stage + 1, microbatch))
    elif kind == "W":
        yield (Action("I", stage, microbatch),)


def lockstep(compute: Sequence[Sequence[Action]], stages: int) -> tuple[tuple[Action | None, ...], ...]:
    """The rows in lockstep: in each slot every rank does its next action if all it needs was done in earlier slots."""
    done: set[Action] = set()
    rows: list[list[Action | None]] = [[] for _ in compute]
    waiting = [list(reversed(row)) for row in compute]
    while any(waiting):
        slot = [row[-1] if row and _ready(row[-1], stages, done) else None for row in waiting]
        if not any(slot):
            raise PlanError(f"ranks wait for each other: next are {', '.join(str(row[-1]) for row in waiting if row)}")
        for row, left, action in zip(rows, waiting, slot):
            row.append(action)
            if action is not None:
                done.add(left.pop())
    return tuple(map(tuple, rows))


def _slots_of(events: Iterable[Event]) -> tuple[tuple[Action | None, ...], ...]:
    ran = sorted((event for event in events if event.kind in COMPUTE), key=lambda event: (event.start, event.end))
    if not ran:
        raise ConfigError("schedule_table: there is no event of computation; give the events of a whole step.")
    rows: list[list[Action]] = [[] for _ in range(1 + max(event.rank for event in ran))]
    for event in ran:
        rows[event.rank].append(Action(event.kind, event.stage, event.microbatch))
    return lockstep(rows, 1 + max(event.stage for event in ran))


def _action(kind: str, stage: int, microbatch: int) -> Action:
    return Action(kind, stage, microbatch)  # type: ignore[arg-type]


def _place(schedule: str, ranks: int, stages: int) -> tuple[int, ...]:
    if schedule in V_SHAPED:
        return tuple(min(stage, stages - 1 - stage) for stage in range(stages))
    return tuple(stage % ranks for stage in range(stages))


def _lay_out(schedule: str, place: tuple[int, ...], compute: Sequence[Sequence[Action]], microbatches: int) -> Order:
    from meshpar._torch import pipeline_transfers

    stages, ranks = len(place), len(compute)
    lowered = pipeline_transfers([[(a.kind, a.stage, a.microbatch) for a in row] for row in compute], place, microbatches)
    actions = tuple(tuple(_action(*parts) for parts in row) for row in lowered)
    laid_out = Order(schedule, ranks, stages, microbatches, place, lockstep(compute, stages), actions)
    check(laid_out)
    return laid_out


def _ready(action: Action, stages: int, done: set[Action]) -> bool:
    return all(any(one in done for one in alternatives) for alternatives in needs(action, stages))


def _miscounted(order: Order) -> list[str]:
    """Complaints about computation that is missing, doubled, out of place or different between `compute` and `actions`."""
    complaints = []
    counts = Counter(action for row in order.actions for action in row)
    backward = any(action.kind in ("B", "I", "W") for action in counts)
    for stage in range(order.stages):
        for microbatch in range(order.microbatches):
            f, b, i, w = (counts[_action(kind, stage, microbatch)] for kind in COMPUTE)
            if f != 1 or (b, i, w) not in (((1, 0, 0), (0, 1, 1)) if backward else ((0, 0, 0),)):
                complaints.append(f"stage {stage} does F {f}, B {b}, I {i}, W {w} times for microbatch {microbatch}.")
        if backward and (sums := counts[Action("REDUCE_GRAD", stage)]) != 1:
            complaints.append(f"stage {stage} sums its gradients {sums} times.")
    for rank, (row, slots) in enumerate(zip(order.actions, order.compute)):
        complaints += [f"rank {rank} does {a}, which belongs to rank {order.place[a.stage]}." for a in row if order.place[a.stage] != rank]
        if [a for a in row if a.kind in COMPUTE] != [a for a in slots if a is not None]:
            complaints.append(f"rank {rank} computes in one order in its slots and in another with transfers.")
    return complaints


def _hanging(order: Order) -> list[str]:
    """Complaint about ranks that never finish when a transfer happens once sender and receiver both stand at it."""
    done: set[Action] = set()
    waiting = [list(reversed(row)) for row in order.actions]
    moved = True
    while moved:
        moved = False
        for row in waiting:
            while row and (other := _may_go(row[-1], order, done, waiting)) is not None:
                moved = True
                for each in (row, *other):
                    done.add(each.pop())
    return ["ranks wait for each other at " + ", ".join(str(row[-1]) for row in waiting if row) + "."] if any(waiting) else []


def _may_go(action: Action, order: Order, done: set[Action], waiting: Sequence[list[Action]]) -> tuple[list[Action], ...] | None:
    """The other ranks' rows whose next action happens together with this one, or None while it must wait."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind in ("RECV_F", "RECV_B"):
        return None  # the sender takes its receiver along
    if kind in ("SEND_F", "SEND_B"):
        peer = Action("RECV_F", stage + 1, microbatch) if kind == "SEND_F" else Action("RECV_B", stage - 1, microbatch)
        own = ("F",) if kind == "SEND_F" else ("B", "I")
        row = waiting[order.place[peer.stage]]
        computed = any(_action(k, stage, microbatch) in done for k in own)
        return (row,) if computed and row and row[-1] == peer else None
    if kind == "REDUCE_GRAD":
        return () if all(_graded(stage, m, done) for m in range(order.microbatches)) else None
    return () if all(any(_here(one, order, stage, done) for one in alternatives) for alternatives in needs(action, order.stages)) else None


def _graded(stage: int, microbatch: int, done: set[Action]) -> bool:
    return Action("B", stage, microbatch) in done or Action("W", stage, microbatch) in done


def _here(needed: Action, order: Order, stage: int, done: set[Action]) -> bool:
    """Whether a needed result is on the rank of `stage`: computed there, or received."""
    if order.place[needed.stage] == order.place[stage]:
        return needed in done
    return Action("RECV_F" if needed.stage < stage else "RECV_B", stage, needed.microbatch) in done


def _check_sizes(schedule: str, ranks: int, stages: int, microbatches: int, training: bool = True) -> None:
    from meshpar.config import SCHEDULES  # here, as it imports torch, which timing and pictures need not

    sizes = {"ranks": ranks, "stages": stages, "microbatches": microbatches}
    wrong = {name: value for name, value in sizes.items() if not isinstance(value, int) or isinstance(value, bool) or value < 1}
    complaints = [f"{name}={value!r}: a whole number of at least 1." for name, value in wrong.items()]
    if schedule not in SCHEDULES:
        complaints.append(f"schedule={schedule!r}: one of {', '.join(SCHEDULES)}.{near(str(schedule), SCHEDULES)}")
    else:
        if not {"ranks", "stages"} & wrong.keys():
            complaints += _stage_complaints(schedule, ranks, stages, *SCHEDULES[schedule])
        if training and not {"ranks", "microbatches"} & wrong.keys():
            complaints += _microbatch_complaints(schedule, ranks, microbatches)
    raise_all(ConfigError, f"schedule {schedule!r} with {', '.join(f'{k}={v!r}' for k, v in sizes.items())}:", complaints)


def _stage_complaints(schedule: str, ranks: int, stages: int, least: int, most: int | None) -> list[str]:
    def fits(n: int) -> bool:
        return n % ranks == 0 and least <= n // ranks and (most is None or n // ranks <= most)

    if fits(stages):
        return []
    wanted = f"exactly {least}" if most == least else f"equally many, at least {least},"
    return [f"stages={stages}: {schedule} puts {wanted} on each of the {ranks} ranks. {_nearest('stages', stages, fits, least * ranks)}"]


def _microbatch_complaints(schedule: str, ranks: int, microbatches: int) -> list[str]:
    def fits(n: int) -> bool:
        if schedule in ("interleaved-1f1b", "zero-bubble"):
            return n % max(1, n // ranks) == 0
        return schedule != "dualpipev" or n >= 2 * ranks

    if fits(microbatches):
        return []
    reason = {
        "interleaved-1f1b": f"microbatches go in equal rounds of at least {ranks}, one per rank (any multiple of {ranks} will do)",
        "zero-bubble": f"microbatches go in equal rounds of at least {ranks}, one per rank (any multiple of {ranks} will do)",
        "dualpipev": f"at least one microbatch per stage, {2 * ranks}",
    }[schedule]
    return [
        f"microbatches={microbatches}: {schedule} on {ranks} ranks: {reason}. {_nearest('microbatches', microbatches, fits, 2 * ranks)}"
    ]


def _nearest(name: str, value: int, fits: Callable[[int], bool], known: int) -> str:
    """The values next to `value` that fit; there is one among twice `value` and `known`."""
    below = next((n for n in range(value - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, max(2 * value, known) + 1) if fits(n)), None)
    return "Nearest: " + " or ".join(f"{name}={n}" for n in (below, above) if n is not None) + "."
