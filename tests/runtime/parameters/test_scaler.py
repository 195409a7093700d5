"""The loss scale in float16: the history of scales, skipped steps and weights against torch's GradScaler on one device in float16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import meshpar as mp
from meshpar._torch import local_of
from tests.pool import Pool
from tests.runtime.parameters.test_tensors import Experts


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def start(spec: str, kind: str = "Deep", **config: Any) -> tuple[Any, nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    mesh = mp.make_mesh(spec, "cpu")
    torch.manual_seed(0)
    model = Deep() if kind == "Deep" else Experts()
    batch = {"x": torch.randint(11, (4, 8)), "y": torch.randint(11, (4, 8))}
    local = mp.local_batch(batch, mesh)
    return mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(precision="fp16", **config)), model, local, batch


def half_step(model: nn.Module, batch: dict[str, torch.Tensor], scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Forward and backward in float16, masters in float32."""
    half = {name: p.detach().half().requires_grad_() for name, p in model.named_parameters()}
    loss: torch.Tensor = torch.func.functional_call(model, half, kwargs=batch)
    for p, grad in zip(model.parameters(), torch.autograd.grad(scaler.scale(loss), list(half.values())), strict=True):  # type: ignore[arg-type]
        p.grad = grad.float()
    return loss.detach()


OPTIONS = {"init_scale": 2.0**18, "growth_interval": 3}


def histories(spec: str, fused: bool = False, **config: Any) -> list[tuple[list[float], list[float]]]:
    """Scale, norm and loss of every step, ours and one device's."""
    pm, model, local, batch = start(spec, **config)
    found: list[list[list[float]]] = []
    for one in (pm, model):
        make = torch.optim.Adam if fused else torch.optim.SGD
        optimizer = make([{"params": one.parameters()}], lr=0.05, fused=fused)
        scaler = mp.GradScaler("cpu", **OPTIONS) if one is pm else torch.amp.GradScaler("cpu", **OPTIONS)
        clip = mp.clip_grad_norm_ if one is pm else nn.utils.clip_grad_norm_
        found.append([])
        for _ in range(7):
            loss = scaler.scale(pm).train_step(**local) if one is pm else half_step(model, batch, scaler)  # type: ignore[call-overload, union-attr]
            norm = torch.zeros(())
            if not fused:
                scaler.unscale_(optimizer)
                norm = clip(one.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            found[-1].append([scaler.get_scale(), float(norm.nan_to_num(-1.0)), float(loss.double().mean())])
            optimizer.zero_grad()
        assert scaler.state_dict()["_growth_tracker"] == 0 and set(scaler.state_dict()) == set(torch.amp.GradScaler("cpu").state_dict())
    for name, parameter in pm.named_parameters():
        right = model.get_parameter(name).detach()
        assert float((mp.full_tensor(parameter) - right).abs().max()) < 2e-3 * float(right.abs().max()), (spec, config, name)
    return list(zip(*found, strict=True))


def over_modes(spec: str, modes: tuple[str, ...], **config: Any) -> list[list[tuple[list[float], list[float]]]]:
    return [histories(spec, data_parallel=mode, **config) for mode in modes]


def check(found: list[tuple[list[float], list[float]]]) -> None:
    scales = [theirs[0] for _, theirs in found]
    assert scales == [ours[0] for ours, _ in found] and scales[0] > scales[3] < scales[5], found  # backed off, then grew
    for ours, theirs in found:
        assert ours[1:] == pytest.approx(theirs[1:], rel=5e-3), found


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("spec", "config"),
    [("dp=2", {}), ("pp=2", {"microbatches": 2}), ("pp=2", {"microbatches": 2, "fused": True}), ("ep=2", {"kind": "Experts"})],
)
def test_the_history_is_that_of_one_device(gloo: Pool, spec: str, config: dict[str, Any]) -> None:
    for found in gloo.run(histories, spec, **config):
        check(found)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("spec", "world", "modes", "config"),
    [
        ("dp=2", 2, ("zero1", "replicate"), {"microbatches": 2}),
        ("dp=2", 2, ("zero1", "zero2"), {"fused": True}),
        ("pp=2,dp=2", 4, ("zero2",), {"microbatches": 2}),
        ("dp=2,ep=2", 4, ("zero1", "replicate"), {"kind": "Experts"}),
    ],
)
def test_the_history_in_every_mode(gloo: Pool, spec: str, world: int, modes: tuple[str, ...], config: dict[str, Any]) -> None:
    for each in gloo.run(over_modes, spec, modes, world=world, timeout=300, **config):
        for found in each:
            check(found)


def test_the_history_of_simulated_ranks(simulated: Any) -> None:
    with simulated(2):
        found = histories("tp=2")
    check(found)


def overflow_on_one_rank(spec: str) -> list[Any]:
    """An infinity in one element of one rank: all skip, and all back off."""
    pm, _, local, _ = start(spec)
    optimizer = torch.optim.SGD([{"params": pm.parameters()}], lr=0.1)
    scaler = mp.GradScaler("cpu", init_scale=64.0)
    before, found = [mp.full_tensor(p) for p in pm.parameters()], list[Any]()
    for bad in (True, False):
        scaler.scale(pm).train_step(**local)
        if bad and torch.distributed.get_rank() == 1:
            grad = next(p.grad for p in pm.parameters() if p.ndim == 2)
            local_of(grad)[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append((scaler.get_scale(), [torch.equal(a, mp.full_tensor(p)) for a, p in zip(before, pm.parameters(), strict=True)]))
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("spec", ["pp=2", "dp=2", "tp=2"])
def test_an_overflow_on_one_rank_is_all_ranks(gloo: Pool, spec: str) -> None:
    for (scale, same), (then, later) in gloo.run(overflow_on_one_rank, spec):
        assert scale == then == 32.0 and all(same) and not any(later)


def without_parameters() -> list[float]:
    """A rank whose optimizer has none takes part; a step that was not scaled is refused; a disabled scaler does nothing."""
    pm, _, local, _ = start("pp=2")
    rank = torch.distributed.get_rank()
    optimizer = torch.optim.SGD([{"params": [] if rank else list(pm.parameters())}], lr=0.1)
    scaler = mp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(pm).train_step(**local)
    if not rank:
        local_of(next(p.grad for p in pm.parameters()))[0, 0] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    again = pickle_round_trip(scaler.state_dict())
    pm.train_step(**local)
    with pytest.raises(mp.ConfigError, match="the last train_step was not scaled"):
        scaler.unscale_(optimizer)
    norm = float(mp.grad_norm(pm.parameters()))
    off = mp.GradScaler("cpu", enabled=False)
    for p in pm.parameters():
        p.grad = None
    off.scale(pm).train_step(**local)
    return [scaler.get_scale(), again, norm, float(mp.grad_norm(pm.parameters()))]


def pickle_round_trip(state: dict[str, Any]) -> float:
    scaler = mp.GradScaler("cpu")
    scaler.load_state_dict(copy.deepcopy(state))
    return scaler.get_scale()


def test_ranks_without_parameters(gloo: Pool) -> None:
    for scale, again, _, norm in gloo.run(without_parameters):
        assert scale == again == 32.0 and 0 < norm < 10
