"""A forward that asks torch.distributed: it is what one process computes from the whole batch, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed import is_initialized

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.pool import Pool

GROUP: list[dist.ProcessGroup] = []


class Net(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.call = nn.Linear(6, 8), nn.Linear(8, 4), call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(self.call(torch.tanh(self.up(x)))), y)


def by_world_size(h: Tensor) -> Tensor:
    return h / (dist.get_world_size() if dist.is_initialized() else 1)


def by_rank(h: Tensor) -> Tensor:
    return h * (2 + dist.get_rank()) if is_initialized() else h


def all_samples(h: Tensor) -> Tensor:
    """As contrastive losses meet the samples of all ranks."""
    every = h
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.zeros_like(h) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, h)
        every = torch.cat(parts)
    return h + (h @ every.t()).square().sum(-1, keepdim=True)


def unguarded(h: Tensor) -> Tensor:
    mean = h.mean()
    dist.all_reduce(mean)
    return h - mean


def in_a_group(h: Tensor) -> Tensor:
    mean = h.mean()
    dist.all_reduce(mean, group=GROUP[0])
    return h - mean


def in_a_graph(h: Tensor) -> Tensor:
    return h - functional.all_reduce(h.mean(), "sum", GROUP[0])


def batch() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, width, generator=numbers) for name, width in (("x", 6), ("y", 4))}


ASKING = [by_world_size, by_rank, all_samples]


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
@pytest.mark.parametrize("call", ASKING, ids=lambda call: call.__name__)
def test_a_forward_that_asks_is_that_of_one_process(call: Callable[[Tensor], Tensor], mesh: str) -> None:
    torch.manual_seed(0)
    model = Net(call).double()
    given = {name: x.double() for name, x in batch().items()}
    right = model(**given)
    right.backward()
    with mp.simulate(2):
        made = mp.make_mesh(mesh)
        pm = mp.parallelize(model, made, example=mp.local_batch(given, made))
        assert dist.is_initialized()
        loss = pm.train_step(**mp.local_batch(given, made))
        for part in local_tensors(loss).values():
            torch.testing.assert_close(part, right.detach())
        for name, parameter in pm.named_parameters():
            torch.testing.assert_close(mp.full_grad(parameter), model.get_parameter(name).grad)


def verified() -> None:
    for call in ASKING:
        torch.manual_seed(0)
        mp.verify(Net(call), mp.make_mesh("dp=2"), batch()).raise_if_failed()


def test_on_processes(gloo: Pool) -> None:
    """Of which each would find itself initialized, and so would the reference."""
    gloo.run(verified, world=2)


@pytest.mark.parametrize("call", [unguarded, in_a_group, in_a_graph], ids=lambda call: call.__name__)
def test_collectives_are_refused(call: Callable[[Tensor], Tensor]) -> None:
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        GROUP[:] = [mesh.get_group("tp")]
        with pytest.raises(mp.CaptureError, match="as one process computes it(?s:.*)is_initialized\\(\\) says no"):
            mp.parallelize(Net(call), mesh, example=batch())
        assert dist.is_initialized()
