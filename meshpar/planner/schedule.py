"""The order of a pipeline's work as data, and the time it takes: every action runs as soon as its rank and its input are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshpar.errors import ConfigError, PlanError
from meshpar.planner import v_shaped
from meshpar.planner.mapping import SCHEDULES, V_SHAPED
from meshpar.planner.v_shaped import ActionRow


@dataclass(frozen=True, eq=False)
class RunOrder:
    """A schedule in an order in which it can run. Entry i of every tuple is action i."""

    ranks: int
    stages: int
    microbatches: int
    kinds: tuple[str, ...]
    stage: tuple[int, ...]
    before: tuple[int, ...]
    """The action before it on its rank; -1: none."""
    input: tuple[int, ...]
    """The action whose result it needs; -1: none."""
    crosses: tuple[bool, ...]
    """That result comes from another rank."""
    place: tuple[int, ...]
    """Stage -> rank."""

    def rows(self) -> list[list[int]]:
        """The actions of each rank."""
        rows: list[list[int]] = [[] for _ in range(self.ranks)]
        for index, stage in enumerate(self.stage):
            rows[self.place[stage]].append(index)
        return rows


def place(schedule: str, ranks: int, stages: int) -> tuple[int, ...]:
    """Stage -> rank."""
    return v_shaped.place(ranks) if schedule in V_SHAPED else tuple(stage % ranks for stage in range(stages))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch on every stage, and of a transfer between ranks."""

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    send: float = 0.0

    def busy(self, ranks: int, schedule: str = "1f1b") -> float:
        """Seconds of one microbatch on the busiest rank."""
        sums = [0.0] * ranks
        for rank, *whole in zip(place(schedule, ranks, len(self.forward)), self.forward, self.input, self.weight):
            sums[rank] += sum(whole)
        return max(sums)


def length(schedule: str, ranks: int, microbatches: int, times: Times) -> float:
    """Seconds from the first start to the last end. Many microbatches are simulated until the order repeats, the rest is added.

    >>> length("1f1b", 4, 8, Times((1.0,) * 4, (1.0,) * 4, (1.0,) * 4))
    33.0
    """
    if ranks == 1 and len(times.forward) == 1:
        return microbatches * times.busy(1)
    stages = len(times.forward)
    short = _enough(schedule, ranks, microbatches)
    if short == microbatches:
        return run(program(schedule, ranks, stages, microbatches), times)
    first = run(program(schedule, ranks, stages, short), times)
    again = run(program(schedule, ranks, stages, short + ranks), times)
    round_trip = max(again - first, ranks * times.busy(ranks, schedule))  # uneven stages settle late, at the pace of the busiest rank
    return again + round_trip * (microbatches - short - ranks) / ranks


def run(program: RunOrder, times: Times) -> float:
    """Simulate a program: seconds from the first start to the last end."""
    took = {"F": times.forward, "I": times.input, "W": times.weight, "B": tuple(map(sum, zip(times.input, times.weight)))}
    send, ends = times.send, [0.0] * (len(program.kinds) + 1)  # the last entry stands for "none": it ended at 0
    for index, (kind, stage, before, needs, crosses) in enumerate(
        zip(program.kinds, program.stage, program.before, program.input, program.crosses)
    ):
        start, arrival = ends[before], ends[needs] + send if crosses else ends[needs]
        ends[index] = (arrival if arrival > start else start) + took[kind][stage]
    return max(ends)


def kept(schedule: str, ranks: int, microbatches: int, bytes_of: Sequence[float]) -> tuple[float, ...]:
    """The most bytes each rank keeps at a time, if stage i keeps `bytes_of[i]` for a microbatch from forward until its backward (or W).

    >>> kept("1f1b", 4, 8, [1.0] * 4)
    (4.0, 3.0, 2.0, 1.0)
    """
    one = program(schedule, ranks, len(bytes_of), _enough(schedule, ranks, microbatches))
    peaks = []
    for row in one.rows():
        now = most = 0.0
        for index in row:
            now += bytes_of[one.stage[index]] * {"F": 1, "I": 0, "B": -1, "W": -1}[one.kinds[index]]
            most = max(most, now)
        peaks.append(most)
    return tuple(peaks)


def _enough(schedule: str, ranks: int, microbatches: int) -> int:
    """Microbatches after which the order repeats itself, a multiple of the ranks; all of them where it never does."""
    enough = 4 * ranks if schedule in V_SHAPED else 2 * ranks
    rounds = schedule != "interleaved-1f1b" or microbatches % ranks == 0
    return enough if schedule not in ("gpipe", "looped-bfs") and rounds and microbatches > enough + ranks else microbatches


