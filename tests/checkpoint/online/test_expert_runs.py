"""Runs with experts divided over `ep` go on from any other mesh: stacked experts, and lists of which each rank owns some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from tests.models import text, tiny
from tests.moe_models import experts_in_a_list
from tests.pool import Pool


def made(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, batch = experts_in_a_list(penalty=0.0) if kind == "list" else (tiny("mixtral", output_router_logits=False), text(8))
    return model.double(), batch


def train(kind: str, mesh: str, steps: int, *, load: str | None = None, save: str | None = None) -> list[float]:
    """Losses of some steps on a mesh, after loading and before saving."""
    model, batch = made(kind)
    device_mesh = mp.make_mesh(mesh)
    own = mp.local_batch(batch, device_mesh)
    pm = mp.parallelize(model, device_mesh, example=own, config=mp.ParallelConfig(microbatches=2))
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    if load:
        assert mp.checkpoint.load(load, pm, optimizer) == {"steps": 2}
    losses = []
    for _ in range(steps):
        losses.append(pm.train_step(**own).item())
        optimizer.step()
        optimizer.zero_grad()
    if save:
        mp.checkpoint.save(save, pm, optimizer, extra={"steps": steps})
    return losses


def alone(kind: str, path: str) -> list[float]:
    """The same model in plain torch, from the same checkpoint."""
    model, batch = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mp.checkpoint.load(path, model, optimizer)
    losses: list[float] = []
    for _ in range(2):
        out: Any = model(**batch)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("kind", "tolerance"), [("list", 1e-9)])
def test_from_one_mesh_onto_others(gloo: Pool, tmp_path: Path, kind: str, tolerance: float) -> None:
    """(The norms of the model with stacked experts compute in float32.)"""
    path = str(tmp_path / "run")
    gloo.run(train, kind, "ep=2", 2, save=path, world=2, timeout=120)
    wanted = alone(kind, path)
    for mesh in ("pp=2", "tp=2"):
        for found in gloo.run(train, kind, mesh, 2, load=path, world=2, timeout=120):
            assert found == pytest.approx(wanted, rel=tolerance), mesh
