"""The static check by itself: for ranks that do not exist, on the command line too."""

from __future__ import annotations

import pytest
import torch

from meshpar.errors import ConfigError
from meshpar.proof.alone import static_report
from meshpar.simulate import simulate
from tests import own_functions
from tests.models import plain


def test_a_model_is_proved_without_ranks() -> None:
    model, batch = plain("gpt")
    report = static_report(model, "dp=2,tp=8", batch)
    assert report.proved > 50 and not report.unproved and not report.faults
    assert str(report) == f"{report.proved} calls proved, 0 not proved, 0 faults"


def test_a_process_that_is_a_rank_is_told() -> None:
    model, batch = plain("gpt")
    with simulate(2), pytest.raises(ConfigError, match="is a rank already"):
        static_report(model, "tp=2", batch)


@pytest.mark.parametrize("name", ["clipped", "normalised", "shifted"])
def test_backwards_of_their_own_are_proved(name: str) -> None:
    call = getattr(own_functions, name)
    report = static_report(own_functions.Calls(getattr(call, "apply", call)), "tp=2", {"x": torch.randn(4, 8)})
    assert report.proved and not report.unproved and not report.faults


def test_what_is_not_proved_is_said_and_runs() -> None:
    report = static_report(own_functions.Routed(), "dp=2,ep=2", {"x": torch.randn(4, 6, 8)})
    assert {"adds terms of its own" in str(one) for one in report.unproved} == {True} and not report.faults
    assert report.share < 1 and "not proved (2x, first at" in str(report)
