"""The Plan as data: JSON and hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from meshpar.errors import PlanError
from meshpar.plan import AxisPlan, Comm, NodePlan, ParameterPlan, Plan, StagePlan
from meshpar.sharding.types import I, Owned, P, R, Ragged, Shard, plain

CUT = Shard(0, 1, ((8, 4), (2, 4)))
PLAN = Plan(
    (("dp", 2), ("tp", 2)),
    "0123",
    (
        AxisPlan(
            "tp",
            2,
            {"w": NodePlan((), (CUT,), "matrix"), "y": NodePlan((R, CUT, Ragged()), (P, I), "rows", (None, plain(1, 8)))},
            (I, plain(0, 4)),
        ),
    ),
    {"w": ParameterPlan((40, 8), "float32", True, {"tp": CUT, "dp": R, "ep": Owned(1)}, "matrix", (0, 1))},
    (StagePlan("", 0, "first"), StagePlan("linear_3", 1, "balance")),
    {"microbatches": 2},
    (Comm("all_reduce", "tp", "forward", 1536.0, 1, "p_to_i", "layers.0", "layers.0"),),
    ("one note",),
    {"x": "float32 [4, 8]"},
)


def test_json_keeps_everything() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_files(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == PLAN and read.hash == PLAN.hash and hash(read) == hash(PLAN)


def test_the_hash_is_the_same_in_every_process() -> None:
    assert PLAN.hash == "d114565cfafbaefe"


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, mesh=(("dp", 4), ("tp", 2))),
        replace(PLAN, graph="4567"),
        replace(PLAN, axes=(replace(PLAN.axes[0], outputs=(I, I)),)),
        replace(PLAN, axes=(replace(PLAN.axes[0], nodes={**PLAN.axes[0].nodes, "w": NodePlan((), (plain(0, 40),), "matrix")}),)),
        replace(PLAN, parameters={"w": replace(PLAN.parameters["w"], placements={"tp": I, "dp": R})}),
        replace(PLAN, options={"microbatches": 4}),
        replace(PLAN, buffers={"mean": (1,)}),
        replace(PLAN, stages=(PLAN.stages[0], replace(PLAN.stages[1], start="linear_4"))),
    ],
)
def test_the_hash_tells_plans_apart(other: Plan) -> None:
    assert other.hash != PLAN.hash


def test_the_hash_is_that_of_the_decisions() -> None:
    assert replace(PLAN, ledger=()).hash == PLAN.hash


def test_axes_are_found_by_name() -> None:
    assert PLAN.axis("tp") is PLAN.axes[0]
    assert PLAN.axis("cp") is None


def test_another_version_is_refused() -> None:
    text = json.dumps({**json.loads(PLAN.to_json()), "version": 99})
    with pytest.raises(PlanError, match="this plan has format 99, this meshpar reads 3. Make the plan again."):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 3}', '"plan"'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan: .* A plan is written by plan.save"):
        Plan.from_json(text)
