"""Collectives of FSDP2 beside computation: nothing reads what has not arrived, and what can wait does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import meshpar as mp
from meshpar.config import ParallelConfig, Precision
from tests.pool import Pool
from tests.runtime.test_data_parallel import check, reference, train

if hasattr(dist, "all_gather_single"):  # torch 2.13
    GATHER, SUM = "all_gather_single", "reduce_scatter_single"
else:
    GATHER, SUM = "all_gather_into_tensor", "reduce_scatter_tensor"


class Late(dist.Work):
    """A collective that has written nothing before it is awaited."""

    def __init__(self, output: torch.Tensor, found: torch.Tensor, log: list[str], name: str) -> None:
        super().__init__()
        self._output, self._found, self._log, self._name = output, found, log, name

    def wait(self, timeout: Any = None) -> bool:
        self._log.append(f"{self._name} awaited")
        self._output.copy_(self._found)
        return True


@contextmanager
def arriving_late() -> Iterator[list[str]]:
    """Inside, collectives that were asked to run beside write nan until they are awaited; what happened, in its order."""
    log: list[str] = []
    real = {name: getattr(dist, name) for name in (GATHER, SUM)}

    def late(name: str) -> Any:
        def run(output: torch.Tensor, input: torch.Tensor, group: Any, async_op: bool = False, **more: Any) -> Any:
            log.append(f"{name} {'started' if async_op else 'at once'}")
            found = torch.empty_like(output)
            real[name](found, input, group=group, **more)
            output.fill_(torch.nan if async_op else 0).copy_(output if async_op else found)
            return Late(output, found, log, name) if async_op else None

        return run

    try:
        for name in real:
            setattr(dist, name, late(name))
        yield log
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def train_late(mode: str) -> tuple[dict[str, Any], list[str]]:
    with arriving_late() as log:
        return train("dp=2", mode), log


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mode", ["zero3", "zero2", "zero1"])
def test_nothing_is_read_before_it_has_arrived(gloo: Pool, mode: str) -> None:
    """Gradients are added up over microbatches, and in the second step to what is there: then a sum is read at once."""
    for found, log in gloo.run(train_late, mode, world=2):
        check(found, reference())
        assert {f"{GATHER} started", f"{SUM} started"} <= set(log)
        if mode != "zero1":
            assert f"{SUM} at once" in log


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x.square().mean()


def steps(options: dict[str, Any], hooks: bool) -> tuple[list[str], list[bool]]:
    """What a step does, and whether the gradients that hooks and the caller see are there."""
    config, seen = ParallelConfig(**options), list[bool]()
    x = torch.linspace(-1, 1, 24).view(4, 6)
    with arriving_late() as log:
        pm = mp.parallelize(Blocks(), mp.make_mesh("dp=2"), example=(x,), config=config)
        for parameter in pm.parameters() if hooks else ():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(bool(mp.full_grad(p).isfinite().all())))
        pm.train_step(x)
        pm.zero_grad()
        log.clear()
        pm.train_step(x) if hooks else pm(x).backward()
        seen += [bool(mp.full_grad(p).isfinite().all()) for p in pm.parameters()]
    return log, seen


def started(log: list[str], name: str) -> int:
    return log.count(f"{name} started")


def test_a_sum_is_awaited_when_the_next_one_begins(gloo: Pool) -> None:
    for log, seen in gloo.run(steps, {}, False, world=2):
        assert all(seen)
        sums = [entry.split(" ")[1] for entry in log if entry.startswith(SUM)]
        assert sums == ["started", "awaited"] * 3


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("options", "hooks", "gathers", "sums"),
    [
        ({"overlap_grad_reduce": False}, False, 6, 0),
        ({"overlap_param_gather": False}, False, 0, 3),
        ({"precision": Precision.named("bf16")}, False, 6, 3),
        ({"precision": Precision(torch.float32, torch.bfloat16, torch.bfloat16)}, False, 6, 0),
        ({}, True, 6, 3),
    ],
)
def test_what_is_switched_off_or_read_at_once_does_not_run_beside(
    gloo: Pool, options: dict[str, Any], hooks: bool, gathers: int, sums: int
) -> None:
    for log, seen in gloo.run(steps, options, hooks, world=2):
        assert all(seen)
        assert (started(log, GATHER), started(log, SUM)) == (gathers, sums), log


def interrupted() -> list[bool]:
    """A backward that raises while a sum is in flight, and one after it."""
    x = torch.linspace(-1, 1, 24).view(4, 6)
    fails = [True]

    def perhaps(grad: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise ValueError("on purpose")
        return grad

    class Raising(Blocks):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            x.register_hook(perhaps)
            return self.blocks[2](self.blocks[1](x).tanh()).square().mean()

    with arriving_late():
        pm = mp.parallelize(Raising(), mp.make_mesh("dp=2"), example=(x,))
        with pytest.raises(Exception, match="on purpose"):
            pm.train_step(x)
        fails[0] = False
        pm.zero_grad()
        pm.train_step(x)
        return [bool(mp.full_grad(p).isfinite().all()) for p in pm.parameters()]


def test_a_step_after_one_that_raised(gloo: Pool) -> None:
    assert all(all(found) for found in gloo.run(interrupted, world=2))
