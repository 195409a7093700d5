"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from meshpar.graph.operators import OPERATORS

PACKAGE = Path(__file__).parents[1] / "meshpar"
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.fixture(autouse=True)
def operators_as_before() -> Iterator[None]:
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


@pytest.mark.sweep(18)
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    import_module(name)
    failed, _ = doctest.testmod(sys.modules[name])
    assert failed == 0


def test_most_modules_have_some() -> None:
    assert len(WITH_EXAMPLES) > 70


def test_an_example_that_does_not_hold_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(wrong):
        runner.run(test)
    assert runner.failures == 1
