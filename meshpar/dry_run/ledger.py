"""Who talks to whom, how often and how much: a step's communication by axis and by level of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshpar.planner import Hardware, Workload
from meshpar.planner.comm import RankGroup, place


@dataclass(frozen=True)
class LedgerLine:
    """One kind of message over one axis, of the rank that sends most."""

    axis: str
    ranks: int
    kind: str
    level: str
    """"inside the domain", or "between domains": the widest level that the axis spans."""
    often: str
    """"once per step", "every microbatch", "every layer"."""
    count: float
    """In a step."""
    message: float
    """Bytes of one, as a device sends them."""
    total: float
    """Bytes that a device sends in a step."""
    bandwidth: float
    """Bytes/s over the whole step: what the level must carry for each device at the least."""


def ledger(work: Workload, hardware: Hardware, seconds: float) -> tuple[LedgerLine, ...]:
    """A step's communication, the most talkative axis first."""
    lines = [*_collectives(work, hardware, seconds), *_sends(work, hardware, seconds)]
    return tuple(sorted(lines, key=lambda line: (-line.count, line.axis, line.kind, -line.message)))


def _collectives(work: Workload, hardware: Hardware, seconds: float) -> Iterator[LedgerLine]:
    most: dict[tuple[str, str, str], tuple[float, float]] = {}
    for rank in range(work.ranks):
        sums: dict[tuple[str, str, str], list[float]] = {}
        for stage in work.of_rank(rank):
            blocks = sum(times for _, times in stage.layers)
            for layer, times in stage.layers:
                for c in layer.collectives:
                    often = "every layer" if c.count * times >= blocks else "every microbatch"
                    entry = sums.setdefault((c.axis, c.kind, often), [0.0, 0.0])
                    count = c.count * times * work.microbatches
                    entry[0] += count
                    entry[1] += count * _sent(c.kind, c.bytes, work.axes[c.axis].size)
            for c in stage.collectives:
                entry = sums.setdefault((c.axis, c.kind, "once per step"), [0.0, 0.0])
                entry[0] += c.count
                entry[1] += c.count * _sent(c.kind, c.bytes, work.axes[c.axis].size)
        for key, (count, total) in sums.items():
            most[key] = max(most.get(key, (0.0, 0.0)), (count, total), key=lambda pair: pair[1])
    for (axis, kind, often), (count, total) in most.items():
        group = place(work.axes[axis], hardware.domain)
        yield LedgerLine(axis, work.axes[axis].size, kind, _level(group), often, count, total / max(count, 1), total, total / seconds)


def _sends(work: Workload, hardware: Hardware, seconds: float) -> Iterator[LedgerLine]:
    if work.ranks == 1:
        return
    count = 2.0 * work.microbatches * work.virtual
    group = place(work.axes["pp"], hardware.domain)
    total = count * work.send
    yield LedgerLine("pp", work.ranks, "send", _level(group), "every microbatch", count, work.send, total, total / seconds)


def _sent(kind: str, size: float, ranks: int) -> float:
    """Bytes a device sends with ring algorithms."""
    share = (ranks - 1) / ranks
    return size * share * (2 if kind == "all_reduce" else 1)


def _level(group: RankGroup) -> str:
    return "inside the domain" if group.domains == 1 else "between domains"
