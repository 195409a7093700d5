"""The quoted scaling table: which column comes out under which definition, and that both cannot come out together."""

from __future__ import annotations

import pytest

from benchmarks.scaling.definitions import DEFINITIONS, EFFICIENCY, GPUS, MFU, Point, efficiencies, implied, inside, points
from meshpar.planner import PRIORS, Constants

LARGE = (512, 2048)


def found(kind: str, part: str) -> dict[int, Point]:
    definition = next(one for one in DEFINITIONS if one.name.startswith(kind))
    return points(definition, part, Constants.default(), LARGE)


@pytest.mark.parametrize("part", ["a100", "h100"])
def test_strong_scaling_gives_the_efficiency_column_and_not_the_other(part: str) -> None:
    strong = found("strong: 175B", part)
    computing = efficiencies(strong)["one device"]
    assert all(EFFICIENCY[n][0] - 1 <= round(100 * computing[n]) <= EFFICIENCY[n][1] + 4 for n in LARGE)
    assert strong[2048].mfu < strong[512].mfu and not inside(strong[2048].mfu, MFU[2048])


@pytest.mark.parametrize("part", ["a100", "h100"])
def test_weak_scaling_gives_the_mfu_column_and_not_the_other(part: str) -> None:
    weak = found("weak: 175B", part)
    assert all(inside(weak[n].mfu, MFU[n]) for n in LARGE)
    assert not any(inside(efficiencies(weak)["one device"][n], EFFICIENCY[n]) for n in LARGE)


def test_both_columns_want_a_device_that_nothing_reaches() -> None:
    """MFU / efficiency is what one device would do: it rises with the cluster, past what products alone reach."""
    assert [round(100 * implied(n)) for n in GPUS] == [53, 64, 72, 80]
    assert implied(2048) > PRIORS["matrix hopper"].value
