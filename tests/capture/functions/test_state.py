"""What an autograd.Function reads from Python beside its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshpar.capture.functions.state import changed, state_of
from tests.own_functions import Reversed, Straight, function

LEVELS = {"low": [1, 2]}


class Reading(Straight):
    """Reads a global, and a tensor of its class."""

    scale = torch.ones(())
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * LEVELS["low"][0] * Reading.scale


def test_arguments_functions_and_switches_of_torch_are_no_state() -> None:
    assert state_of(Straight) == {}
    assert state_of(function(lambda ctx, x: torch.relu(x), lambda ctx, g: g)) == {}


def test_attributes_globals_and_closures_are() -> None:
    held = [0]
    assert set(state_of(Reading)) == {"Reading.scale", "LEVELS"}
    assert set(state_of(Reversed)) == {"Reversed.factor"}
    assert set(state_of(function(lambda ctx, x: x, lambda ctx, g: g * held[0]))) == {"held"}


def test_changes_are_named() -> None:
    before = state_of(Reading)
    assert changed(before, state_of(Reading)) == ()
    LEVELS["low"][1] = 3
    assert changed(before, state_of(Reading)) == ("LEVELS",)
    LEVELS["low"][1] = 2
    Reading.scale.mul_(1)
    assert changed(before, state_of(Reading)) == ("Reading.scale",)
