"""Models with autograd.Functions over a mesh: exact, and no more collectives where the gradient is linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import meshpar as mp
from meshpar.config import Precision
from tests.own_functions import AddsLoss, Calls, Reversed, Routed, by_batch, clipped, function, normalised, shifted, straight
from tests.pool import Pool

X = {"x": torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(0))}
Case = tuple[str, Mapping[str, Any]]


def reports(cases: Sequence[Case]) -> list[str]:
    """On every rank: the text of each report that failed."""
    failed = []
    for mesh, fields in cases:
        torch.manual_seed(3)
        report = mp.verify(Routed(layers=4 if "pp" in mesh else 2), mesh, X, config=mp.ParallelConfig(**fields), steps=2)
        failed += [] if report.ok else [f"{mesh} {fields}\n{report}"]
    return failed


TWO: list[Case] = [
    ("ep=2", {}),
    ("dp=2", {"data_parallel": "zero3", "recompute": "full", "microbatches": 2}),
]
FOUR: list[Case] = [
    ("pp=2,tp=2", {"microbatches": 2, "schedule": "zbv"}),
    ("dp=2,tp=2", {"recompute": "selective"}),
    ("ep=2,tp=2", {"microbatches": 2, "recompute": "full"}),
]


def test_a_routers_loss_on_two_ranks(gloo: Pool) -> None:
    assert gloo.run(reports, TWO, world=2, timeout=240) == [[]] * 2


@pytest.mark.slow
def test_a_routers_loss_on_four_ranks(gloo: Pool) -> None:
    assert gloo.run(reports, FOUR, world=4, timeout=300) == [[]] * 4


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "ep=2,tp=2"])
def test_a_balancing_loss_is_counted_once(mesh: str) -> None:
    mp.verify(Routed(balance=True), mesh, X).raise_if_failed()


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "straight": straight,
    "clipped": clipped.apply,
    "normalised": normalised.apply,
    "by batch": by_batch.apply,
    "shifted": shifted.apply,
    "mean over samples": function(lambda ctx, x: x.clone(), lambda ctx, g: g - g.mean(0)).apply,
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", BETWEEN)
def test_every_nature_over_a_mesh(kind: str) -> None:
    mp.verify(Calls(BETWEEN[kind]), "dp=2,tp=2", X).raise_if_failed()


def comms(call: Callable[[Tensor], Tensor], mesh: str) -> list[tuple[str, str, str, float]]:
    with mp.simulate(4):
        sizes = mp.make_mesh(mesh, "cpu")
        pm = mp.parallelize(Calls(call), sizes, example=mp.local_batch(X, sizes))
        return sorted((c.kind, c.axis, c.phase, c.nbytes * c.count) for c in pm.comms())


CHEAP: dict[str, Callable[[Tensor], Tensor]] = {
    "straight": straight,
    "reversed": Reversed.apply,
    "scaled": lambda x: function(lambda ctx, x, by: x.view_as(x), lambda ctx, g: (0.1 * g, None)).apply(x, 0.1),
    "clipped": clipped.apply,
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", CHEAP)
def test_what_treats_elements_by_themselves_costs_what_a_relu_does(kind: str) -> None:
    assert comms(CHEAP[kind], "dp=2,tp=2") == comms(torch.relu, "dp=2,tp=2")


def test_an_added_loss_costs_the_sum_of_its_number() -> None:
    """Two all-reduces of a number (4 bytes, the wire takes twice the share of 1 / 2), not one of what it is attached to."""
    more = comms(lambda x: AddsLoss.apply(x, x.square().mean()), "dp=2,tp=2")
    same = comms(torch.relu, "dp=2,tp=2")
    for one in same:
        more.remove(one)
    assert more == [("all_reduce", "dp", "forward", 4.0), ("all_reduce", "tp", "forward", 4.0)]


def test_in_bfloat16() -> None:
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2", "cpu")
        config = mp.ParallelConfig(precision=Precision(compute_dtype="bf16"))
        pm = mp.parallelize(Routed(balance=True), mesh, example=mp.local_batch(X, mesh), config=config)
        assert pm.train_step(**mp.local_batch(X, mesh)).isfinite().all()
        assert all(p.grad is not None for p in pm.parameters())
