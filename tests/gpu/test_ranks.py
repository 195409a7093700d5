"""Processes with a GPU each: NCCL's communicators, pipelines, shared-out parameters, and the end of a job in which one rank fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import meshpar as mp
from tests.gpu.small import UNITS, batch_of, expected, farthest, model_of

pytestmark = pytest.mark.gpu
WORLD = 2
LIMIT = 120.0


def spawned(fn: Callable[..., Any], *args: Any, device: torch.device) -> None:
    """Run `fn(*args, device)` on two ranks, each with a GPU of its own. Raises what a rank raises, TimeoutError for one that hangs."""
    if device.type == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"{torch.cuda.device_count()} GPU: NCCL wants one for each rank")
    port = 29600 + os.getpid() % 300
    jobs = multiprocessing.start_processes(_rank, (fn, args, device.type, port), WORLD, join=False, start_method="spawn")
    end = time.monotonic() + LIMIT
    while not jobs.join(timeout=1):
        if time.monotonic() > end:
            for process in jobs.processes:
                process.kill()
            raise TimeoutError(f"not done in {LIMIT:.0f} s")


def _rank(rank: int, fn: Callable[..., Any], args: Any, kind: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    try:
        fn(*args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def step(kind: str, spec: str, options: dict[str, Any], device: torch.device) -> None:
    """A step, twice: of the second one everything that was in flight in the first is gone."""
    mesh = mp.make_mesh(spec, device.type)
    whole = batch_of(device)
    loss, right = expected(model_of(kind, device, torch.float64), whole)
    batch = mp.local_batch(whole, mesh)
    pm = mp.parallelize(model_of(kind, device, torch.float64), mesh, example=batch, config=mp.ParallelConfig(**options))
    for _ in range(2):
        pm.zero_grad(set_to_none=True)
        assert abs(float(pm.train_step(**batch)) - loss) < UNITS[torch.float64] * loss
        assert farthest(pm, right) < UNITS[torch.float64]


@pytest.mark.parametrize(
    ("kind", "spec", "options"),
    [
        ("llama", "tp=2", {}),
        ("llama", "cp=2", {"context": "ring"}),
        ("llama", "dp=2", {"data_parallel": "zero3", "microbatches": 2}),
        ("llama", "dp=2", {"data_parallel": "zero1", "overlap_grad_reduce": False, "microbatches": 2}),
        ("mixtral", "ep=2", {}),
        ("llama", "pp=2", {"microbatches": 4}),
        ("llama", "pp=2", {"microbatches": 4, "schedule": "zero-bubble"}),
        ("llama", "pp=2", {"microbatches": 4, "schedule": "dualpipev"}),
    ],
    ids=lambda value: str(value).replace(" ", "") if not isinstance(value, dict) else ",".join(map(str, value.values())),
)
def test_a_step(kind: str, spec: str, options: dict[str, Any], device: torch.device) -> None:
    spawned(step, kind, spec, options, device=device)


class Fails(torch.nn.Module):
    """Raises on one rank, in backward: the other waits for it in a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.b(torch.relu(self.a(x))).square().mean()}


def one_fails(device: torch.device) -> None:
    mesh = mp.make_mesh("tp=2", device.type)
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8).to(device)}
    pm = mp.parallelize(Fails().to(device), mesh, example=batch)
    pm.train_step(**batch)
    for parameter in pm.parameters():
        parameter.register_hook(_raises_on_one)
    begun = time.monotonic()
    with pytest.raises(Exception, match="on purpose|rank 1"):
        for _ in range(2):
            float(pm.train_step(**batch))
    assert time.monotonic() - begun < LIMIT / 2


def _raises_on_one(grad: torch.Tensor) -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("on purpose")


def test_ranks_fail_together(device: torch.device) -> None:
    spawned(one_fails, device=device)
