"""Plans of new shapes are made of known ones; what is cut unevenly is another kind of plan."""

from __future__ import annotations

import torch
from torch import Tensor

import meshpar as mp
from meshpar.compile.programs import Programs
from meshpar.graph.text import fingerprint
from tests.models import GPT, numbers


def batch(samples: int, length: int) -> dict[str, Tensor]:
    return {"ids": numbers(53, samples, length), "labels": numbers(53, samples, length)}


def test_plans_are_made_of_known_ones_and_proved() -> None:
    with mp.simulate(4):
        programs = Programs(GPT(), mp.make_mesh("dp=2,tp=2"), mp.ParallelConfig())
        made = []
        for length in (12, 14, 18, 9, 11, 15, 20):
            seen = programs.seen((), batch(4, length), training=True)
            plan = programs.planned(seen)
            made.append(programs.planner.plans.made)
            assert plan.graph == fingerprint(seen.parts.captured)
            assert f"[4, {length}]" in plan.inputs["ids"] or f"[8, {length}]" in plan.inputs["ids"]
            programs.lowered(seen, plan)  # reads the program back: raises where a type is not that of its value
    assert made == [0, 0, 1, 1, 1, 2, 3], "even lengths, and odd ones, after two of each"


def test_parameters_stay_where_they_are() -> None:
    with mp.simulate(4):
        programs = Programs(GPT(), mp.make_mesh("dp=2,tp=2"), mp.ParallelConfig())
        plans = [programs.planned(programs.seen((), batch(4, length), training=True)) for length in (12, 14, 16, 18)]
    first = {name: one.placements for name, one in plans[0].parameters.items()}
    assert all({name: one.placements for name, one in plan.parameters.items()} == first for plan in plans)


def test_other_parameters_that_train_have_other_plans() -> None:
    with mp.simulate(4):
        programs = Programs(GPT(), mp.make_mesh("dp=2,tp=2"), mp.ParallelConfig())
        for length in (12, 14, 16):
            programs.planned(programs.seen((), batch(4, length), training=True))
        made = programs.planner.plans.made
        programs.set_trainable({"embed.weight": False})
        programs.planned(programs.seen((), batch(4, 18), training=True, trainable="frozen"))
        assert programs.planner.plans.made == made
        torch.manual_seed(0)
