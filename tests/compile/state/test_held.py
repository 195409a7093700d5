"""Hooks that the first forward registers, behind a mark that it sets: they stay with the mark, once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import meshpar as mp


class Recording(nn.Module):
    """Collects what its layer gives by a hook that the first forward puts there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.installed = nn.Linear(4, 8), nn.Linear(8, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.up.register_forward_hook(lambda module, args, out: out * 2)
            self.installed = True
        return self.down(self.up(x)).square().mean()


def test_steps_of_several_lengths_run_the_hook_once() -> None:
    """`verify` takes two steps: the second is captured with the mark, and with the hook."""
    assert mp.verify(Recording(), "tp=2", (torch.randn(4, 4),)).ok
    assert mp.verify(Recording(), "dp=2", (torch.randn(4, 6, 4),), steps=3).ok
