"""Expected times of pipeline schedules, against the closed forms of the papers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.errors import ConfigError
from meshpar.pipeline.schedule import COMPUTE, Event, forward_order, order
from meshpar.pipeline.timing import Costs, bubble, expected_bubble, measured_costs, simulate


def test_one_microbatch_on_two_ranks() -> None:
    events = simulate(order("1f1b", 2, 2, 1), Costs(forward=(1, 3), backward_input=2, backward_weight=(4, 5), send=0.5))
    assert [(e.rank, e.kind, e.start, e.end) for e in events] == [
        (0, "F", 0.0, 1.0),
        (0, "SEND_F", 1.0, 1.5),
        (1, "F", 1.5, 4.5),
        (1, "B", 4.5, 11.5),
        (1, "SEND_B", 11.5, 12.0),
        (0, "B", 12.0, 18.0),
    ]


def test_only_what_crosses_ranks_is_sent() -> None:
    events = simulate(order("zbv", 2, 4, 3), Costs(send=1.0))
    assert {(e.kind, e.stage) for e in events if e.kind not in COMPUTE} == {("SEND_F", 0), ("SEND_F", 2), ("SEND_B", 1), ("SEND_B", 3)}
    turned = {(e.kind, e.stage, e.microbatch): e for e in events}
    assert turned["F", 2, 0].start == turned["F", 1, 0].end


def test_a_weight_gradient_does_not_delay_the_rank_before() -> None:
    """Zero bubble: rank 0 has its gradient before rank 1 has done its weights."""
    at = {(e.kind, e.stage, e.microbatch): e for e in simulate(order("zero-bubble", 2, 2, 2), Costs(backward_weight=50))}
    assert at["I", 0, 0].start < at["W", 1, 0].start
    with_b = {(e.kind, e.stage, e.microbatch): e for e in simulate(order("1f1b", 2, 2, 2), Costs(backward_weight=50))}
    assert with_b["B", 0, 0].start == with_b["B", 1, 0].end == 53


@st.composite
def schedules(draw: st.DrawFn) -> tuple[str, int, int, int]:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "looped-bfs", "interleaved-1f1b", "zero-bubble", "zbv"]))
    p = draw(st.integers(1, 6))
    v = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule) or draw(st.integers(2, 4))
    m = draw(st.integers(1, 5)) if schedule in ("gpipe", "1f1b") else p * draw(st.integers(2, 4))
    return schedule, p, v, m


@settings(deadline=None)
@given(schedules(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_closed_forms_are_what_the_simulation_gives(sizes: tuple[str, int, int, int], f: int, b: int, w: int, steady: bool) -> None:
    schedule, p, v, m = sizes
    if schedule == "zbv":
        b = w = f
    if schedule == "zero-bubble":
        b = max(b, min(f, w))
    simulated = bubble(simulate(order(schedule, p, p * v, m), Costs(f, b, w)), p, steady=steady)
    assert simulated == pytest.approx(expected_bubble(schedule, p, m, v, f, b, w, steady=steady), abs=1e-12)


def test_published_numbers() -> None:
    assert expected_bubble("1f1b", 4, 8) == 3 / 8
    assert expected_bubble("interleaved-1f1b", 8, 128, 2) == pytest.approx(0.0273, abs=5e-5)
    assert expected_bubble("zero-bubble", 4, 8, 1, 3.0, 4.0, 2.0) == pytest.approx(3 * (3 + 4 - 2) / (8 * 9))  # ZB-H1
    assert expected_bubble("zbv", 4, 8, 2, steady=True) == 0


@pytest.mark.parametrize(("schedule", "p", "m", "v"), [("interleaved-1f1b", 4, 3, 2), ("zero-bubble", 4, 3, 1), ("zbv", 4, 5, 2)])
def test_there_is_no_closed_form_with_few_microbatches(schedule: str, p: int, m: int, v: int) -> None:
    assert expected_bubble(schedule, p, m, v) is None
    more = expected_bubble(schedule, p, 4 * p, v)
    assert more is not None
    assert bubble(simulate(order(schedule, p, p * v, m)), p) * m > more * 4 * p


def test_there_is_no_closed_form_for_some_costs() -> None:
    assert expected_bubble("zero-bubble", 4, 8, 1, 3.0, 1.0, 2.0) is None
    assert expected_bubble("zbv", 4, 8, 2, 1.0, 2.0, 1.0) is None
    assert expected_bubble("dualpipev", 4, 8, 2) is None
    assert bubble(simulate(order("zbv", 4, 8, 8), Costs(1, 2, 1)), 4, steady=True) > 0


def test_schedules_rank_as_published() -> None:
    names = [("gpipe", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("dualpipev", 2)]
    bubbles = [bubble(simulate(order(name, 4, 4 * v, 8), Costs(1 / v, 1 / v, 1 / v)), 4) for name, v in names]
    assert bubbles == sorted(bubbles, reverse=True)
    assert len(set(bubbles)) == len(bubbles)


def test_forwards_alone() -> None:
    events = simulate(forward_order("1f1b", 4, 4, 8))
    assert bubble(events, 4) == 3 / 8
    assert bubble(events, 4, steady=True) == 0


def test_uneven_stages_are_idle_time() -> None:
    """The slow stage works 4 x 6 of 4 x 6 + 3 + 3, the other 4 x 3."""
    assert bubble(simulate(order("gpipe", 2, 2, 4), Costs(forward=(1, 4))), 2) == (27 - 18) / 18


def test_bubble_counts_computation_only() -> None:
    events = simulate(order("1f1b", 2, 2, 2))
    noise = (Event(0, 0, 0, "SEND_F", -5.0, 50.0), Event(1, 1, -1, "REDUCE_GRAD", 0.0, 70.0))
    assert bubble([*events, *noise], 2) == bubble(events, 2) == 0.5
    with pytest.raises(ConfigError, match="no event of computation"):
        bubble(noise, 2)


def test_a_rank_without_events_is_idle() -> None:
    assert bubble([Event(0, 0, 0, "F", 0.0, 1.0)], 2) == bubble([Event(0, 0, 0, "F", 0.0, 1.0)], 2, steady=True) == 1.0


def test_costs_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(order("gpipe", 2, 2, 1), Costs(forward=[1, 2, 3], backward_input=-1.0))
    assert "forward has 3 numbers for 2 stages. Give one for each, or one number for all." in str(caught.value)
    assert "backward_input=-1.0 is negative." in str(caught.value)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_costs_of_measured_events_are_those_that_were_simulated(schedule: str) -> None:
    stages = 2 if schedule == "1f1b" else 4
    wanted = Costs(tuple(range(1, stages + 1)), (2.0,) * stages, (2.0,) * stages)
    made = order(schedule, 2, stages, 8)
    found = measured_costs(simulate(made, wanted), stages)
    assert simulate(made, found) == simulate(made, wanted)


def test_costs_of_measured_events_are_medians() -> None:
    events = [Event(0, 0, m, "F", 0.0, took) for m, took in enumerate((1.0, 100.0, 2.0))]
    assert measured_costs(events, 1) == Costs((2.0,), (0.0,), (0.0,))
    with pytest.raises(ConfigError, match="stage 1 has no forward among the events"):
        measured_costs(events, 2)


def test_whole_and_halved_backwards_of_one_stage() -> None:
    """Where a stage ran both, the halves tell how a backward divides."""
    made = order("dualpipev", 2, 4, 8)
    events = simulate(made, Costs(1.0, 3.0, 2.0))
    assert measured_costs(events, 4).of("B", 3) == 5.0
    assert measured_costs([replace(e, end=e.start) if e.kind == "I" else e for e in events], 4).of("I", 3) == 0.0


def test_timing_needs_no_torch() -> None:
    code = "import sys, meshpar.pipeline.timing, meshpar.pipeline.schedule, meshpar.plot.gantt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
