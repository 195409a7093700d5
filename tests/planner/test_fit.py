"""Constants come back from steps that were made with them; a source that is left out does not count."""

from __future__ import annotations

import pytest

from meshpar.errors import ConfigError
from meshpar.planner import Constants, Job, Mapping, Measurement, build, fit, scaled, step_time
from tests.planner.models import LARGE, SMALL, job

TRUE = Constants.priors().changed({"matrix hopper": 0.68, "link": 0.80, "step": 0.05})
FREE = ("matrix hopper", "link", "step")


def measured(asked: Job, mapping: Mapping, constants: Constants, group: str) -> Measurement:
    """A step that counts a hundred times: priors hardly do."""
    work, part, stack = build(asked, mapping), asked.cluster.hardware, asked.software
    return Measurement(work, part, stack, step_time(work, part, stack, constants).seconds, 100, group)


def steps(constants: Constants = TRUE, group: str = "a") -> list[Measurement]:
    many = [
        *((job(LARGE, stack="megatron-2021", batch=b), Mapping(tp, pp)) for b in (64, 128) for tp, pp in ((8, 1), (4, 2), (2, 8), (8, 2))),
        *((job(SMALL, gpus=8, batch=b), Mapping(tp)) for b in (8, 16, 64) for tp in (1, 2, 8)),
    ]
    return [measured(asked, mapping, constants, group) for asked, mapping in many]


def test_constants_come_back() -> None:
    found = fit(steps(), FREE)
    assert found.constants["matrix hopper"] == pytest.approx(0.68, rel=0.02)
    assert found.constants["link"] == pytest.approx(0.80, rel=0.05)
    assert max(abs(found.errors)) < 0.02
    assert all(factor < 1.6 for factor in found.factors().values())


def test_a_source_left_out_does_not_count() -> None:
    odd = Constants.priors().changed({"matrix hopper": 0.55})
    found = fit([*steps(), *steps(odd, "b")], FREE)
    assert found.without("b")["matrix hopper"] == pytest.approx(0.68, rel=0.03)
    assert found.without("a")["matrix hopper"] == pytest.approx(0.55, rel=0.05)


def test_nothing_measured_leaves_priors_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="no measurements"):
        fit([])
    with pytest.raises(ConfigError, match="no constants matrix hoper. Did you mean matrix hopper"):
        fit(steps(), ("matrix hoper",))


def test_one_step_gives_a_scale() -> None:
    one = steps()[0]
    slow = Measurement(one.work, one.hardware, one.stack, 1.25 * one.seconds)
    assert scaled(slow, TRUE) == pytest.approx(1.25)
