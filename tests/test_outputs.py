"""What a parallel model returns: whole tensors, or DTensors whose parts put together are the model's own output, in order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.pool import Pool

WIDTH, HEAD = 16, 4
Outputs = dict[str, torch.Tensor]


class Fused(nn.Module):
    """Attention over one matrix of queries, keys and values: as many heads of each, or fewer keys and values."""

    def __init__(self, queries: int = 4, keys: int = 2) -> None:
        super().__init__()
        self.sizes = [queries * HEAD, keys * HEAD, keys * HEAD]
        self.qkv, self.out = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(queries * HEAD, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        fused = self.qkv(x)
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in fused.split(self.sizes, -1))
        groups = q.shape[1] // k.shape[1]
        mixed = nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return {"out": out, "fused": fused, "keys": k, "rows": fused.flatten(0, 1), "columns": fused.flatten(0, 1).t()}


class Interleaved(nn.Module):
    """Queries, keys and values of every head next to each other."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, heads * 3 * HEAD), nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        fused = self.qkv(x)
        q, k, v = (part.transpose(1, 2) for part in fused.unflatten(-1, (self.heads, 3 * HEAD)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return {"out": self.out(mixed.transpose(1, 2).flatten(2)), "fused": fused, "values": v}


class Gated(nn.Module):
    """Gate and up in one matrix; the width does not divide evenly among all ranks."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * width), nn.Linear(width, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        both = self.up(x)
        gate, up = both.chunk(2, -1)
        inner = silu(gate) * up
        return {"out": self.down(inner), "both": both, "inner": inner, "flat": both.flatten(), "turned": both.transpose(1, 2).flatten(1)}


class Blocks(nn.Module):
    """A residual stream that may be cut along its sequence, returned whole and with samples and positions in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Fused() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Outputs:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))["out"]
        return {"stream": x, "rows": x.flatten(0, 1), "turned": x.transpose(0, 1).flatten(0, 1)}


MODELS = {
    "fewer keys": Fused,
    "as many keys": lambda: Fused(4, 4),
    "interleaved": Interleaved,
    "gated": Gated,
    "gated, uneven": lambda: Gated(9),
    "blocks": Blocks,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


def against_one_device(name: str, spec: str, samples: int = 4, positions: int = 6) -> set[str]:
    """Compare every output, and every gradient of the sum of their squares; returns the names of those that left in parts."""
    model = made(name)
    x = torch.randn(samples, positions, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alone = copy.deepcopy(model)
    expected = alone(x)
    _squares(expected).backward()
    grads = {key: parameter.grad for key, parameter in alone.named_parameters()}
    mesh = mp.make_mesh(spec)
    pm = mp.parallelize(model, mesh, example=mp.local_batch((x,), mesh), config=mp.ParallelConfig(data_parallel="replicate"))
    found = pm(*mp.local_batch((x,), mesh))
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    for key, value in whole.items():
        for part in local_tensors(value).values():
            torch.testing.assert_close(part, expected[key], msg=lambda text, key=key: f"{name} on {spec}, {key}: {text}")
    _squares(whole).backward()
    for key, parameter in pm.named_parameters():
        for grad in local_tensors(mp.full_grad(parameter)).values():
            torch.testing.assert_close(grad, grads[key], msg=lambda text, key=key: f"{name} on {spec}, {key}: {text}")
    return {key for key, value in found.items() if isinstance(value, DTensor)}


def _squares(outputs: Outputs) -> Any:
    weights = [torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape) for value in outputs.values()]
    return sum((value.square() * weight).sum() for value, weight in zip(outputs.values(), weights, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["tp=2", "tp=3", "dp=2,tp=2"])
def test_outputs_that_are_cut_are_in_order(name: str, spec: str) -> None:
    with mp.simulate(3 if spec == "tp=3" else 2 * spec.count("=")):
        against_one_device(name, spec)


def test_fused_outputs_leave_in_parts() -> None:
    with mp.simulate(2):
        assert {"fused", "keys"} <= against_one_device("fewer keys", "tp=2")
        assert {"both", "inner"} <= against_one_device("gated", "tp=2")


def test_outputs_of_real_ranks(gloo: Pool) -> None:
    for cut in gloo.run(against_one_device, "fewer keys", "dp=2,tp=2", world=4):
        assert {"fused", "rows"} <= cut
