"""What a forward changes past the model is refused by name, and put back."""

from __future__ import annotations

import collections
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.export import capture

STEP, LAST = 0, None
COUNTS: dict[str, int] = {"n": 0}
EMPTY: dict[str, int] = {}
TALLY: collections.Counter[str] = collections.Counter()
LOG: list[int] = []
SEEN: set[int] = set()
BOX = types.SimpleNamespace(n=0)
TABLES: dict[int, Tensor] = {}
NUMBERS, RANDOM = itertools.count(1), random.Random(0)


class Total:
    total = 0
    log: list[int] = []

    def __init__(self) -> None:
        type(self).total += 1

    @classmethod
    def add(cls) -> int:
        cls.total += 1
        return cls.total


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


SLOTTED, HOLDER = Slotted(), {"slotted": Slotted()}


def on_the_class(net: Any) -> int:
    type(net).total = getattr(type(net), "total", 0) + 1
    return int(type(net).total)


def on_a_class_of_its_own(net: Any) -> int:
    return Total.add()


def in_a_constructor(net: Any) -> int:
    return Total().total


def in_a_list_of_a_class(net: Any) -> int:
    Total.log.append(1)
    return len(Total.log)


def in_a_global(net: Any) -> int:
    global STEP
    STEP += 1
    return STEP


def by_globals(net: Any) -> int:
    globals()["STEP"] = globals()["STEP"] + 1
    return STEP


def of_a_dict(net: Any) -> int:
    COUNTS["n"] += 1
    return COUNTS["n"]


def of_an_empty_dict(net: Any) -> int:
    EMPTY["n"] = EMPTY.get("n", 0) + 1
    return EMPTY["n"]


def of_a_counter(net: Any) -> int:
    TALLY["n"] += 1
    return TALLY["n"]


def of_a_list(net: Any) -> int:
    LOG.append(1)
    return len(LOG)


def of_a_set(net: Any) -> int:
    SEEN.add(len(SEEN))
    return len(SEEN)


def of_a_namespace(net: Any) -> int:
    vars(BOX)["n"] += 1
    return int(BOX.n)


def of_slots(net: Any) -> int:
    object.__setattr__(HOLDER["slotted"], "n", HOLDER["slotted"].n + 1)
    return HOLDER["slotted"].n


def of_itself(net: Any) -> int:
    of_itself.calls = getattr(of_itself, "calls", 0) + 1  # type: ignore[attr-defined]
    return int(of_itself.calls)  # type: ignore[attr-defined]


def of_a_default(net: Any, memo: list[int] = []) -> int:  # noqa: B006
    memo.append(1)
    return len(memo)


def drawn(net: Any) -> int:
    return next(NUMBERS)


def at_random(net: Any) -> float:
    return RANDOM.random()


def _closure() -> Callable[[Any], int]:
    count = 0

    def in_a_closure(net: Any) -> int:
        nonlocal count
        count += 1
        return count

    return in_a_closure


RULES: tuple[tuple[Callable[[Any], float], str], ...] = (
    (on_the_class, r"Net\.total"),
    (on_a_class_of_its_own, r"Total\.total"),
    (in_a_constructor, r"Total\.total"),
    (in_a_list_of_a_class, r"Total\.log"),
    (in_a_global, r"STEP of test_outside\.py"),
    (by_globals, r"STEP of test_outside\.py"),
    (of_a_dict, r"COUNTS of test_outside\.py"),
    (of_an_empty_dict, r"EMPTY of test_outside\.py"),
    (of_a_counter, r"TALLY of test_outside\.py"),
    (of_a_list, r"LOG of test_outside\.py"),
    (of_a_set, r"SEEN of test_outside\.py"),
    (of_a_namespace, r"BOX of test_outside\.py"),
    (of_slots, r"HOLDER of test_outside\.py\['slotted'\]\.n"),
    (of_itself, r"of_itself\.calls"),
    (of_a_default, r"a default of of_a_default"),
    (drawn, r"NUMBERS of test_outside\.py"),
    (at_random, r"RANDOM of test_outside\.py"),
    (_closure(), r"count of _closure\.<locals>\.in_a_closure"),
)


class Net(nn.Module):
    def __init__(self, rule: Callable[[Any], float]) -> None:
        super().__init__()
        self.a, self.rule = nn.Linear(4, 4), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).square().mean() * self.rule(self)


X = torch.ones(2, 4)


@pytest.mark.parametrize(("rule", "name"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_what_counts_outside_is_refused_by_name_and_put_back(rule: Callable[[Any], float], name: str) -> None:
    net = Net(rule)
    before = rule(net)
    with pytest.raises(mp.CaptureError, match=name):
        capture(net, (X,))
    if rule not in (drawn, at_random):
        assert rule(net) == before + 1, "the capture left nothing behind"


def remade(net: Net) -> Any:
    if 4 not in TABLES:
        TABLES[4] = torch.arange(4.0)
    if getattr(Total, "table", None) is None:
        Total.table = torch.arange(4.0)  # type: ignore[attr-defined]
    return (TABLES[4] + Total.table).sum()  # type: ignore[attr-defined]


def same_again(net: Net) -> float:
    global STEP
    STEP, COUNTS["n"] = 1000 + 0 * STEP, 1000
    return STEP


def test_what_every_forward_makes_again_is_no_state() -> None:
    capture(Net(remade), (X,))
    assert TABLES == {} and not hasattr(Total, "table")
    global STEP
    before, STEP, COUNTS["n"] = (STEP, COUNTS["n"]), 1000, 1000
    capture(Net(same_again), (X,))
    STEP, COUNTS["n"] = before


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    def failing(net: Net) -> float:
        of_a_list(net), of_itself(net)
        raise ValueError("no")

    count = len(LOG)
    with pytest.raises(mp.CaptureError, match="no"):
        capture(Net(failing), (X,))
    assert len(LOG) == count


class Box:
    def __init__(self, n: int) -> None:
        self.n = n


def another_box(net: Net) -> int:
    Total.box = Box(getattr(Total, "box", Box(0)).n + 1)  # type: ignore[attr-defined]
    return int(Total.box.n)  # type: ignore[attr-defined]


def test_another_object_of_the_same_type_is_another() -> None:
    Total.box = before = Box(0)  # type: ignore[attr-defined]
    with pytest.raises(mp.CaptureError, match=r"Total\.box"):
        capture(Net(another_box), (X,))
    assert Total.box is before  # type: ignore[attr-defined]
