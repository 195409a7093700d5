"""Orders with two stages on a rank are those that this package runs, action by action."""

from __future__ import annotations

import pytest

from meshpar.errors import ConfigError
from meshpar.pipeline.schedule import Order, order
from meshpar.pipeline.timing import Costs, simulate
from meshpar.planner import Mapping, check, estimate
from meshpar.planner.schedule import ROWS, Times, kept, length
from meshpar.planner.v_shaped import place
from tests.planner.models import LARGE, job

SIZES = [(schedule, p, m) for schedule in ("zbv", "dualpipev") for p in (1, 2, 3, 4) for m in (2 * p, 2 * p + 1, 5 * p)]


def theirs(schedule: str, p: int, m: int) -> Order:
    return order(schedule, p, 2 * p, m)


@pytest.mark.parametrize("schedule, p, m", [*SIZES, ("zbv", 4, 2)])
def test_rows_are_those_that_run(schedule: str, p: int, m: int) -> None:
    real = theirs(schedule, p, m)
    assert place(p) == real.place
    for rank in range(p):
        assert ROWS[schedule](rank, p, 2, m) == [(a.kind, a.stage, a.microbatch) for a in real.compute[rank] if a is not None]


@pytest.mark.parametrize("schedule, p, m", SIZES)
def test_time_and_memory_are_those_of_the_order(schedule: str, p: int, m: int) -> None:
    times = Times((1.0,) * 2 * p, (1.1,) * 2 * p, (0.9,) * 2 * p, 0.05)
    real = theirs(schedule, p, m)
    ends = max(event.end for event in simulate(real, Costs(times.forward, times.input, times.weight, times.send)) if event.kind in "FBIW")
    assert length(schedule, p, m, times) == pytest.approx(ends, rel=0.02)
    assert kept(schedule, p, m, [1.0] * 2 * p) == tuple(max(sum(held.values()) for held in real.in_flight(rank)) for rank in range(p))


def test_many_microbatches_are_extrapolated() -> None:
    times = Times((1.0,) * 8, (1.0,) * 8, (1.0,) * 8)
    real = theirs("zbv", 4, 64)
    ends = max(event.end for event in simulate(real, Costs()))
    assert length("zbv", 4, 64, times) == pytest.approx(ends, rel=0.01)


def test_the_bubble_is_smaller_than_that_of_1f1b() -> None:
    asked = job(LARGE)
    usual, interleaved = (estimate(asked, Mapping(tp=4, pp=4, virtual=v)).time.bubble for v in (1, 2))
    assert estimate(asked, Mapping(tp=4, pp=4, virtual=2, schedule="zbv")).time.bubble < interleaved < usual


@pytest.mark.parametrize(
    "mapping, message",
    [
        (Mapping(tp=4, pp=4, virtual=4, schedule="zbv"), "zbv has two stages per rank, virtual=4; give virtual=2."),
        (Mapping(tp=4, pp=8, virtual=2, microbatch=8, schedule="dualpipev"), "at least one per stage, 16"),
        (Mapping(tp=4, pp=4, virtual=2, schedule="zbv", data_parallel="zero3"), "gathers every stage anew"),
    ],
)
def test_what_an_order_cannot_be_is_told(mapping: Mapping, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(job(LARGE), mapping)
    assert message in str(caught.value)
