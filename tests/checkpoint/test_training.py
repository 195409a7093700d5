"""Training runs that go on after loading, on the mesh they were saved from and on others, against the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshpar as mp
from meshpar.checkpoint import AllRanks, PerRank, inspection
from meshpar.checkpoint.training import load, save, save_async
from meshpar.errors import CheckpointError
from tests.models import GPT
from tests.pool import Pool

SECONDS = 240.0  # the first run of a pool imports everything
Case = tuple[str, str, str]
"""Mesh, data-parallel mode, optimizer."""


class Net(GPT):
    """GPT of uneven fused heads, an odd vocabulary, a tied head, a frozen parameter, and buffers of odd dtypes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(heads=6, kv=2, width=24, vocab=37, layers=1, dropout=dropout)
        self.positions.weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5, 0.25, 3.0], dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("codes", torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn))


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(step))
    return {"ids": ids, "labels": ids.roll(1, 1)}


def net(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(dropout).double()


def optimizer_of(name: str, module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in trained if p.ndim < 2]}]
    made: torch.optim.Optimizer
    if name == "sgd":
        made = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    elif name == "adafactor":
        made = torch.optim.Adafactor(groups, lr=0.05)
    else:
        made = torch.optim.AdamW(groups, lr=0.01, amsgrad=True, **({name: True} if name in ("fused", "foreach") else {}))
    return made, torch.optim.lr_scheduler.MultiStepLR(made, [2, 4], gamma=0.5)


def parallel(case: Case, seed: int = 0, dropout: float = 0.0) -> tuple[Any, torch.optim.Optimizer, Any]:
    spec, mode, name = case
    mesh = mp.make_mesh(spec)
    config = mp.ParallelConfig(data_parallel=mode)  # type: ignore[arg-type]
    pm = mp.parallelize(net(seed, dropout), mesh, example=mp.local_batch(batch(0), mesh), config=config)
    return pm, *optimizer_of(name, pm)


def train(pm: Any, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(float(pm.train_step(**mp.local_batch(batch(step), pm.mesh))))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def whole(pm: nn.Module) -> dict[str, torch.Tensor]:
    return {**{n: mp.full_tensor(p) for n, p in pm.named_parameters()}, **{n: b.clone() for n, b in pm.named_buffers()}}


def run_and_save(path: str, case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps, a save, three more; then the same again from the save, which must be the same bit for bit."""
    pm, optimizer, scheduler = parallel(case, dropout=0.1 if case[2] == "plain" else 0.0)
    with torch.no_grad():
        pm.scale[0], pm.count[...], pm.flags[1] = 0.125, 41, True  # not what the model starts with
    train(pm, optimizer, scheduler, range(3))
    rank = pm.mesh.get_rank()
    extra = {"step": 3, "shape": (4, float("inf")), "mean": torch.arange(3.0), "position": PerRank(rank), "noise": PerRank(torch.rand(2))}
    torch.manual_seed(100 + rank)
    save(path, pm, optimizer, scheduler=scheduler, extra=extra)
    drawn = torch.rand(3)
    losses = train(pm, optimizer, scheduler, range(3, 6))

    again, optimizer, scheduler = parallel(case, seed=1, dropout=0.1 if case[2] == "plain" else 0.0)
    if case[2] == "fused":  # into state that exists already
        train(again, optimizer, scheduler, range(1))
    found = load(path, again, optimizer, scheduler=scheduler)
    assert torch.equal(torch.rand(3), drawn)
    assert (found["step"], found["shape"], found["position"]) == (3, (4, float("inf")), rank)
    assert torch.equal(found["mean"], torch.arange(3.0)) and torch.equal(found["noise"], extra["noise"].value)  # type: ignore[attr-defined]
    assert losses == train(again, optimizer, scheduler, range(3, 6))
    first, second = whole(pm), whole(again)
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)
    return losses, first


def load_and_run(path: str, cases: list[Case]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """The three steps after loading on each of some meshes."""
    out = []
    for case in cases:
        pm, optimizer, scheduler = parallel(case, seed=1)
        found = load(path, pm, optimizer, scheduler=scheduler, per_rank="all")
        position = found["position"]
        assert isinstance(position, AllRanks) and sorted(position.values) == list(range(len(position.values)))
        out.append((train(pm, optimizer, scheduler, range(3, 6)), whole(pm)))
    return out


def one_device(path: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same, with nothing but torch."""
    model = net(1)
    optimizer, scheduler = optimizer_of(name, model)
    load(path, model, optimizer, scheduler=scheduler, per_rank="skip")
    losses = []
    for step in range(3, 6):
        loss = model(**batch(step))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses, {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check(found: tuple[list[float], dict[str, torch.Tensor]], expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=0)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name].dtype == value.dtype
        torch.testing.assert_close(found[1][name].double(), value.double(), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "saved, four, two",
    [
        (("dp=2,tp=2", "zero3", "foreach"), [("tp=4", "zero3", "foreach"), ("dp=4", "zero2", "fused")], [("tp=2", "zero3", "foreach")]),
        (("tp=4", "zero3", "sgd"), [("dp=4", "zero1", "sgd")], [("dp=2", "replicate", "sgd")]),
        (("dp=4", "zero3", "fused"), [("dp_replicate=2,dp_shard=2", "zero3", "fused")], []),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_a_run_goes_on_from_any_mesh(gloo: Pool, tmp_path: Path, saved: Case, four: list[Case], two: list[Case]) -> None:
    path = tmp_path / "a"
    expected = gloo.run(run_and_save, str(path), saved, world=4, timeout=SECONDS)[0]
    assert inspection.verify(path).ok and sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    for world, cases in ((4, four), (2, two)):
        for found in gloo.run(load_and_run, str(path), cases, world=world, timeout=SECONDS)[0] if cases else ():
            check(found, expected)
    check(one_device(path, saved[2]), expected)
