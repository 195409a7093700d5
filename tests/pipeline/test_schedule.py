"""Pipeline orders: complete, free of deadlock, as published; sizes that a schedule does not allow are explained."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from benchmarks.planted_faults import orders
from meshpar.config import SCHEDULES
from meshpar.errors import ConfigError, PlanError
from meshpar.pipeline.schedule import COMPUTE, Action, Order, check, forward_order, order

KINDS = {"gpipe": "FB", "1f1b": "FB", "looped-bfs": "FB", "interleaved-1f1b": "FB", "zero-bubble": "FIW", "zbv": "FIW", "dualpipev": "FBIW"}


def row(of: Order, rank: int, kind: str) -> list[tuple[int, int]]:
    return [(a.stage, a.microbatch) for a in of.actions[rank] if a.kind == kind]


def text(actions: tuple[Action | None, ...]) -> str:
    return " ".join("." if a is None else f"{a.kind}{a.microbatch}" for a in actions)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    least, most = SCHEDULES[schedule]
    ranks = draw(st.integers(1, 6))
    stages = ranks * draw(st.integers(least, most or 4))
    microbatches = draw(st.integers(1, 14))
    if schedule in ("interleaved-1f1b", "zero-bubble"):
        microbatches -= microbatches % max(1, microbatches // ranks)
    return schedule, ranks, stages, max(microbatches, 2 * ranks) if schedule == "dualpipev" else microbatches


def test_1f1b_of_two_ranks() -> None:
    made = order("1f1b", 2, 2, 3)
    assert text(made.compute[0]) == "F0 F1 . B0 F2 B1 . B2"
    assert text(made.compute[1]) == ". F0 B0 F1 B1 F2 B2 ."
    assert " ".join(map(str, made.actions[0][:7])) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2"
    assert made.actions[0][-1] == Action("REDUCE_GRAD", 0)


def test_interleaved_order_is_the_published_one() -> None:
    """pp 2, v 2, m 4: rank 0 runs virtual microbatches 0 1 0 1 2 3 2 3 (arXiv 2104.04473)."""
    forwards = row(order("interleaved-1f1b", 2, 4, 4), 0, "F")
    assert [microbatch for _, microbatch in forwards] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [stage for stage, _ in forwards] == [0, 0, 2, 2, 0, 0, 2, 2]


def test_gpipe_and_looped_bfs_do_all_forwards_first() -> None:
    assert text(order("gpipe", 2, 2, 2).compute[1]) == ". F0 F1 B0 B1 ."
    assert row(order("looped-bfs", 2, 4, 2), 1, "F") == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert text(order("looped-bfs", 2, 4, 2).compute[1]).rsplit("F", 1)[1].startswith("1 B1 B0 B1 B0")


@pytest.mark.parametrize(("microbatches", "first"), [(1, "F0"), (2, "F0 F1"), (9, "F0 F1 F2 F3")])
def test_1f1b_keeps_few_microbatches_in_flight(microbatches: int, first: str) -> None:
    done = [a for a in order("1f1b", 4, 4, microbatches).compute[0] if a is not None]
    assert text(tuple(done[: done.index(Action("B", 0, 0))])) == first


def test_stages_that_meet_on_a_rank_need_no_transfer() -> None:
    made = order("zbv", 2, 4, 3)
    assert made.place == (0, 1, 1, 0)
    assert made.stages_of(0) == (0, 3)
    sends = {(a.kind, a.stage) for actions in made.actions for a in actions if a.kind.startswith("SEND")}
    assert sends == {("SEND_F", 0), ("SEND_F", 2), ("SEND_B", 1), ("SEND_B", 3)}
    assert all(a.kind in ("F", "B", "REDUCE_GRAD") for a in order("looped-bfs", 1, 3, 2).actions[0])


def test_stages_may_be_alone_on_a_rank_with_zero_bubble() -> None:
    assert text(order("zero-bubble", 2, 2, 2).compute[1]) == ". F0 I0 F1 I1 W0 W1"


@settings(deadline=None)
@given(sizes())
def test_orders_are_complete_and_never_hang(given: tuple[str, int, int, int]) -> None:
    schedule, ranks, stages, microbatches = given
    made = order(schedule, ranks, stages, microbatches)
    check(made)
    assert {a.kind for actions in made.actions for a in actions if a.kind in COMPUTE} <= set(KINDS[schedule])
    assert len({len(slots) for slots in made.compute}) == 1
    for rank, actions in enumerate(made.actions):
        reductions = [a.stage for a in actions if a.kind == "REDUCE_GRAD"]
        assert sorted(reductions) == list(made.stages_of(rank))
        for stage in reductions:
            after = actions[actions.index(Action("REDUCE_GRAD", stage)) :]
            assert not [a for a in after if a.stage == stage and a.kind in COMPUTE]


@settings(deadline=None)
@given(sizes(), st.integers(1, 9))
def test_forward_orders_never_hang(given: tuple[str, int, int, int], microbatches: int) -> None:
    made = forward_order(*given[:3], microbatches)
    check(made)
    assert {a.kind for actions in made.actions for a in actions} <= {"F", "SEND_F", "RECV_F"}
    assert made.place == order(*given).place


def test_every_virtual_stage_of_one_microbatch() -> None:
    assert str(forward_order("interleaved-1f1b", 2, 4, 1).actions[1][2]) == "1SEND_F0"


CLASSES = {
    "looped-bfs": ScheduleLoopedBFS,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@pytest.mark.parametrize("schedule", CLASSES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 8)])
def test_the_order_is_what_torch_would_run(schedule: str, ranks: int, microbatches: int) -> None:
    stage = SimpleNamespace(num_stages=2 * ranks, group_size=ranks, group_rank=0, submod=None)
    theirs: Any = CLASSES[schedule]([stage, stage], microbatches)  # type: ignore[arg-type, list-item]
    ours = order(schedule, ranks, 2 * ranks, microbatches)
    assert ours.place == tuple(theirs.stage_index_to_group_rank[s] for s in range(2 * ranks))
    for rank, actions in theirs.pipeline_order_with_comms.items():
        wanted = [str(part) for action in actions for part in action.sub_actions or (action,) if "SHARD" not in str(part)]
        made = [str(action) for action in ours.actions[rank]]
        assert sorted(made) == sorted(wanted)
        # Where receives stand depends on torch's gathering of parameters, which takes turns too; it sends what a pair computed after both.
        for free in ("RECV", "SEND") if schedule == "dualpipev" else ("RECV",):
            made, wanted = ([text for text in texts if free not in text] for texts in (made, wanted))
        assert made == wanted


def swapped(actions: tuple[Action, ...], a: int, b: int) -> tuple[Action, ...]:
    new = list(actions)
    new[a], new[b] = new[b], new[a]
    return tuple(new)


def test_broken_orders_are_found() -> None:
    made = order("1f1b", 2, 2, 2)
    late = replace(made, actions=(swapped(made.actions[0], 0, 1), made.actions[1]))
    with pytest.raises(PlanError, match="schedule '1f1b' does not run: ranks wait for each other at 0SEND_F0, 1RECV_F0."):
        check(late)
    crossed = order("gpipe", 2, 2, 2).actions
    with pytest.raises(PlanError, match="ranks wait for each other at 0SEND_F0, 1RECV_F1"):
        at = [crossed[1].index(Action("RECV_F", 1, m)) for m in (0, 1)]
        check(replace(order("gpipe", 2, 2, 2), actions=(crossed[0], swapped(crossed[1], *at))))
    halves = order("zero-bubble", 1, 1, 2)
    with pytest.raises(PlanError, match="ranks wait for each other at 0W0."):
        check(replace(halves, actions=(swapped(halves.actions[0], *(halves.actions[0].index(Action(k, 0, 0)) for k in "IW")),)))  # type: ignore[arg-type]
    lost = tuple(a for a in made.actions[1] if a != Action("B", 1, 1))
    with pytest.raises(PlanError) as caught:
        check(replace(made, actions=(made.actions[0], lost)))
    assert "stage 1 does F 1, B 0, I 0, W 0 times for microbatch 1." in str(caught.value)
    assert "rank 1 computes in one order in its slots and in another with transfers." in str(caught.value)
    with pytest.raises(PlanError, match="rank 0 does 0F0, which belongs to rank 1"):
        check(replace(made, place=(1, 1)))
    early = tuple(sorted(made.actions[1], key=lambda a: a.kind != "REDUCE_GRAD"))
    with pytest.raises(PlanError, match="1REDUCE_GRAD"):
        check(replace(made, actions=(made.actions[0], early)))


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "microbatches", "complaints"),
    [
        ("zbv", 2, 6, 1, ["stages=6: zbv puts exactly 2 on each of the 2 ranks. Nearest: stages=4."]),
        ("1f1b", 4, 8, 1, ["stages=8: 1f1b puts exactly 1 on each of the 4 ranks. Nearest: stages=4."]),
        ("dualpipev", 4, 7, 5, ["Nearest: stages=8.", "at least one microbatch per stage, 8. Nearest: microbatches=8."]),
        (
            "interleaved-1f1b",
            4,
            9,
            9,
            ["equally many, at least 2, on each", "stages=8 or stages=12.", "microbatches=8 or microbatches=10."],
        ),
        ("zero-bubble", 3, 3, 7, ["zero-bubble on 3 ranks", "Nearest: microbatches=6 or microbatches=8."]),
        ("gpipe", 0, 2, True, ["ranks=0: a whole number of at least 1.", "microbatches=True: a whole"]),
        ("zvb", 2, 2, 0, ["schedule='zvb': one of gpipe", "Did you mean zbv", "microbatches=0: a whole"]),
        ("looped-bfs", 3, 3, 1, ["at least 2, on each of the 3 ranks. Nearest: stages=6."]),
    ],
)
def test_sizes_that_do_not_fit_are_explained_at_once(
    schedule: str, ranks: int, stages: int, microbatches: int, complaints: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        order(schedule, ranks, stages, microbatches)
    assert str(caught.value).startswith(f"schedule {schedule!r} with ranks={ranks}, stages={stages}, microbatches={microbatches}:")
    for complaint in complaints:
        assert complaint in str(caught.value)


@settings(deadline=None)
@given(st.sampled_from(["interleaved-1f1b", "zero-bubble", "dualpipev"]), st.integers(1, 6), st.integers(1, 30))
def test_the_nearest_values_do_fit(schedule: str, ranks: int, microbatches: int) -> None:
    try:
        order(schedule, ranks, 2 * ranks, microbatches)
    except ConfigError as error:
        advice = str(error).rsplit("Nearest: ", 1)[1].rstrip(".")
        for each in advice.split(" or "):
            order(schedule, ranks, 2 * ranks, int(each.removeprefix("microbatches=")))


def test_every_fault_that_is_planted_in_an_order_is_refused() -> None:
    told = orders.planted()
    assert len(told) > 120
    assert not [place for place, text in told.items() if text is None]
    assert "sums its gradients 0 times" in str(told["zero-bubble", "gradients are not summed"])
