"""`parallelize(plan=)`: obeyed as it is on all ranks, or refused with all that differs; never replaced in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import meshpar as mp
from meshpar.plan import Plan
from meshpar.sharding.types import Owned
from tests.models import plain
from tests.pool import Pool


class Small(nn.Module):
    def __init__(self, width: int = 8, *, twice: bool = False, slope: float = 0.5) -> None:
        super().__init__()
        self.up, self.down, self.twice, self.slope = nn.Linear(4, width), nn.Linear(width, 4), twice, slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu() if not self.twice else self.up(x).relu().tanh()
        return nn.functional.leaky_relu(self.down(hidden), self.slope).square().mean()


BATCH = (torch.ones(4, 4),)


def parallelized(model: nn.Module, *, batch: Any = BATCH, spec: str = "tp=2", **options: Any) -> Plan:
    """The plan of a model on simulated ranks."""
    given = {name: options.pop(name) for name in ("plan", "rules") if name in options}
    with mp.simulate(2):
        return mp.parallelize(model, mp.make_mesh(spec), example=batch, config=mp.ParallelConfig(**options), **given).plan


def test_a_plan_can_be_saved_and_given_back(tmp_path: Path) -> None:
    model, batch = plain("gpt")
    made = parallelized(model, batch=batch, rules={"*.weight": "replicate"}, sequence_parallel=False)
    made.save(tmp_path / "plan.json")
    again = parallelized(model, batch=batch, plan=Plan.load(tmp_path / "plan.json"))  # which other rules than the solver's own it obeys
    assert again.hash == made.hash != parallelized(model, batch=batch).hash
    assert made.inputs == {name: f"int64 {list(value.shape)}" for name, value in batch.items()}


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (Small(), {"spec": "dp=2"}, ["the plan was made for mesh tp=2, this is dp=2."]),
        (
            Small(),
            {"microbatches": 2},
            ["it was made for microbatches=1, this configuration has 2.", "float32 [4, 4] in the plan, float32 [2"],
        ),
        (
            Small(),
            {"recompute": "full", "data_parallel": "zero1"},
            ["recompute='none', this configuration has 'full'.", "data_parallel='zero3', this configuration has 'zero1'."],
        ),
        (
            Small(),
            {"rules": {"up.*": "replicate"}, "sequence_parallel": False},
            ["rules={'up.*': 'replicate'} is asked for, and the plan answers rules={}.", "sequence_parallel=False is asked for"],
        ),
        (
            Small(16),
            {},
            ["up.weight is float32 [8, 4] in the plan, float32 [16, 4] in the model.", "down.weight is float32 [4, 8] in the plan"],
        ),
        (
            Small().requires_grad_(False).requires_grad_(True).double(),
            {"batch": (torch.ones(4, 4).double(),)},
            ["up.bias is float32 [8] in"],
        ),
        (
            nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
            {},
            ["it has a parameter up.weight, the model has not.", "the model has a parameter 0.weight, the plan has not."],
        ),
        (Small(), {"batch": (torch.ones(6, 4),)}, ["the input x is float32 [4, 4] in the plan, float32 [6, 4] here (in a microbatch of"]),
        (Small(twice=True), {}, ["the plan knows no such tanh as the one at test_given.py:", "in the model"]),
        (Small(slope=0.25), {}, ["the forward differs in constants, in the order or in the connections of its operations."]),
    ],
)
def test_a_plan_for_something_else_is_refused_with_all_that_differs(model: nn.Module, options: dict[str, Any], said: list[str]) -> None:
    made = parallelized(Small())
    with pytest.raises(mp.PlanError) as caught:
        parallelized(model, plan=made, **options)
    for part in [
        *said,
        "plan=: the plan was made for something else",
        "A plan holds for what it was made for: pass that, or leave plan= out",
    ]:
        assert part in str(caught.value)


def test_a_forward_that_does_less_is_told() -> None:
    with pytest.raises(mp.PlanError, match="the plan has operations that this one does not run"):
        parallelized(Small(), plan=parallelized(Small(twice=True)))


def test_frozen_parameters_are_told() -> None:
    frozen = Small()
    frozen.down.bias.requires_grad_(False)
    with pytest.raises(mp.PlanError, match=r"down.bias is float32 \[4\] in the plan, float32 \[4\], frozen in the model."):
        parallelized(frozen, plan=parallelized(Small()))


def test_whole_experts_are_not_for_simulated_ranks() -> None:
    made = parallelized(Small())
    owned = replace(made.parameters["up.bias"], placements={"tp": Owned(0)})
    with pytest.raises(mp.PlanError, match="simulated ranks run one program: use processes"):
        parallelized(Small(), plan=replace(made, parameters={**made.parameters, "up.bias": owned}))


def test_other_batches_get_plans_of_their_own() -> None:
    """The plan is for the first graph; one for another shape keeps its placements."""
    model = Small()
    made = parallelized(model)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=BATCH, plan=made)
        torch.testing.assert_close(pm.eval_step(torch.ones(8, 4)), model(torch.ones(8, 4)).detach())
        assert pm.plan.hash == made.hash


def ranks_that_differ() -> list[str]:
    """What is said where one rank has a plan and the other none; other configurations under one plan; another schedule under one plan."""
    torch.manual_seed(0)
    model, mesh, rank = Small(), mp.make_mesh("tp=2"), dist.get_rank()
    plan = mp.parallelize(model, mesh, example=BATCH).plan
    staged = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def target(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output.square().mean()

    def parallelized_as(model: nn.Module, mesh: Any, **options: Any) -> Plan:
        return mp.parallelize(model, mesh, example=BATCH, loss_fn=target if model is staged else None, **options).plan

    pipeline = mp.make_mesh("pp=2")
    in_turn = parallelized_as(staged, pipeline, config=mp.ParallelConfig(microbatches=2, schedule="interleaved-1f1b"))
    asked: list[tuple[nn.Module, Any, dict[str, Any]]] = [
        (model, mesh, {"plan": plan if rank else None}),
        (model, mesh, {"plan": plan, "config": mp.ParallelConfig(seed=rank)}),
        (staged, pipeline, {"plan": in_turn, "config": mp.ParallelConfig(microbatches=2, schedule="zbv")}),
        (staged, pipeline, {"plan": in_turn, "config": mp.ParallelConfig(microbatches=2, schedule="interleaved-1f1b")}),
    ]
    said = []
    for model_, mesh_, options in asked:
        try:
            said.append(parallelized_as(model_, mesh_, **options).hash)
        except mp.PlanError as error:
            said.append(str(error))
    return [*said, in_turn.hash]


def test_ranks_agree_on_the_plan_and_all_else(gloo: Pool) -> None:
    for one_has_none, configurations, schedules, same, in_turn in gloo.run(ranks_that_differ, world=2):
        assert "the configuration, the rules or the plan that was given differs between ranks" in one_has_none
        assert "the configuration, the rules or the plan that was given differs between ranks" in configurations
        assert "it was made for schedule='interleaved-1f1b', this configuration has 'zbv'." in schedules
        assert same == in_turn
