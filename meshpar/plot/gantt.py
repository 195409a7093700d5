"""Pictures of pipeline schedules: a Gantt chart, a table of text, a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshpar.errors import ConfigError, MeshparError, raise_all
from meshpar.pipeline.schedule import COMPUTE, Event, Order, schedule_table
from meshpar.pipeline.timing import Costs, bubble, measured_costs, simulate
from meshpar.plot.canvas import COLOURS, IDLE, ink_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = dict(zip("FIBW", COLOURS))
_NAMES = {"F": "forward", "B": "backward", "I": "backward: input gradient", "W": "backward: weight gradient"}


def schedule(order: Order, *, costs: Costs | None = None, measured: Sequence[Event] | None = None, width: float = 13.0) -> Figure:
    """A Gantt chart of an order, a row per rank: as expected from `costs`, and below as measured, on the same scale.

    Boxes are numbered by microbatch where that can be read, later stages of a rank are lighter, what stays grey is idle. Without `costs`,
    the expected picture takes unit times, or the median times of the measured events (in seconds). `width` in inches. Needs matplotlib;
    raises `ConfigError` for measured events of other ranks or stages than the order's.

    >>> from meshpar.pipeline.schedule import order
    >>> schedule(order("zbv", 4, 8, 8)).savefig("zbv.png")  # doctest: +SKIP
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MeshparError(f"pictures are drawn by matplotlib, which is not installed: pip install 'meshpar[plot]' ({error}).") from error
    if measured is not None:
        measured = _from_zero(measured, order)
        costs = costs or measured_costs(measured, order.stages)
    panels: list[tuple[str, Sequence[Event]]] = [("expected", simulate(order, costs))]
    panels += [("measured", measured)] if measured is not None else []
    height = (0.42 * order.ranks + 0.75) * len(panels) + 0.55
    figure, grid = pyplot.subplots(len(panels), 1, figsize=(width, height), sharex=True, squeeze=False, layout="constrained")
    pyplot.close(figure)  # it is the caller's now: notebooks would show it twice
    length = max(event.end for _, events in panels for event in events)
    for axes, (name, events) in zip(grid[:, 0], panels):
        _draw(axes, order, events, 72 * (width - 1.5) / length)
        axes.set_title(_headline(name, events, order.ranks), loc="left", fontsize=10)
    grid[0, 0].set_xlim(0, length)
    grid[-1, 0].set_xlabel("time" if measured is None else "time in seconds")
    figure.suptitle(f"{order.schedule}: {order.ranks} ranks, {order.stages} stages, {order.microbatches} microbatches", fontsize=12)
    figure.legend(handles=_legend(order), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def chrome_trace(events: Iterable[Event], path: str | Path) -> None:
    """Write events (in seconds) as Chrome-trace JSON, which ui.perfetto.dev opens: a process per rank, a thread per stage.

    Transfers are asynchronous slices, as computation goes on meanwhile.
    """
    events = list(events)
    names = [_name("process", rank, 0, f"rank {rank}") for rank in sorted({e.rank for e in events})]
    names += [_name("thread", rank, stage, f"stage {stage}") for rank, stage in sorted({(e.rank, e.stage) for e in events})]
    slices = [each for number, event in enumerate(events) for each in _slices(event, number)]
    Path(path).write_text(json.dumps({"traceEvents": [*names, *slices], "displayTimeUnit": "ms"}))


def _draw(axes: Axes, order: Order, events: Sequence[Event], width: float) -> None:
    """Boxes of one panel, with numbers if they fit into nine of ten boxes. `width`: points that a unit of time takes."""
    computing = [event for event in events if event.kind in COMPUTE]
    first, last = min(event.start for event in computing), max(event.end for event in computing)
    durations = sorted(event.end - event.start for event in computing)
    narrow = width * durations[len(durations) // 10]
    size = min(8.5, 1.25 * narrow / len(str(order.microbatches - 1)))
    for rank in range(order.ranks):
        axes.broken_barh([(first, last - first)], (rank - 0.43, 0.86), facecolor=IDLE)
        row = [event for event in computing if event.rank == rank]
        lights = [_lightness(order.stages_of(rank), event.stage) for event in row]
        colours = [_lighter(_COLOURS[event.kind], light) for event, light in zip(row, lights)]
        spans = [(event.start, event.end - event.start) for event in row]
        axes.broken_barh(spans, (rank - 0.43, 0.86), facecolor=colours, edgecolor="white", linewidth=min(0.7, 0.1 * narrow))
        for event, colour in zip(row, colours) if size >= 4.5 else ():
            middle, ink = (event.start + event.end) / 2, ink_over(*colour)
            if event.end - event.start >= durations[len(durations) // 10]:
                axes.text(middle, rank, str(event.microbatch), ha="center", va="center_baseline", fontsize=size, color=ink)
    axes.set_ylim(order.ranks - 0.5, -0.5)
    axes.set_yticks(range(order.ranks), [f"rank {r}: {_listed(order.stages_of(r))}" for r in range(order.ranks)], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _headline(name: str, events: Sequence[Event], ranks: int) -> str:
    whole, steady = (f"{bubble(events, ranks, steady=steady):.1%}" for steady in (False, True))
    between = "" if whole == steady else f" ({steady} when steps follow each other without a barrier)"
    return f"{name}: bubble {whole} of the computing time{between}"


def _lightness(stages: Sequence[int], stage: int) -> float:
    return 0.45 * stages.index(stage) / max(1, len(stages) - 1)


def _lighter(colour: str, light: float) -> tuple[float, float, float]:
    red, green, blue = ((1 - light) * int(colour[at : at + 2], 16) / 255 + light for at in (1, 3, 5))
    return red, green, blue


def _legend(order: Order) -> list[Any]:
    from matplotlib.patches import Patch

    kinds = {a.kind for row in order.compute for a in row if a is not None}
    named = [Patch(color=_COLOURS[kind], label=name) for kind, name in _NAMES.items() if kind in kinds]
    several = order.stages > order.ranks
    return [*named, Patch(color=IDLE, label="idle"), *([Patch(alpha=0, label="lighter: later stage of the rank")] if several else [])]


def _listed(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _from_zero(events: Sequence[Event], order: Order) -> list[Event]:
    """The events counted from their first start."""
    strange = sorted({(e.rank, e.stage) for e in events if not 0 <= e.stage < order.stages or order.place[e.stage] != e.rank})
    complaints = [f"measured has stage {stage} on rank {rank}, which the order does not." for rank, stage in strange]
    raise_all(ConfigError, "plot.schedule:", complaints if events else ["measured has no events."])
    first = min(event.start for event in events)
    return [replace(event, start=event.start - first, end=event.end - first) for event in events]


def _name(what: str, rank: int, stage: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": rank, "tid": stage, "args": {"name": name}}


def _slices(event: Event, number: int) -> Iterator[dict[str, Any]]:
    microseconds = 1e6
    shared = {
        "name": f"{event.kind}{event.microbatch if event.microbatch >= 0 else ''}",
        "pid": event.rank,
        "tid": event.stage,
        "args": {"stage": event.stage, "microbatch": event.microbatch},
    }
    if event.kind in COMPUTE:
        duration = (event.end - event.start) * microseconds
        yield {**shared, "ph": "X", "cat": "compute", "ts": event.start * microseconds, "dur": duration}
    else:
        for phase, time in (("b", event.start), ("e", event.end)):
            yield {**shared, "ph": phase, "cat": "transfer", "id": number, "ts": time * microseconds}


__all__ = ["chrome_trace", "schedule", "schedule_table"]
