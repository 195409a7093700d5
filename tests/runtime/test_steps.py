"""Steps of a parallel model whose ranks are gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meshpar as mp


def test_after_the_simulation_has_ended() -> None:
    x = torch.ones(2, 8)
    with mp.simulate(2):
        pm = mp.parallelize(nn.Linear(8, 8), mp.make_mesh("tp=2"), example=(x,), loss_fn=lambda output, batch: output.sum())
    with pytest.raises(mp.ConfigError, match="has ended: its ranks are gone"):
        pm.train_step(x)
