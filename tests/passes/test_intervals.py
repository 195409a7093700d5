"""Masks read as intervals: what models write out, at lengths at which no table of all pairs could be made."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.passes.intervals import Intervals, intervals, unseen

LONG = 65536


def read(make: Callable[[], torch.Tensor], reader: Callable[[fx.Node], Intervals | None] = intervals) -> Intervals | None:
    """The intervals of a mask that is made so; its shapes are known, its values are never computed."""
    with torch.device("meta"):
        graph = make_fx(make, tracing_mode="fake")().graph
    for node in graph.nodes:
        if "val" in node.meta and isinstance(node.meta["val"], torch.Tensor):
            set_facts(node, Facts(Info(tuple(node.meta["val"].shape), node.meta["val"].dtype, False)))
    last = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    assert isinstance(last, fx.Node)
    return reader(last)


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
        lambda: positions(8)[:, None] >= positions(8) * 3 % 8,  # keys not in order
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


def sized(make: Callable[[int], torch.Tensor], n: int) -> Callable[[], torch.Tensor]:
    return lambda: make(n)


HIDING: dict[str, Callable[[int], torch.Tensor]] = {
    "not": lambda n: ~(positions(n)[:, None] >= positions(n)),
    "triu": lambda n: torch.ones(n, n).triu(1).bool(),
    "triu of booleans": lambda n: torch.ones(n, n, dtype=torch.bool).triu(1),
    "tril is nought": lambda n: torch.ones(n, n).tril() == 0,
    "later keys": lambda n: (positions(n) > positions(n)[:, None]).expand(2, 1, n, n),
    "distance": lambda n: (positions(n)[:, None] - positions(n)) < 0,
    "distance from the key": lambda n: (positions(n) - positions(n)[:, None]) >= 1,
    "keys from the last": lambda n: positions(n)[:, None] < positions(n).flip(0).flip(0),
}


@pytest.mark.parametrize("make", HIDING.values(), ids=HIDING.keys())
def test_masks_of_what_is_hidden_at_any_length(make: Callable[[int], torch.Tensor]) -> None:
    for n in (8, LONG):
        found = read(sized(make, n), unseen)
        assert found is not None and found.is_causal


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (positions(n)[:, None] < positions(n)) | (positions(n)[:, None] - positions(n) >= 5),
        lambda n: ~((positions(n)[:, None] >= positions(n)) & (positions(n)[:, None] - positions(n) < 5)),
        lambda n: torch.ones(n, n).triu(1).bool() | torch.ones(n, n).tril(-5).bool(),
    ],
    ids=["or", "not", "both diagonals"],
)
def test_windows_of_what_is_hidden(make: Callable[[int], torch.Tensor]) -> None:
    for n in (16, LONG):
        found = read(sized(make, n), unseen)
        assert found is not None and found.window == 5 and not found.is_causal


@pytest.mark.parametrize("reader", [intervals, unseen], ids=["shown", "hidden"])
@pytest.mark.parametrize("seed", range(20))
def test_any_mask_that_is_read_is_read_right(seed: int, reader: Callable[[fx.Node], Intervals | None]) -> None:
    """Comparisons, differences, diagonals, put together at random: of most there is an interval, and it is that of the values."""
    random, n = Random(seed), 7

    def table() -> torch.Tensor:
        rows, columns = positions(n)[:, None] + random.randint(-2, 2), positions(n) - random.randint(-2, 2)
        columns = columns.flip(0) if random.random() < 0.2 else columns
        first, second = random.choice([(rows, columns), (columns, rows)])
        compare = random.choice([torch.ge, torch.gt, torch.le, torch.lt])
        bound, diagonal = random.randint(-3, 3), random.randint(-3, 3)
        below = torch.ones(n, n).tril(diagonal)
        made = [lambda: compare(first, second), lambda: compare(first - second, bound), lambda: below.bool(), lambda: below == 0]
        one = random.choice(made)()
        return ~one if random.random() < 0.3 else one

    def mask() -> torch.Tensor:
        found = table()
        for _ in range(random.randint(0, 2)):
            found = found & table() if (reader is intervals) == (random.random() < 0.9) else found | table()
        return found

    state = random.getstate()
    found = read(mask, reader)
    random.setstate(state)
    wanted = mask() if reader is intervals else ~mask()
    if found is not None:
        seen = torch.tensor([[bool(a <= j < b) for j in range(n)] for a, b in zip(found.start, found.stop, strict=True)])
        assert seen.equal(wanted)
    else:
        READ.append(seed)
    assert len(READ) < 20, "half of them are not read"


READ: list[int] = []
"""Masks that were not read."""
