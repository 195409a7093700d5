"""Masks read as intervals: what models write out, at lengths at which no table of all pairs could be made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.passes.intervals import Intervals, intervals

LONG = 65536


def read(make: Callable[[], torch.Tensor]) -> Intervals | None:
    """The intervals of a mask that is made so; its shapes are known, its values are never computed."""
    with torch.device("meta"):
        graph = make_fx(make, tracing_mode="fake")().graph
    for node in graph.nodes:
        if "val" in node.meta and isinstance(node.meta["val"], torch.Tensor):
            set_facts(node, Facts(Info(tuple(node.meta["val"].shape), node.meta["val"].dtype, False)))
    last = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    assert isinstance(last, fx.Node)
    return intervals(last)


def positions(n: int) -> torch.Tensor:
    return torch.arange(n)


@pytest.mark.parametrize(
    "make",
    [
        lambda: positions(LONG)[:, None] >= positions(LONG),
        lambda: positions(LONG) <= positions(LONG)[:, None],
        lambda: (positions(LONG)[:, None] > positions(LONG) - 1) & torch.ones(LONG, LONG, dtype=torch.bool),
        lambda: torch.ones(LONG, LONG, dtype=torch.bool).tril(),
        lambda: (positions(LONG)[:, None] >= positions(LONG)).expand(2, 1, LONG, LONG),
        lambda: torch.logical_and(positions(LONG)[:, None] >= positions(LONG), positions(LONG)[:, None] > positions(LONG) - 5),
    ],
    ids=["ge", "le", "gt", "tril", "samples", "twice"],
)
def test_causal_at_any_length(make: Callable[[], torch.Tensor]) -> None:
    found = read(make)
    assert found is not None and found.is_causal


def test_a_window() -> None:
    found = read(lambda: (positions(LONG)[:, None] >= positions(LONG)) & (positions(LONG) > positions(LONG)[:, None] - 4096))
    assert found is not None and found.window == 4096 and not found.is_causal


@pytest.mark.parametrize(
    "make",
    [
        lambda: positions(8)[:, None] > positions(8),  # not oneself
        lambda: positions(8)[:, None] + 1 >= positions(8),  # one of the future
        lambda: (positions(8)[:, None] >= positions(8)) & (positions(8) > positions(8)[:, None] - 3),
        lambda: (positions(8)[:, None] >= positions(8)) & (positions(8)[:, None] // 4 == positions(8) // 4),  # documents
    ],
    ids=["before", "after", "window", "documents"],
)
def test_what_is_almost_causal_is_not(make: Callable[[], torch.Tensor]) -> None:
    found, mask = read(make), make()
    assert found is not None and not found.is_causal
    seen = torch.tensor([[bool(a <= j < b) for j in range(8)] for a, b in zip(found.start, found.stop, strict=True)])
    assert seen.equal(mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda: positions(8)[:, None] >= positions(8).flip(0),  # keys not in order
        lambda: (positions(8)[:, None] >= positions(8)) | (positions(8) < 2),  # a prefix
        lambda: (positions(8)[:, None] >= positions(8)) & (torch.rand(8) > 0.5),  # drawn
        lambda: (positions(2)[:, None, None] + positions(8)[:, None]) >= positions(8),  # another one for every sample
        lambda: (positions(8)[:, None] >= positions(8)) & (positions(8) > 0),  # a key that nobody sees
        lambda: (positions(8)[:, None] >= positions(8)).float(),
    ],
    ids=["order", "prefix", "drawn", "samples", "hole", "numbers"],
)
def test_what_is_not_an_interval_is_not_read(make: Callable[[], torch.Tensor]) -> None:
    assert read(make) is None
