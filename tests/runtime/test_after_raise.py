"""What comes after a step, or a forward or backward of a loop of one's own, that raised: as if that had not been."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from tests.pool import Pool

FAILS = {"failed": threading.Lock(), "interrupted": threading.Lock()}
"""(Locks, whose state is none of what forward reads: the program stays.)"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.blocks[0](x))
        if x.requires_grad:
            x.register_hook(failing)
        return F.mse_loss(self.blocks[2](torch.tanh(self.blocks[1](x))), y)


def failing(grad: Tensor) -> Tensor:
    if FAILS["failed"].locked():
        raise ValueError("on purpose")
    if FAILS["interrupted"].locked():
        raise KeyboardInterrupt("on purpose")
    return grad


def batch(seed: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 6, dtype=torch.float64, generator=numbers) for name in ("x", "y")}


def step(pm: mp.ParallelModel, local: dict[str, Tensor]) -> None:
    pm.train_step(**local)


def loop(pm: mp.ParallelModel, local: dict[str, Tensor]) -> None:
    pm(**local).backward()


def own_loss(pm: mp.ParallelModel, local: dict[str, Tensor]) -> None:
    pm.forward_backward(local, lambda loss, _: loss)


WAYS: list[Callable[[mp.ParallelModel, dict[str, Tensor]], None]] = [step, loop, own_loss]


def trained(mesh: str, way: Callable[[mp.ParallelModel, dict[str, Tensor]], None], why: str, **config: Any) -> None:
    """Two optimizer steps on one device, and in parallel with one between them that fails."""
    torch.manual_seed(0)
    model = Net().double()
    made = mp.make_mesh(mesh)
    pm = mp.parallelize(model, made, example=mp.local_batch(batch(0), made), config=mp.ParallelConfig(**config))
    ours, theirs = (torch.optim.AdamW(one.parameters(), lr=0.1) for one in (pm, model))
    for seed in range(3):
        if seed == 1:
            FAILS[why].acquire()
            try:
                with pytest.raises(BaseException, match="on purpose"):
                    way(pm, mp.local_batch(batch(seed), made))
            finally:
                FAILS[why].release()
            if way is not loop:  # (a step cleans up at once: what is saved now is what an optimizer has)
                assert pm.get_submodule("blocks.0")._parameters["weight"] is ours.param_groups[0]["params"][0]
            ours.zero_grad()
            continue
        way(pm, mp.local_batch(batch(seed), made))
        model(**batch(seed)).backward()
        for name, parameter in zip(dict(model.named_parameters()), ours.param_groups[0]["params"], strict=True):
            assert parameter.grad is not None, f"{name}: the optimizer's parameter has no gradient"
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in pm.named_parameters():
        torch.testing.assert_close(mp.full_tensor(parameter), model.get_parameter(name).detach())


def on_ranks(mode: str) -> None:
    for way in WAYS:
        for why in ("failed", "interrupted"):
            for microbatches in (1, 2) if way is not loop else (1,):
                trained("dp=2", way, why, data_parallel=mode, microbatches=microbatches)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["replicate", "zero1", "zero3"])
def test_on_data_ranks(gloo: Pool, mode: str) -> None:
    gloo.run(on_ranks, mode, world=2, timeout=240)


def shared_out() -> None:
    trained("dp=2,tp=2", step, "failed", data_parallel="zero3")
    trained("dp_replicate=2,dp_shard=2", loop, "failed")


def test_on_two_axes(gloo: Pool) -> None:
    gloo.run(shared_out, world=4, timeout=240)
