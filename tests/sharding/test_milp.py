"""The 0-1 program: typings and the conversions between them."""

from __future__ import annotations

import warnings
from random import Random
from typing import Any

import pytest
import torch
from scipy.optimize import OptimizeResult

from meshpar.errors import PlanError
from meshpar.graph.facts import Info
from meshpar.sharding import milp as module
from meshpar.sharding.milp import Problem, ProgramStep, choose, possible
from meshpar.sharding.price import Price
from meshpar.sharding.types import I, P, R, Type, plain
from meshpar.sharding.typings import Choice

INFO = Info((1024, 1024), torch.float32, True)
S = plain(0, 1024)
PRICE = Price()
GATHER = PRICE.collective(INFO.nbytes / 2)


def _step(*options: tuple[tuple[Type, ...], Type, float], operands: tuple[tuple[int, int] | int, ...] = ()) -> ProgramStep:
    return ProgramStep(tuple(Choice(uses, (out,), cost, "") for uses, out, cost in options), operands, (INFO,))


def test_the_cheaper_typing_is_chosen() -> None:
    problem = Problem((_step(((), I, 2e-4), ((), S, 1e-4)),), (), (), 2)
    assert choose(problem, PRICE).picks == (1,)


def test_three_uses_of_one_value_share_one_conversion() -> None:
    """Staying whole saves each user less than a conversion costs, but all three together more."""
    work = 0.9 * (2 * GATHER)  # S -> R gathers forward and scatters backward

    def users(count: int) -> tuple[int, ...]:
        steps = [_step(((S,), S, 0.0), operands=(0,))]
        steps += [_step(((R,), R, 0.0), ((S,), S, work), operands=((0, 0),)) for _ in range(count)]
        return choose(Problem(tuple(steps), ((INFO, S),), (), 2), PRICE).picks

    assert users(1) == (0, 1)
    assert users(3) == (0, 0, 0, 0)


def test_what_others_want_is_paid_for() -> None:
    steps = (_step(((), P, 0.0), ((), S, GATHER / 10)),)
    assert choose(Problem(steps, (), (), 2), PRICE).picks == (0,)
    assert choose(Problem(steps, (), ((0, 0, S),), 2), PRICE).picks == (1,)


def test_given_values_are_converted() -> None:
    step = _step(((R,), R, GATHER), ((S,), S, 0.0), operands=(0,))
    assert choose(Problem((step,), ((INFO, S),), (), 2), PRICE).picks == (1,)
    assert choose(Problem((step,), ((INFO, R),), (), 2), PRICE).picks == (1,), "cutting what is replicated costs nothing"


def test_without_a_consistent_typing_it_says_so() -> None:
    flag = Info((8,), torch.bool, False)
    step = ProgramStep((Choice((P,), (I,), 0.0, ""),), (0,), (flag,))
    with pytest.raises(PlanError, match="no consistent typing of 1 operators"):
        choose(Problem((step,), ((flag, I),), (), 2), PRICE)


def test_what_can_be_converted() -> None:
    number, flag = Info((8,), torch.int64, False), Info((8,), torch.bool, False)
    assert possible(I, P, number) and not possible(I, P, flag)
    assert possible(I, R, INFO) and not possible(I, R, number), "replicate says something about a gradient"


@pytest.mark.parametrize("found", [False, True])
def test_a_search_that_runs_out_of_time_takes_what_it_has_or_the_first_there_is(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, float]] = []
    whole = module.milp

    def hurried(*args: Any, options: dict[str, float], **kwargs: Any) -> Any:
        asked.append(options)
        result = whole(*args, options=options, **kwargs)
        if len(asked) == 1:
            result.status, result.mip_gap = 1, 0.25
            result.x = result.x if found else None
        return result

    monkeypatch.setattr(module, "milp", hurried)
    problem = Problem((_step(((), I, 2e-4), ((), S, 1e-4)),), (), (), 2)
    if found:
        with pytest.warns(UserWarning, match=r"cheapest plan of 1 operators ended after 20 s, at most 25.0 % from the best"):
            assert choose(problem, PRICE).picks == (1,)
    else:
        assert choose(problem, PRICE).picks in ((0,), (1,))
    assert [one["time_limit"] for one in asked] == ([20.0] if found else [20.0, 200.0])


def test_a_search_that_finds_nothing_in_time_is_no_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "milp", lambda *args, **kwargs: OptimizeResult(x=None, status=1, message="Time limit reached"))
    problem = Problem((_step(((), I, 2e-4), ((), S, 1e-4)),), (), (), 2)
    with pytest.raises(PlanError, match=r"no plan for 1 operators was found in 220 s on this machine. Try again when it is less busy"):
        choose(problem, PRICE)


def test_of_many_variables_nearly_the_best_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are searched for the best; many until what is found is within a hundredth of it, without a warning."""
    asked: list[float] = []
    search = module._Model._search

    def watched(self: module._Model, matrix: Any, time_limit: float, gap: float) -> OptimizeResult:
        asked.append(gap)
        return search(self, matrix, time_limit, gap)

    monkeypatch.setattr(module._Model, "_search", watched)
    kinds: tuple[Type, ...] = (R, S, I, P)
    random = Random(0)

    def problem(count: int) -> Problem:
        steps = [_step(((S,), S, 0.0), operands=(0,))]
        for at in range(count):
            options = [((a, b), c, random.uniform(0, 3) * GATHER) for a in kinds[:2] for b in kinds[:2] for c in kinds]
            steps.append(_step(*options, operands=((at, 0), (max(0, at - 2), 0))))
        return Problem(tuple(steps), ((INFO, S),), (), 2)

    few, many = problem(2), problem(40)
    monkeypatch.setattr(module, "_LARGE", 200)
    choose(few, PRICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = choose(many, PRICE).seconds
    monkeypatch.setattr(module, "_LARGE", 10**9)
    best = choose(many, PRICE).seconds
    assert asked == [1e-5, 1e-2, 1e-5] and best <= near * (1 + 1e-9) and near <= best * 1.0101
