"""Graphs of new shapes that are made of captured ones are those that a capture gives, or are captured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshpar as mp
from meshpar.compile.programs import Programs
from meshpar.compile.shapes.classes import KnownShapes
from meshpar.compile.shapes.written import written
from meshpar.graph import text

WIDTH = 8


class Net(nn.Module):
    """Two matrices, and what a test puts between them; the loss is a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.arange(64.0).reshape(64, 1) / 64)
        self.cached: Tensor | None = None
        self.longest = 0

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.last(self.between(torch.tanh(self.first(x)))) - y).square().mean()


class Plain(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("table")[: x.shape[1]]


class Heads(Net):
    def between(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = x.view(b, s, 2, WIDTH // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(b, s, WIDTH)


class Shifted(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], 1) + x.flatten(0, 1).mean(0)


class Flipped(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.roll(x, x.shape[1] // 2, 1)


class Window(Net):
    def between(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        seen = (at[:, None] >= at) & (at[:, None] - at < 14)
        return F.scaled_dot_product_attention(x, x, x, seen)


MADE = {one.__name__: one for one in (Plain, Heads, Shifted, Window)}
"""What is computed alike for all lengths."""


class Branch(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 14 else x


class Samples(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 4 else x


class OtherWeights(Net):
    def between(self, x: Tensor) -> Tensor:
        return (self.other if x.shape[1] > 14 else self.last)(x)


class Clamped(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + x[:, : min(x.shape[1], 14)].sum(1, keepdim=True)


class Scaled(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * math.log(x.shape[1]) / max(x.shape[1], 14)


class Stopped(Net):
    def between(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.shape[1] <= 14):
            return x * 3


class Detached(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.detach() if x.shape[1] > 14 else x


class FromPython(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.tensor([float(i % 5) for i in range(x.shape[1])], dtype=x.dtype)[:, None]


class Number(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.tensor(1.0 if x.shape[1] > 14 else 2.0, dtype=x.dtype)


class Cached(Net):
    def between(self, x: Tensor) -> Tensor:
        if self.cached is None or self.cached.shape[0] < x.shape[1]:
            self.cached = torch.arange(float(max(14, x.shape[1])), dtype=x.dtype)
        return x + self.cached[: x.shape[1], None]


class Remembered(Net):
    def between(self, x: Tensor) -> Tensor:
        self.longest = max(x.shape[1], 14)
        return x


class Padded(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[1] % 4)).cumsum(1)[:, : x.shape[1]]


class Blocks(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([part.cumsum(1) for part in x.split(5, 1)], 1)


class Steps(Net):
    def between(self, x: Tensor) -> Tensor:
        for t in range(x.shape[1] // 4):
            x = x + x[:, t : t + 1]
        return x


class Exactly(Net):
    def between(self, x: Tensor) -> Tensor:
        return -x if x.shape[1] == 16 else x


class Dropped(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5 if x.shape[1] > 14 else 0.25)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.length = x.shape[1]
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (3 if ctx.length > 14 else 5)


class OwnBackward(Net):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = Own.apply(x)
        return result


class Hooked(Net):
    def between(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: g * 2)
        return x


BRANCHING = (
    Branch,
    Samples,
    OtherWeights,
    Clamped,
    Scaled,
    Stopped,
    Detached,
    FromPython,
    Number,
    Cached,
    Remembered,
    Padded,
    Blocks,
    Steps,
    Exactly,
    Dropped,
    OwnBackward,
    Hooked,
    Flipped,
)
"""What does something else for some lengths, or computes with them in Python."""

SHAPES = ((4, 10), (4, 12), (4, 13), (4, 16), (4, 18), (4, 20), (8, 13), (6, 17), (1, 11))


def batch(samples: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, length, WIDTH, dtype=torch.float64), "y": torch.randn(samples, length, WIDTH, dtype=torch.float64)}


def same_as_captured(kind: type[Net]) -> Programs:
    """Every graph, plan and program is that which a capture gives."""
    model = kind().double()
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        programs, fresh = (Programs(model, mesh, mp.ParallelConfig()) for _ in range(2))
        for shape in SHAPES:
            captured, example = programs.shapes.count.captured, batch(*shape)
            one = programs.seen((), example, training=True)
            if programs.shapes.count.captured > captured:
                continue  # (it is a capture)
            fresh.shapes = KnownShapes()
            other = fresh.seen((), example, training=True)
            found, wanted = one.parts.captured, other.parts.captured
            assert text.lines(found) == text.lines(wanted), shape
            if not found.hooks:  # (those have running numbers in their names, which the lines leave out)
                assert written(found.graph) == written(wanted.graph), shape
            assert (one.signature, found.in_leaves, found.out_leaves) == (other.signature, wanted.in_leaves, wanted.out_leaves)
            assert (found.state.read.keys(), found.state.writes) == (wanted.state.read.keys(), wanted.state.writes)
    return programs


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MADE)
def test_one_graph_for_all_lengths(name: str) -> None:
    count = same_as_captured(MADE[name]).shapes.count
    assert count.made >= len(SHAPES) - 5, count


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", BRANCHING, ids=lambda kind: kind.__name__)
def test_what_depends_on_the_length_is_noticed(kind: type[Net]) -> None:
    same_as_captured(kind)