@lru_cache(maxsize=4096)
def program(schedule: str, ranks: int, stages: int, microbatches: int) -> RunOrder:
    """A schedule laid out. Raises `ConfigError` for an unknown one, `PlanError` if ranks wait for each other."""
    if schedule not in ROWS:
        raise ConfigError(f"schedule={schedule!r}; the planner simulates {', '.join(SCHEDULES)}.")
    rows, of = [ROWS[schedule](rank, ranks, stages // ranks, microbatches) for rank in range(ranks)], place(schedule, ranks, stages)
    number: dict[tuple[str, int, int], int] = {}
    turns, last, found = [0] * ranks, [-1] * ranks, ([], [], [], [], [])  # type: ignore[var-annotated]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while turns[rank] < len(row):
                kind, stage, microbatch = row[turns[rank]]
                source = _source(kind, stage, stages)
                needs = (
                    -1
                    if source is None
                    else next((number[k, source[1], microbatch] for k in source[0] if (k, source[1], microbatch) in number), -2)
                )
                if needs == -2:
                    break
                crosses = source is not None and of[source[1]] != rank
                for column, value in zip(found, (kind, stage, last[rank], needs, crosses)):
                    column.append(value)
                number[kind, stage, microbatch] = last[rank] = len(found[0]) - 1
                turns[rank] += 1
                moved = True
    if any(turn < len(row) for turn, row in zip(turns, rows)):
        raise PlanError(f"{schedule} on {ranks} ranks with {stages} stages and {microbatches} microbatches: ranks wait for each other.")
    kinds, at, before, inputs, crossing = map(tuple, found)
    return RunOrder(ranks, stages, microbatches, kinds, at, before, inputs, crossing, of)


def _source(kind: str, stage: int, stages: int) -> tuple[str, int] | None:
    """Kinds (any of them) and stage that an action needs first."""
    if kind == "F":
        return ("F", stage - 1) if stage else None
    if kind == "W":
        return "I", stage
    return ("BI", stage + 1) if stage < stages - 1 else ("F", stage)


def _one_forward_one_backward(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    warm = min(ranks - rank - 1, m)
    forward, backward = [("F", rank, i) for i in range(m)], [("B", rank, i) for i in range(m)]
    return _alternate(forward, backward, warm)


def _gpipe(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    return [(kind, rank, i) for kind in "FB" for i in range(m)]


def _breadth_first(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    stages = [rank + chunk * ranks for chunk in range(virtual)]
    return [("F", s, i) for s in stages for i in range(m)] + [("B", s, i) for s in reversed(stages) for i in range(m)]


def _interleaved(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    """arXiv 2104.04473: groups of about `ranks` microbatches go through a rank's stages in turn."""
    group = m // max(1, m // ranks)
    starts = range(0, m, group)
    stages = [rank + chunk * ranks for chunk in range(virtual)]
    forward = [("F", s, i) for start in starts for s in stages for i in range(start, start + group)]
    backward = [("B", s, i) for start in starts for s in reversed(stages) for i in range(start, start + group)]
    return _alternate(forward, backward, min(2 * (ranks - rank - 1) + (virtual - 1) * group, len(forward)))


def _zero_bubble(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    """ZB-H1 of arXiv 2401.10241: 1f1b whose weight gradients on rank r wait r microbatches, into what was the bubble."""
    row: ActionRow = []
    done = 0
    for kind, stage, i in _one_forward_one_backward(rank, ranks, virtual, m):
        row.append(("I" if kind == "B" else kind, stage, i))
        if kind == "B" and i - done >= min(rank, m):
            row.append(("W", stage, done))
            done += 1
    return row + [("W", rank, i) for i in range(done, m)]


def _alternate(forward: ActionRow, backward: ActionRow, warm: int) -> ActionRow:
    row = forward[:warm]
    for ahead, back in zip(forward[warm:], backward):
        row += [ahead, back]
    return row + backward[len(forward) - warm :]


ROWS = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "looped-bfs": _breadth_first,
    "interleaved-1f1b": _interleaved,
    "zero-bubble": _zero_bubble,
    "zbv": v_shaped.zbv,
    "dualpipev": v_shaped.dualpipev,
}
"""Schedule -> what a rank does: `(rank, ranks, stages per rank, microbatches)`."""
