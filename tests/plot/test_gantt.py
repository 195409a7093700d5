"""Pictures of schedules: what is drawn, written and said."""

from __future__ import annotations

import builtins
import doctest
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshpar as mp
from meshpar.errors import ConfigError, MeshparError
from meshpar.pipeline.schedule import COMPUTE, Event, Order, order
from meshpar.pipeline.timing import Costs, simulate
from meshpar.plot import gantt
from meshpar.plot.gantt import chrome_trace, schedule, schedule_table


def late(events: tuple[Event, ...]) -> list[Event]:
    """As if measured: ten times as slow, by a clock that began long ago."""
    return [replace(e, start=1e6 + 10 * e.start, end=1e6 + 10 * e.end) for e in events]


def boxes(axes: Any, ranks: int) -> list[int]:
    """The number of boxes per rank; every rank has a grey collection before its own."""
    return [len(axes.collections[2 * rank + 1].get_paths()) for rank in range(ranks)]


def test_table() -> None:
    assert schedule_table(order("1f1b", 2, 2, 2)) == "rank 0 | F0 F1 .  B0 .  B1\nrank 1 | .  F0 B0 F1 B1 ."
    assert schedule_table(order("zbv", 1, 2, 1)) == "rank 0 | 0F0 1F0 1I0 1W0 0I0 0W0"
    wide = schedule_table(order("gpipe", 11, 11, 1)).splitlines()
    assert wide[0].startswith("rank 0  | F0") and wide[10].startswith("rank 10 | .")


@settings(deadline=None)
@given(st.sampled_from(["1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"]), st.integers(1, 3), st.integers(1, 3))
def test_the_table_of_events_is_that_of_their_order(name: str, ranks: int, rounds: int) -> None:
    made = order(name, ranks, ranks if name == "1f1b" else 2 * ranks, 2 * ranks * rounds)
    assert schedule_table(reversed(late(simulate(made, Costs(send=0.5))))) == schedule_table(made)


def test_the_table_of_nothing() -> None:
    with pytest.raises(ConfigError, match="schedule_table: there is no event of computation"):
        schedule_table([])


def test_picture_of_what_is_expected() -> None:
    figure = schedule(order("zbv", 2, 4, 4))
    (axes,) = figure.axes
    assert boxes(axes, 2) == [24, 24]
    assert [text.get_text() for text in axes.texts][:3] == ["0", "1", "2"]
    assert axes.get_title(loc="left") == "expected: bubble 4.2% of the computing time (0.0% when steps follow each other without a barrier)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0: stages 0, 3", "rank 1: stages 1, 2"]
    assert figure.get_suptitle() == "zbv: 2 ranks, 4 stages, 4 microbatches"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "backward: weight gradient" in labels and "backward" not in labels


def test_picture_of_what_was_measured_has_the_scale_of_what_was_expected() -> None:
    made = order("1f1b", 2, 2, 4)
    figure = schedule(made, measured=late(simulate(made, Costs(send=1.0))))
    expected, measured = figure.axes
    assert expected.get_title(loc="left") == "expected: bubble 25.0% of the computing time"
    assert measured.get_title(loc="left").startswith("measured: bubble ")
    assert measured.get_title(loc="left") != "measured: bubble 25.0% of the computing time"
    assert boxes(expected, 2) == boxes(measured, 2) == [8, 8]
    assert expected.collections[1].get_paths()[0].vertices[:, 0].max() == 10  # a forward as long as measured, not of unit time
    assert expected.get_xlim() == measured.get_xlim()
    assert measured.get_xlim()[0] == 0 and 150 < measured.get_xlim()[1] < 200
    assert measured.get_xlabel() == "time in seconds"


def test_colours_tell_kinds_and_stages_apart() -> None:
    (axes,) = schedule(order("dualpipev", 1, 2, 2)).axes
    made = order("dualpipev", 1, 2, 2)
    colours = {tuple(colour) for colour in axes.collections[1].get_facecolor()}
    assert len(colours) == len({(a.kind, a.stage) for a in made.compute[0] if a is not None})


def test_numbers_are_left_out_where_they_do_not_fit() -> None:
    (axes,) = schedule(order("1f1b", 2, 2, 200)).axes
    assert not axes.texts and boxes(axes, 2) == [400, 400]


def test_measured_events_of_something_else() -> None:
    made = order("1f1b", 2, 2, 1)
    with pytest.raises(ConfigError, match="measured has stage 0 on rank 1, which the order does not"):
        schedule(made, measured=[replace(e, rank=1 - e.rank) for e in simulate(made)])
    with pytest.raises(ConfigError, match="measured has no events"):
        schedule(made, measured=[])


def test_the_picture_can_be_saved(tmp_path: Path) -> None:
    made = order("interleaved-1f1b", 2, 4, 4)
    schedule(made, measured=simulate(made)).savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MeshparError, match=r"matplotlib, which is not installed: pip install 'meshpar\[plot\]'"):
        schedule(order("gpipe", 1, 1, 1))


def traced(made: Order, path: Path, costs: Costs) -> list[dict[str, Any]]:
    chrome_trace(simulate(made, costs), path)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_chrome_trace(tmp_path: Path) -> None:
    made = order("zbv", 2, 4, 2)
    events = traced(made, tmp_path / "trace.json", Costs(2e-3, 1e-3, 1e-3, send=3e-3))
    first = next(e for e in events if e["ph"] == "X")
    assert first == {"name": "F0", "pid": 0, "tid": 0, "ph": "X", "cat": "compute", "ts": 0, "dur": 2000} | {"args": first["args"]}
    assert first["args"] == {"stage": 0, "microbatch": 0}
    named = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert named["process_name", 1, 0] == "rank 1" and named["thread_name", 0, 3] == "stage 3"
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == {(0, 0), (0, 3), (1, 1), (1, 2)}
    assert sum(e["ph"] == "X" for e in events) == sum(a is not None for row in made.compute for a in row)


def test_transfers_in_the_trace_begin_and_end(tmp_path: Path) -> None:
    events = traced(order("1f1b", 2, 2, 3), tmp_path / "trace.json", Costs(send=2.0))
    begun = {e["id"]: e["ts"] for e in events if e["ph"] == "b"}
    ended = {e["id"]: e["ts"] for e in events if e["ph"] == "e"}
    assert len(begun) == 6
    assert {number: begun[number] + 2e6 for number in begun} == ended
    assert not [e for e in events if e["ph"] == "X" and e["name"][:1] not in COMPUTE]


def test_public_names() -> None:
    assert mp.plot.schedule is schedule
    assert mp.schedule.order is order
    assert mp.timing.simulate is simulate


@pytest.mark.parametrize("module", [mp.schedule, mp.timing, gantt], ids=lambda module: module.__name__)
def test_examples(module: ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted and not done.failed
