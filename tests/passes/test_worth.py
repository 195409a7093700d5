"""Products in pieces only where the constants of the machine say that they take less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.graph.facts import Change, Exchange, Info
from meshpar.ops import expert_pieces, pieces, token_pieces
from meshpar.passes import worth
from meshpar.planner.hardware import Hardware, hardware
from meshpar.planner.measured import Curve, Measured
from meshpar.sharding.price import Price
from meshpar.sharding.types import Invariant, Partial, Replicate, Shard
from tests.models import text, tiny

EVEN = Price(flops=1e9, memory=1e15, link=1e6, latency=0.0, start=0.0)
"""A second of products beside each second of messages, in a whole of 8 MB (over two ranks) with 4 GFLOP."""
WHOLE = Info((2, 1024, 1024), torch.float32, requires_grad=True)
MADE = worth.Products(4e9, 3, 1e6, 8e6)
CUT = Shard(1, 1, ((1024, 1),))


def gathered(price: Price, size: int = 2) -> bool:
    return worth.gathered(Change("tp", size, CUT, Replicate(), WHOLE), MADE, price)


def scattered(price: Price, size: int = 2) -> bool:
    return worth.scattered(Change("tp", size, Partial(), CUT, WHOLE), MADE, price)


def reduced(price: Price, size: int = 2) -> bool:
    return worth.reduced(Change("tp", size, Partial(), Invariant(), WHOLE), MADE, price)


def tokens(price: Price, size: int = 4) -> bool:
    come, leave = Change("tp", size, CUT, Replicate(), WHOLE), Change("tp", size, Partial(), CUT, WHOLE)
    return worth.on_gathered_tokens(come, leave, MADE, price)


def rows(price: Price, size: int = 4) -> bool:
    return worth.through_experts(Exchange("ep", size, WHOLE), 8, MADE, price)


ALL = (gathered, scattered, reduced, tokens, rows)


@pytest.mark.parametrize("asked", ALL)
def test_where_messages_take_as_long_as_products(asked: Callable[[Price], bool]) -> None:
    assert asked(EVEN)


@pytest.mark.parametrize("asked", ALL)
def test_where_nothing_is_waited_for(asked: Callable[[Price], bool]) -> None:
    assert not asked(replace(EVEN, link=1e18, start=1e-9)), "messages take no time"
    assert not asked(replace(EVEN, flops=1e18, start=1e-9)), "products take none, so nothing runs beside messages"


@pytest.mark.parametrize("asked", ALL)
def test_where_pieces_cost_more_than_they_hide(asked: Callable[[Price], bool]) -> None:
    assert not asked(replace(EVEN, latency=100.0)), "a message more is a latency more"
    assert not asked(replace(EVEN, start=100.0)), "a product more is a start more"
    assert not asked(replace(EVEN, memory=1e4)), "and reads its matrix once more"


def test_what_is_gathered_again_is_paid_for() -> None:
    """Beside products of half the time of a message half of it stays: what forward hides, backward waits for once more."""
    slow = replace(EVEN, link=1e6 / 2.5)
    assert not gathered(slow) and scattered(slow)


def machine(latency: float) -> Hardware:
    """One with 100 GFLOP/s and messages of 4 GB/s, which take a `latency` besides."""
    curves = {"matrix fp32": Curve((1e3, 1e9), (1e-9, 1e-2)), "elementwise": Curve((1e3, 1e9), (1e-9, 1e-3))}
    sums = {"all_gather 2 of 2": Curve((1e3, 1e9), (latency, latency + 0.25))}
    return replace(hardware("h100"), name=f"latency {latency}", measured=Measured(2, (1.0, 1.0), curves, sums))


def calls(graph: fx.Graph) -> set[object]:
    return {node.target for node in graph.nodes}.intersection(
        (pieces.gathered, pieces.scattered, pieces.reduced, token_pieces.on_gathered_tokens, expert_pieces.through_experts)
    )


@pytest.mark.parametrize(
    ("kind", "mesh", "sequence", "expected"),
    [
        ("llama", "tp=2", True, {pieces.gathered, pieces.scattered}),
        ("llama", "tp=2", False, {pieces.reduced}),
        ("mixtral", "ep=2", None, {expert_pieces.through_experts}),
    ],
)
def test_programs(kind: str, mesh: str, sequence: bool | None, expected: set[object]) -> None:
    found = {}
    for name, part in {"even": machine(1e-9), "late": machine(1.0), "none": None}.items():
        with mp.simulate(2):
            config = mp.ParallelConfig(hardware=part, **({} if sequence is None else {"sequence_parallel": sequence}))
            found[name] = calls(mp.parallelize(tiny(kind), mp.make_mesh(mesh), example=text(), config=config)._first.graph)
    assert found["even"] >= expected
    assert not found["late"] and not found["none"], "without a machine small values are left whole"
