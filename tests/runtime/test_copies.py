"""Copies of a parallel model: they run the same programs on parameters of their own, and average weights as torch's AveragedModel does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.models import plain
from tests.pool import Pool


def _own(averages: list[torch.Tensor], current: list[torch.Tensor], count: object) -> None:
    """An average that users write over lists."""
    torch._foreach_mul_(averages, 0.9)
    torch._foreach_add_(averages, current, alpha=0.1)


def averaged(model: nn.Module, step: Callable[[Any], float]) -> tuple[AveragedModel, list[float]]:
    """Three AdamW steps that an exponential average of the weights follows; the losses."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.AdamW([{"params": model.parameters()}], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(step(model))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return average, losses


def average_against_one_device(spec: str, mode: str) -> list[tuple[float, float]]:
    """Losses while training and of the average at the end, beside those of one device."""
    model, batch = plain("gpt_kv2")
    model = model.double()
    mesh = mp.make_mesh(spec)
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]

    def alone(model: nn.Module) -> float:
        loss: torch.Tensor = model(**batch)
        loss.backward()
        return float(loss.detach())

    average, ours = averaged(pm, lambda pm: float(pm.train_step(**local)))
    expected, theirs = averaged(model, alone)
    with torch.no_grad():
        last = [(float(average.module.eval_step(**local)), float(expected.module(**batch)))]
    return [*zip(ours, theirs, strict=True), *last]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("spec", "mode"), [("dp=2,tp=2", "zero3"), ("dp=2,tp=2", "replicate"), ("dp_replicate=2,dp_shard=2", "zero2"), ("pp=2,tp=2", "zero3")]
)
def test_averages_of_weights(gloo: Pool, spec: str, mode: str) -> None:
    for found in gloo.run(average_against_one_device, spec, mode, world=4):
        assert all(abs(ours - theirs) < 1e-9 for ours, theirs in found), found
        assert abs(found[-1][0] - found[-2][0]) > 1e-3, "the average has weights of its own"


class Gains(nn.Module):
    """Parameters without dims, some in blocks with others, one drawn; and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        for layer in self.layers:
            layer.gain = nn.Parameter(torch.tensor(1.3))
        self.norm, self.heat = nn.BatchNorm1d(4), nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * layer.gain
        return (self.norm(x) * self.heat).square().mean() + x.square().mean()


def _made(how: str, path: str) -> tuple[nn.Module, nn.Module, str | None]:
    """What is made parallel, the model on one device, and where its weights are."""
    torch.manual_seed(1)
    model = Gains().double()
    torch.manual_seed(1)
    if how == "meta":
        with mp.meta():
            return Gains().double(), model, None
    with torch.device("meta"):
        empty = Gains().double()
    if torch.distributed.get_rank() == 0:
        safetensors.torch.save_file(dict(model.state_dict()), path)
    torch.distributed.barrier()
    return empty, model, path


def average_of_gains(cases: list[tuple[str, str, str]], folder: str) -> list[float]:
    """The largest difference of a loss, a weight, an average of them or a buffer from one device, over three steps."""
    found = []
    for i, (how, spec, mode) in enumerate(cases):
        given, model, weights = _made(how, f"{folder}/{i}.safetensors")
        mesh, x = mp.make_mesh(spec), torch.linspace(-1, 1, 32, dtype=torch.double).view(8, 4).sin()
        (local,) = mp.local_batch((x,), mesh)
        config = mp.ParallelConfig(data_parallel=mode)  # type: ignore[arg-type]
        pm = mp.parallelize(given, mesh, example=(local,), config=config, weights=weights)
        every: list[tuple[Any, ...]] = [
            (one, AveragedModel(one), AveragedModel(one, avg_fn=get_ema_avg_fn(0.7), use_buffers=True)) for one in (pm, model)
        ]
        optimizers = [torch.optim.SGD([{"params": one.parameters()}], lr=0.1, momentum=0.9) for one in (pm, model)]
        worst = 0.0
        for _ in range(3):
            ours, theirs = pm.train_step(local), model(x)
            theirs.backward()
            worst = max(worst, abs(float(ours) - float(theirs.detach())))
            for optimizer, (one, *averages) in zip(optimizers, every, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                for average in averages:
                    average.update_parameters(one)
        for one, other in zip(*[(own[0], *(average.module for average in own[1:])) for own in every], strict=True):
            right = {**dict(other.named_parameters()), **dict(other.named_buffers())}
            whole = {name: mp.full_tensor(p) for name, p in one.named_parameters()}
            values = {**whole, **dict(one.named_buffers())}
            worst = max([worst, *(float((value.double() - right[name].detach().double()).abs().max()) for name, value in values.items())])
        found.append(worst)
    return found


TWO = [(how, "dp=2", mode) for how, mode in (("meta", "zero1"), ("weights", "zero2"), ("weights", "replicate"), ("meta", "zero3"))]
FOUR = [
    ("meta", "pp=2,dp=2", "zero1"),
    ("weights", "dp=2,tp=2", "zero2"),
]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("world", "cases"), [(2, [*TWO, ("weights", "pp=2", "zero3")]), (4, FOUR)])
def test_averages_of_parameters_without_dims(gloo: Pool, tmp_path: Path, world: int, cases: list[tuple[str, str, str]]) -> None:
    for found in gloo.run(average_of_gains, cases, str(tmp_path), world=world, timeout=240):
        assert max(found) < 1e-12, dict(zip(cases, found, strict=True))


def copies_apart(spec: str) -> list[float]:
    """Losses of a model, of its copy, and of both after the copy alone has learned; batch norm's statistics too."""
    model, batch = plain("batch_norm")
    model = model.double()
    mesh = mp.make_mesh(spec)
    local = {name: value.double() for name, value in mp.local_batch(batch, mesh).items()}
    pm = mp.parallelize(model, mesh, example=local)
    pm.train_step(**local)
    twin = copy.deepcopy({"again": pm, "model": pm})["model"]
    grads = [(p.grad.full_tensor(), q.grad.full_tensor()) for p, q in zip(pm.parameters(), twin.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in grads) and list(twin.state_dict()) == list(pm.state_dict())
    found = [float(pm.eval().eval_step(**local)), float(twin.eval().eval_step(**local))]
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    found += [float(pm.eval_step(**local)), float(twin.eval_step(**local))]
    twin.train().train_step(**local)
    return [*found, float(pm.eval_step(**local)), float(twin.eval().eval_step(**local))]


def check_apart(found: list[float]) -> None:
    assert found[0] == found[1] == found[2] == found[4]
    assert len({found[0], found[3], found[5]}) == 3, "its step, then its statistics"


def test_copies_share_nothing(gloo: Pool) -> None:
    for found in gloo.run(copies_apart, "dp=2,tp=2", world=4):
        check_apart(found)


def test_copies_of_simulated_ranks() -> None:
    model, batch = plain("gpt_kv2")
    with mp.simulate(2):
        pm = mp.parallelize(model.double(), mp.make_mesh("tp=2"), example=batch)
        twin = copy.deepcopy(pm)
        losses = [pm.train_step(**batch), twin.train_step(**batch)]
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        losses += [pm.eval_step(**batch), twin.eval_step(**batch)]
        found = [{part.item() for part in local_tensors(loss).values()} for loss in losses]
    assert found[0] == found[1] == found[2] and found[3].isdisjoint(found[0])
    assert all(len(ranks) == 1 for ranks in found)


AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema one by one": {"avg_fn": get_ema_avg_fn(0.9)},
    "swa one by one": {"avg_fn": get_swa_avg_fn()},
    "own": {"multi_avg_fn": _own},
    "own one by one": {"avg_fn": lambda average, current, count: 0.7 * average + 0.3 * current},
    "default": {},
}

