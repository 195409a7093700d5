"""Samples of sweeps: as many cases as the test says, that show as many values of every parameter as they can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from zlib import crc32

import pytest


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests marked slow, and those cases of tests marked `sweep(n)` that are not among the n of the sample."""
    slow, sweeps = set(), dict[str, list[pytest.Item]]()
    for item in items:
        if item.get_closest_marker("slow"):
            slow.add(item)
        elif item.get_closest_marker("sweep"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return slow | {item for cases in sweeps.values() for item in _beyond_the_sample(cases)}


def _beyond_the_sample(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    marker = cases[0].get_closest_marker("sweep")
    assert marker is not None
    chosen = sample({item.name: item.callspec.indices for item in cases}, *marker.args)
    return [item for item in cases if item.name not in chosen]


def sample(cases: Mapping[str, Mapping[str, int]], count: int) -> list[str]:
    """`count` names of cases, given what value (by its number) each has of every parameter: values not seen yet come first.

    Every process and every run chooses the same.

    >>> sample({"a1": {"x": 0, "y": 0}, "a2": {"x": 0, "y": 1}, "b1": {"x": 1, "y": 0}, "b2": {"x": 1, "y": 1}}, 2)
    ['b1', 'a2']
    """
    left = sorted(cases, key=lambda name: crc32(name.encode()))  # (an order that follows no parameter)
    chosen: list[str] = []
    seen: set[tuple[str, int]] = set()
    while left and len(chosen) < count:
        best = max(left, key=lambda name: len(set(cases[name].items()) - seen))
        left.remove(best)
        chosen.append(best)
        seen |= set(cases[best].items())
    return chosen
