"""`sequence_parallel="auto"`: every residual stream is cut along its sequence where that costs less, by the solver's price."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from meshpar.graph.facts import facts
from meshpar.plan import Plan
from meshpar.sharding.types import Shard
from tests.sharding.models import captured, captured_of, decided

HIDDEN, WIDTH, VOCABULARY = 16, 64, 32


class Mixing(nn.Module):
    """A block that needs all positions at once, in an operator without matrices: cut, its input has to be gathered once more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * self.norm(x).cumsum(1)
        return x + self.down(self.up(x).relu())


class Attending(nn.Module):
    """A decoder's block: attention over what the encoder gave, then a matrix pair."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (self.q(self.norm1(x)), self.k(seen), self.v(seen)))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)).relu())


class Two(nn.Module):
    """An encoder that mixes, a decoder that attends: two streams, of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.encoder = nn.ModuleList(Mixing() for _ in range(2))
        self.decoder = nn.ModuleList(Attending() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        seen, x = self.embed(source), self.embed(target)
        for block in self.encoder:
            seen = block(seen)
        for block in self.decoder:
            x = block(x, seen)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


BATCH = {"source": torch.arange(48).view(4, 12) % VOCABULARY, "target": torch.arange(32).view(4, 8) % VOCABULARY}


def handed(plan: Plan, inside: str) -> set[bool]:
    """Whether the values that leave the blocks of a list are cut."""
    graph = captured_of(Two(), BATCH).graph
    nodes = {n.name: n for n in graph.nodes if str(facts(n).region).startswith(inside)}
    return {isinstance(t, Shard) for name, one in plan.axes[0].nodes.items() if name in nodes for t in one.handed if t is not None}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("sequence", "encoder", "decoder"), [(True, True, True), (False, False, False), ("auto", False, True)])
def test_every_stream_is_cut_where_that_costs_less(sequence: bool, encoder: bool, decoder: bool) -> None:
    plan = decided(captured_of(Two(), BATCH), sequence=sequence)
    assert handed(plan, "encoder.") == {encoder}
    assert handed(plan, "decoder.") == {decoder}


def test_a_decoder_is_cut_as_if_asked_to() -> None:
    assert decided(captured(), sequence="auto").axes == decided(captured(), sequence=True).axes
    assert decided(captured(), sequence="auto").axes != decided(captured(), sequence=False).axes


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sequence", [True, "auto"])
def test_it_is_exact_either_way(sequence: bool) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(sequence_parallel=sequence)  # type: ignore[arg-type]
    mp.verify(Two(), "tp=2", BATCH, config=config, steps=1).raise_if_failed()


def test_explain_says_how_it_was_decided() -> None:
    with mp.simulate(2):
        text = mp.parallelize(Two(), mp.make_mesh("tp=2"), example=BATCH).explain()
    assert "each stream is cut along its sequence where that costs less" in text
