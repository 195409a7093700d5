"""Attempts in order: what works is taken, what fails is remembered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshpar.capture.attempts import Attempt, first_that_works
from meshpar.capture.export import capture
from meshpar.errors import CaptureError, ConfigError


class Telling(CaptureError):
    pass


def failing(text: str, kind: type[Exception] = CaptureError) -> Attempt[int]:
    def run() -> int:
        raise kind(text) from ValueError(text)

    return Attempt(f"way {text[0]}", run)


def test_the_first_that_works_is_taken() -> None:
    asked = []
    attempts = (failing("a"), Attempt("b", lambda: 2), Attempt("c", lambda: 3, lambda: bool(asked.append("c"))))
    assert first_that_works(attempts) == 2 and not asked


def test_one_that_does_not_apply_is_passed_over() -> None:
    assert first_that_works((failing("a"), Attempt("b", lambda: 2, lambda: False), Attempt("c", lambda: 3))) == 3


def test_the_error_is_the_first_with_the_reasons_of_all() -> None:
    with pytest.raises(CaptureError) as caught:
        first_that_works((failing("a reason\n  and advice"), failing("b"), failing("a reason\n  again"), failing("c\n  more")))
    assert str(caught.value) == "a reason\n  and advice\n  Tried as well, way b: b\n  Tried as well, way c: c"
    assert str(caught.value.__cause__) == "a reason\n  and advice"


def test_an_error_that_tells_more_is_shown_instead() -> None:
    told = failing("b", Telling)
    with pytest.raises(Telling, match="b\n  Tried as well, way a: a"):
        first_that_works((failing("a"), Attempt(told.way, told.run, tells=(Telling,))))


def test_other_errors_are_nobodys_attempt() -> None:
    with pytest.raises(ConfigError):
        first_that_works((failing("a", ConfigError), Attempt("b", lambda: 2)))


class Patches(nn.Module):
    """Two rows of patches for each of four samples: other numbers of samples do not fit, whether the rows are cut or not."""

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        return x + patches.view(4, 2, 4).sum(1)


def test_all_that_was_tried_is_in_the_error_of_a_capture() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Patches(), (torch.ones(4, 4), torch.ones(8, 4)), scale=2)
    assert "Tried as well, with the rows of patches cut among samples" in str(caught.value)
