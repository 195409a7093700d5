"""Sweeps: samples are the same everywhere and show every value; what is named, or asked for with --every-case, runs."""

from __future__ import annotations

from itertools import product

import pytest

from tests.sampling import sample

pytest_plugins = ["pytester"]

FILE = """
import pytest

@pytest.mark.sweep(2)
@pytest.mark.parametrize("x", range(5))
def test_sweep(x):
    pass

@pytest.mark.slow
def test_slow():
    pass

def test_other():
    pass
"""


def test_every_value_is_shown() -> None:
    cases = {f"{x}-{y}": {"x": x, "y": y} for x, y in product(range(3), range(4))}
    found = sample(cases, 4)
    assert len(found) == 4 and {name[0] for name in found} == set("012") and {name[2] for name in found} == set("0123")
    assert found == sample(dict(reversed(cases.items())), 4), "whatever the order"
    assert len(sample(cases, 20)) == 12


ASKED = {(): 3, ("--every-case",): 7, ("FILE::test_sweep",): 5, ("FILE::test_sweep[3]",): 1, ("FILE::test_slow",): 1}


@pytest.mark.parametrize(("asked", "count"), ASKED.items())
def test_what_runs(pytester: pytest.Pytester, asked: tuple[str, ...], count: int) -> None:
    pytester.makeconftest("from tests.conftest import pytest_addoption, pytest_collection_modifyitems")
    file = pytester.makepyfile(FILE)
    markers = ("-o", "markers=sweep(n)\nslow", "-p", "no:cacheprovider")
    result = pytester.runpytest_inprocess(*markers, *(one.replace("FILE", file.name) for one in asked))
    assert result.parseoutcomes()["passed"] == count
