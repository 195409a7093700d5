"""Which hooks a step of several microbatches keeps."""

from __future__ import annotations

import pytest

from meshpar.capture.export import capture
from meshpar.compile.hooks import check_microbatches
from meshpar.errors import CaptureError
from tests.hook_models import chain


@pytest.mark.sweep(4)
@pytest.mark.parametrize(
    ("where", "hook"), [("output", "clamp"), ("twice", "half"), ("weight", "half"), ("module", "half"), ("view", "clamp")]
)
def test_kept(where: str, hook: str) -> None:
    model, batch = chain(where, hook)
    check_microbatches(capture(model, (), batch))


@pytest.mark.parametrize(
    ("where", "hook", "words"),
    [
        ("weight", "clamp", r"clamp on a tensor at hook_models.py:\d+ .* is not linear, and its tensor has no dim of samples"),
        ("output", "unit", r"unit on a tensor .* was not seen to treat every element"),
        ("output", "shaped", r"at its shape"),
        ("output", "nothing", r"or keeps it"),
    ],
)
def test_refused(where: str, hook: str, words: str) -> None:
    model, batch = chain(where, hook)
    with pytest.raises(CaptureError, match=words):
        check_microbatches(capture(model, (), batch))
