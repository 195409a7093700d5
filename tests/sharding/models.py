"""A plain decoder of two equal blocks, captured once, for tests of the solver and the passes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from meshpar.capture.export import capture
from meshpar.compile.decide import Decision, decide
from meshpar.graph.captured import Captured
from meshpar.graph.facts import info_of
from meshpar.mesh import Axis
from meshpar.passes.coalesce import Coalesce
from meshpar.passes.lower import Lower
from meshpar.plan import Plan

BATCH, SEQUENCE, HIDDEN, HEADS, WIDTH, VOCABULARY = 2, 16, 32, 4, 64, 128


class Block(nn.Module):
    """Separate projections, or fused q|k|v and gate|up."""

    def __init__(self, kv: int, fused: bool) -> None:
        super().__init__()
        self.kv, self.fused, self.each = kv, fused, HIDDEN // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        if fused:
            self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * kv) * self.each, bias=False)
            self.gate_up = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        else:
            self.q, self.k, self.v = (nn.Linear(HIDDEN, n * self.each, bias=False) for n in (HEADS, kv, kv))
            self.gate, self.up = (nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        self.o, self.down = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            self.qkv(y).split([n * self.each for n in (HEADS, self.kv, self.kv)], -1) if self.fused else (self.q(y), self.k(y), self.v(y))
        )
        q, k, v = (t.view(b, s, -1, self.each).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, HIDDEN))
        y = self.norm2(x)
        gate, up = self.gate_up(y).chunk(2, -1) if self.fused else (self.gate(y), self.up(y))
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, kv: int = HEADS, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block(kv, fused) for _ in range(2)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


@cache
def captured(kv: int = HEADS, fused: bool = False) -> Captured:
    """The decoder as a graph; do not change it."""
    return captured_of(Decoder(kv, fused), dict.fromkeys(("ids", "labels"), torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)))


def captured_of(model: nn.Module, batch: Mapping[str, Any]) -> Captured:
    """Any model as a graph."""
    return capture(model, (), dict(batch), device=torch.device("cpu"))


def decided(
    graph: Captured, size: int = 2, *, axis: str = "tp", sequence: bool | Literal["auto"] = True, rules: Mapping[str, str] | None = None
) -> Plan:
    """The plan of a graph on one axis."""
    nodes = {str(n.target): info_of(n) for n in graph.graph.nodes if n.op == "get_attr"}
    others = {n: (nodes[n].shape, "float32", True) for n in graph.parameters}
    return decide(graph, Decision(((axis, size),), ((axis, size),), sequence=sequence, rules=rules or {}, others=others))


def lowered(graph: Captured, plan: Plan, rank: int = 0) -> fx.Graph:
    """The graph of one rank."""
    (axis,) = plan.axes
    new = Lower(axis, Axis(axis.axis, axis.size, rank, axis.axis))(graph.graph)
    return Coalesce(frozenset(graph.parameters))(new)
