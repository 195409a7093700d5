"""A forward is watched on shapes alone: what it does is in its calls, what it computes with in its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshpar.capture import witness
from meshpar.capture.export import capture
from meshpar.capture.state.taken import Ask
from meshpar.capture.witness import Unseen, Witness, without_memory


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        assert x.device.type == "cpu" and not x.is_meta
        y = (self.first if x.shape[1] < 8 else self.second)(x)
        return (y + torch.arange(x.shape[1], dtype=x.dtype)[:, None]).sum()


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def seen(model: nn.Module, length: int) -> Witness:
    about: dict[str, Any] = {"device": torch.device("cpu"), "scale": 1, "divide": 1, "loss_fn": None, "dtype": None, "ask": Ask()}
    like = capture(model, (torch.ones(2, 5, 4),))
    return witness.testify(model, *without_memory(((torch.ones(2, length, 4),), {})), like=like, **about)


def test_sizes_are_numbers_and_branches_are_calls() -> None:
    model = Net()
    parameters = [id(p) for p in model.parameters()]
    short, longer, long = (seen(model, length) for length in (5, 6, 9))
    assert short.calls == longer.calls
    assert short.calls != long.calls, "another matrix of the same shape is another forward"
    pairs = {(a, b) for a, b in zip(short.numbers, longer.numbers, strict=True) if a != b}
    assert (5, 6) in pairs
    assert [id(p) for p in model.parameters()] == parameters
    assert not any(p.is_meta for p in model.parameters())


def test_a_forward_that_asks_for_values_is_not_watched() -> None:
    with pytest.raises(Unseen, match="it cannot be run on shapes alone"):
        seen(Asking(), 6)


def test_the_outcome_is_that_of_a_capture() -> None:
    model = Net()
    like = capture(model, (torch.ones(2, 6, 4),))
    found = seen(model, 6)
    assert (found.outcome.spec, found.outcome.loss, found.outcome.leaves) == (like.out_spec, like.loss, like.out_leaves)
    assert found.state.read == like.state.read
