"""Numbers as inputs: arithmetic as Python and torch do it, everything else told and remembered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from meshpar.capture.export import capture
from meshpar.capture.state.numbers import Numbers, ReadNumber, compute, holds, is_number
from meshpar.capture.state.places import ABSENT, Place, same
from meshpar.capture.state.taken import Ask
from meshpar.graph.run import run

BETA = Place("", (("sub", ""), ("attr", "beta")))


def number(value: Any) -> ReadNumber:
    return Numbers({BETA: value}).of(BETA)


def test_arithmetic_makes_a_formula() -> None:
    made = 1 - 2 * number(3) / 4 + abs(-number(3)) % 2
    assert is_number(made) and isinstance(made, float)
    assert made.value == 1 - 2 * 3 / 4 + 3 % 2
    assert compute(made.formula, {BETA: 10}) == 1 - 2 * 10 / 4 + 10 % 2


def test_what_python_asks_is_remembered() -> None:
    beta = number(0.5)
    assert beta > 0 and not beta >= 1 and int(beta) == 0
    asked = beta.numbers.asked
    assert holds(asked, {BETA: 0.5}) and not holds(asked, {BETA: 0.7}), "int() told the value, whatever became of it"
    beta = number(0.5)
    assert (1 if beta else 0) == 1 and beta < 3
    assert holds(beta.numbers.asked, {BETA: 2.5}) and not holds(beta.numbers.asked, {BETA: 3.5})
    assert not holds(beta.numbers.asked, {BETA: 0.0})


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [(1, True, False), (1, 1.0, False), (0.0, -0.0, False), (math.nan, math.nan, True), ([1], [1], True), ([1], [True], False)]
    + [({"a": 1}, {"a": 1}, True), ((1, 2), [1, 2], False), ({1}, {1}, True), ({1}, {True}, False), (None, ABSENT, False)],
)  # fmt: skip
def test_the_same_value(a: Any, b: Any, alike: bool) -> None:
    assert same(a, b) == alike


class Mixed(nn.Module):
    """Numbers beside tensors of every kind: what has no dim would decide the type of a result if it were not cast."""

    def __init__(self) -> None:
        super().__init__()
        self.beta: Any = 0.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beta, count = self.beta, torch.arange(4)
        changed = x.clone()
        changed *= beta
        changed -= beta
        return (
            *(x * beta, beta * x, x + beta, beta - x, x / beta, beta / x, x - beta),
            *(x.mean() * beta, beta - x.sum(), count * beta, count / beta, beta + count, count.sum() * beta, (count > 1) * beta),
            *(x.bfloat16() * beta, x.mean().half() / beta, x * math.exp(-beta) * (beta + 1) / 3, changed),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.3, 3])
def test_tensors_compute_as_with_a_number(dtype: torch.dtype, beta: Any) -> None:
    model, x = Mixed(), torch.linspace(0.5, 2.0, 12, dtype=dtype).view(3, 4)
    model.beta = type(beta)(1)
    captured = capture(model, (x,), ask=Ask(numbers=(BETA,)))
    assert model.beta == 1, "a capture changes nothing"
    assert not captured.state.asked and len(captured.state.inputs) == 3
    exact = [compute(f, {BETA: beta}) for f in captured.state.inputs.values()]
    values = [torch.tensor(v, dtype=torch.int64 if isinstance(v, int) else torch.float64) for v in exact]
    found = run(captured, {}, dict(zip(captured.inputs, [x, *values], strict=True)))
    model.beta = beta
    for ours, theirs in zip(found, model(x), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