WITH_BUFFERS = ("ema", "ema one by one", "swa one by one", "own one by one")
"""The others do not work on counts of batches, which are integers, on one device either."""


def averages_with_buffers(spec: str, mode: str = "zero3") -> float:
    """The largest difference of any averaged parameter, buffer or loss, over all ways to average, with and without buffers."""
    model, batch = plain("batch_norm")
    model, batch = model.double(), {name: value.double() for name, value in batch.items()}
    mesh = mp.make_mesh(spec, "cpu")
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]
    pairs = [
        (AveragedModel(pm, use_buffers=use, **how), AveragedModel(model, use_buffers=use, **how))
        for name, how in AVERAGES.items()
        for use in ((False, True) if name in WITH_BUFFERS else (False,))
    ]
    steps = [(one, torch.optim.SGD([{"params": one.parameters()}], lr=0.1)) for one in (pm, model)]
    for _ in range(3):
        pm.train_step(**local)
        model(**batch).backward()
        for one, optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
            for pair in pairs:
                pair[one is model].update_parameters(one)
    worst = 0.0
    for ours, theirs in pairs:
        expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        held = dict(ours.named_parameters()) | dict(ours.named_buffers())
        for name, value in held.items():
            part = next(iter(local_tensors(mp.full_tensor(value)).values()))
            worst = max(worst, float((part.double() - expected[name].detach().double()).abs().max()))
        found = next(iter(local_tensors(ours.module.eval().eval_step(**local)).values()))
        with torch.no_grad():
            worst = max(worst, abs(float(found) - float(theirs.module.eval()(**batch))))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "mode"), [("pp=2", "zero3")])
def test_averages_with_buffers(gloo: Pool, spec: str, mode: str) -> None:
    assert all(worst < 1e-12 for worst in gloo.run(averages_with_buffers, spec, mode, timeout=120.0))


@pytest.mark.slow
def test_averages_with_buffers_of_simulated_ranks() -> None:
    with mp.simulate(2):
        assert averages_with_buffers("tp=2") < 1e-12


def test_statistics_are_not_made_anew_in_silence() -> None:
    model, batch = plain("batch_norm")
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2", "cpu"), example=batch)
        for one in (pm, AveragedModel(pm)):
            with pytest.raises(mp.ConfigError, match=r"Average the statistics with the weights, AveragedModel\(pm, use_buffers=True\)"):
                update_bn([], one)
        assert "BatchNorm2d" in repr(pm)
        pm.load_state_dict(model.state_dict())
