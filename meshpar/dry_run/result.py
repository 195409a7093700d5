"""What a dry run found: as data, as text, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from meshpar.config import ParallelConfig
from meshpar.dry_run.ledger import LedgerLine
from meshpar.dry_run.memory import RankNeeds
from meshpar.dry_run.pricing import Pricing
from meshpar.errors import ConfigError
from meshpar.pipeline.schedule import Event, Order
from meshpar.planner import CONVENTIONS, Hardware, StepTime, Workload
from meshpar.planner.cost import PARTS
from meshpar.planner.hardware import GiB
from meshpar.report.text import count, table


@dataclass(frozen=True)
class DryRun:
    """A program on a cluster: memory per pipeline rank, communication, time, utilisation. Bytes and seconds."""

    mesh: str
    gpus: int
    hardware: Hardware
    software: str
    config: ParallelConfig
    precision: str
    """Of most products; utilisation is of its peak."""
    ranks: tuple[RankNeeds, ...]
    """By place in the pipeline: all ranks of a place hold as much, up to what does not divide evenly."""
    ledger: tuple[LedgerLine, ...]
    time: StepTime
    spread: tuple[float, float]
    """Measured / estimated time, 10th and 90th percentile, on published runs that no constant was fitted to."""
    tokens: float
    """Of a step, over all ranks."""
    mfu: Mapping[str, float]
    """Share of the peak by convention (`planner.CONVENTIONS`)."""
    workload: Workload
    """What the planner's cost model was given."""
    order: Order | None
    grids: str
    """The rank grids."""
    notes: tuple[str, ...] = field(default=())
    pricing: Pricing | None = field(default=None, repr=False)
    """How the step was priced, for other hardware."""

    def time_on(self, hardware: Hardware) -> StepTime:
        """The step of this very program on other hardware: no new dry run. Its mesh must fit there."""
        assert self.pricing is not None
        return self.pricing.on(hardware)

    def scaled(self, seconds: float) -> Hardware:
        """The hardware with the scale that one measured step of this program gives: estimates with it are as slow as that step was.

        Raises ConfigError for a step that takes no time.

        >>> part = found.scaled(12.7)                                      # doctest: +SKIP
        >>> mp.dry_run(other, mesh, hardware=part).time.seconds            # doctest: +SKIP
        """
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
            raise ConfigError(f"step={seconds!r}: the seconds of a step that was measured, a number above 0.")
        return replace(self.hardware, scale=self.hardware.scale * seconds / self.time.seconds)

    def timeline(self) -> tuple[Event, ...]:
        """When every rank of the pipeline computes what, in seconds; without one, the first three microbatches of a rank."""
        assert self.pricing is not None
        return self.pricing.events(self.hardware)

    @property
    def limit(self) -> float:
        """Bytes of an accelerator that training can use."""
        return self.hardware.memory * self.hardware.usable

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return max(one.peak for one in self.ranks) <= self.limit

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds between which a step lies in 80 of 100 cases."""
        return self.time.seconds * self.spread[0], self.time.seconds * self.spread[1]

    @property
    def seconds(self) -> Mapping[str, float]:
        """A step: what adds up to `time.seconds`."""
        parts = self.time.parts
        visible = sum(parts[axis] for axis in (*PARTS[4:], "pp"))
        return {
            "compute": sum(parts[name] for name in PARTS[:4]),
            "exposed communication": visible,
            "bubble": parts["bubble"],
            "optimizer": parts["optimizer"],
            "rest": parts["step"] + parts["scale"],
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        low, high = self.interval
        return {
            "mesh": self.mesh,
            "gpus": self.gpus,
            "hardware": self.hardware.name,
            "software": self.software,
            "precision": self.precision,
            "fits": self.fits,
            "limit": self.limit,
            "ranks": [_as_dict(one) for one in self.ranks],
            "ledger": [asdict(line) for line in self.ledger],
            "seconds": {"step": self.time.seconds, "low": low, "high": high, **self.seconds},
            "parts": dict(self.time.parts),
            "bubble": self.time.bubble,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.time.seconds,
            "mfu": dict(self.mfu),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | Path) -> None:
        """Draw memory by rank and the parts of a step into a picture file. Needs matplotlib."""
        from meshpar.dry_run.picture import draw

        draw(self, path)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        yield f"{self.gpus} x {self.hardware.name} as {self.mesh}, {self.software}, {self.precision}"
        yield ""
        yield f"Memory at the fullest moment, of {self.limit / GiB:.0f} GiB usable{'' if self.fits else ': IT DOES NOT FIT'}"
        yield from table([MEMORY, *map(memory_row, self.ranks)], right=tuple(range(2, len(MEMORY))))
        yield ""
        yield "Communication of a rank in a step"
        yield from table([LEDGER, *map(ledger_row, self.ledger)], right=(1, 5, 6, 7, 8))
        yield ""
        yield from self.summary()

    def summary(self) -> Iterator[str]:
        """Time and utilisation in words."""
        low, high = self.interval
        parts = " + ".join(f"{name} {seconds:.3g}" for name, seconds in self.seconds.items())
        yield f"A step takes {self.time.seconds:.3g} s ({low:.3g} to {high:.3g} in 80 of 100 cases) = {parts}"
        exposed = ", ".join(f"{axis} {self.time.parts[axis]:.3g} s" for axis in (*PARTS[4:], "pp") if self.time.parts[axis])
        yield f"Visible communication: {exposed or 'none'}; bubble {100 * self.time.bubble:.2f} % of the work"
        yield f"{self.tokens / self.time.seconds:.4g} tokens/s, {self.tokens / self.time.seconds / self.gpus:.4g} for each GPU"
        for name, share in self.mfu.items():
            yield f"MFU {name}: {100 * share:.1f} %  ({CONVENTIONS[name]})"
        yield from self.notes


def _as_dict(one: RankNeeds) -> dict[str, Any]:
    known = {name: value for name, value in asdict(one).items() if name != "course"}
    return {**known, "states": one.states, "peak": one.peak}


MEMORY = ("pp", "stages", "parameters", "gradients", "optimizer", "activations", "in flight", "buffers", "logits", "reserve", "peak")
LEDGER = ("axis", "ranks", "what", "level", "how often", "per step", "a message", "in all", "needed")


def memory_row(one: RankNeeds) -> tuple[str, ...]:
    """A row under `MEMORY`."""
    sizes = (one.parameters, one.gradients, one.optimizer, one.activations)
    return (
        str(one.rank),
        ", ".join(map(str, one.stages)),
        *(count(round(size), "B") for size in sizes),
        ", ".join(map(str, one.in_flight)),
        *(count(round(size), "B") for size in (one.buffers, one.logits, one.reserve, one.peak)),
    )


def ledger_row(line: LedgerLine) -> tuple[str, ...]:
    """A row under `LEDGER`."""
    return (
        line.axis,
        str(line.ranks),
        line.kind.replace("_", "-"),
        line.level,
        line.often,
        f"{line.count:.0f}",
        count(round(line.message), "B"),
        count(round(line.total), "B"),
        f"{line.bandwidth / 1e9:.3g} GB/s",
    )
