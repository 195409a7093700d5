"""Orders whose ranks have two stages, one on the way down and one on the way back: stage r and stage 2p-1-r on rank r.

    rank 0   0   2p-1        zbv        arXiv 2401.10241, section 6: memory of 1f1b, no bubble where forward and both backwards are alike
    rank 1   1   2p-2        dualpipev  arXiv 2412.19437, cut in half: forwards and backwards in pairs
    ...      ...

Both are as torch lays them out (`torch.distributed.pipelining`); a test compares them action by action.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

ActionRow = list[tuple[str, int, int]]
"""What one rank does in turn: `(kind, stage, microbatch)`; F forward, B backward, I and W its halves."""


def place(ranks: int) -> tuple[int, ...]:
    """Stage -> rank.

    >>> place(2)
    (0, 1, 1, 0)
    """
    return (*range(ranks), *reversed(range(ranks)))


@dataclass
class _ActionsOfRank:
    """Actions of a rank; each kind counts the microbatches of each stage."""

    down: int
    up: int
    row: ActionRow = field(default_factory=list)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    later: deque[tuple[int, int]] = field(default_factory=deque)

    def add(self, *kinds_and_stages: tuple[str, int]) -> None:
        """The next microbatch of every kind and stage; a whole backward counts as both halves."""
        for kind, stage in kinds_and_stages:
            number = self.counts.get(("I" if kind == "B" else kind, stage), 0)
            self.row.append((kind, stage, number))
            for half in ("I", "W") if kind == "B" else (kind,):
                self.counts[half, stage] = number + 1
            if kind == "I":
                self.later.append((stage, number))

    def put_off(self) -> None:
        """The oldest weight gradient that was put off, if there is one."""
        if self.later:
            stage, number = self.later.popleft()
            self.row.append(("W", stage, number))
            self.counts["W", stage] = number + 1


def zbv(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    """Both halves of a backward together while there is work, weight gradients last when there is none."""
    row, enough = _ActionsOfRank(rank, 2 * ranks - 1 - rank), max(2 * ranks - 1, m)
    down, up = row.down, row.up
    for _ in range(2 * (ranks - rank) - 1):
        row.add(("F", down))
    for _ in range(rank):
        row.add(("F", up), ("F", down))
    for _ in range(ranks - rank):
        row.add(("F", up), ("I", up), ("W", up))
    while row.counts.get(("F", up), 0) < max(row.counts["F", down], enough):
        if row.counts["F", down] < enough:
            row.add(("F", down))
        row.add(("I", down), ("W", down), ("F", up), ("I", up), ("W", up))
    for _ in range(rank):
        row.add(("I", down), ("I", up))
    for _ in range(ranks - rank):
        row.add(("I", down), ("W", down))
    for stage in (up, down):
        while row.counts.get(("W", stage), 0) < row.counts[("I", stage)]:
            row.add(("W", stage))
    return [action for action in row.row if action[2] < m]


def dualpipev(rank: int, ranks: int, virtual: int, m: int) -> ActionRow:
    """The eight phases of DualPipeV; overlapped pairs run one after the other here."""
    row = _ActionsOfRank(rank, 2 * ranks - 1 - rank)
    down, up, after = row.down, row.up, ranks - rank - 1
    row.add(*[("F", down)] * (2 * after), *[("F", down), ("F", up)] * (rank + 1))
    for _ in range(after):
        row.add(("I", up))
        row.put_off()
        row.add(("F", up))
    row.add(*[("F", down), ("B", up), ("F", up), ("B", down)] * (m - 2 * ranks + rank + 1))
    row.add(*[("B", up), ("F", up), ("B", down)] * after)
    turn = 2 * ((rank + 1) // 2) + (1 if rank % 2 == 0 else 0)  # from the middle of this phase on, weight gradients are put off
    for i in range(2 * (rank + 1)):
        row.add(("I" if i >= turn else "B", down if i % 2 else up))
    for _ in range(after):
        row.put_off()
        row.add(("I", down))
    for _ in range(rank + 1):
        row.put_off()
    return row.row
