"""Batches of many shapes: programs are made of known ones, exact, and as many are kept as are said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import meshpar as mp
from meshpar.runtime.state import variants
from meshpar.simulate import local_tensors
from tests.models import GPT, numbers
from tests.pool import Pool


def batch(samples: int, length: int) -> dict[str, Tensor]:
    """Ids and labels, of which samples ignore different numbers."""
    labels = numbers(53, samples, length)
    labels[0, : length // 2] = -100
    return {"ids": numbers(53, samples, length), "labels": labels}


def worst(pm: mp.ParallelModel, model: torch.nn.Module, local: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    """The largest difference of the loss and of any gradient of a step."""
    model.zero_grad()
    pm.zero_grad()
    wanted = model(**whole)
    wanted = wanted if isinstance(wanted, Tensor) else wanted["loss"]
    wanted.backward()
    loss = pm.train_step(**local)
    found = [float((loss - wanted).detach().abs().max())]
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in pm.named_parameters():
        grad = mp.full_grad(parameter)
        assert grad is not None
        found.append(float((grad - gradients[name]).abs().max()))
    return max(found)


LENGTHS = (12, 14, 18, 9, 11)


def test_new_lengths_are_exact_without_a_capture() -> None:
    model = GPT().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12), config=mp.ParallelConfig(microbatches=2))
        for length in LENGTHS:
            one = batch(4, length)
            assert worst(pm, model, one, one) < 1e-12, length
        count = pm._makes.shapes.count
        assert (count.captured, count.made) == (2, len(LENGTHS) - 2), count
        assert f"2 graphs captured, {count.made} made of these by sizes alone" in pm.explain()


def test_outputs_of_made_programs_are_those_of_own_samples() -> None:
    model = Logits().double()
    with mp.simulate(2):
        mesh = mp.make_mesh("dp=2")
        shared = {length: batch(4, length) for length in (12, 14, 18, 16)}
        pm = mp.parallelize(model, mesh, example=mp.local_batch(shared[12], mesh))
        for whole in shared.values():
            found, wanted = pm(**mp.local_batch(whole, mesh)), model(**whole)
            for rank, own in local_tensors(found).items():
                assert (own - wanted[2 * rank : 2 * rank + 2]).abs().max() < 1e-12, whole["ids"].shape
        assert pm._makes.planner.plans.made == 2


class Logits(GPT):
    """Returns a number for every position."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.embed(ids)).sum(-1) + labels


def test_as_many_programs_are_kept_as_are_said_to_be(monkeypatch: Any) -> None:
    monkeypatch.setattr(variants, "MOST", 3)
    model = GPT().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(2, 12))
        for length in (12, 13, 14, 15, 13, 12):
            one = batch(2, length)
            assert worst(pm, model, one, one) < 1e-12, length
        assert len(pm._variants.programs()) == 3
        assert (2, 12) in [leaf[0] for signature, _ in pm._variants.known() for leaf in signature.leaves], "that of parallelize stays"
        assert "3 programs kept; 2 used longest ago forgotten (at most 3 are kept)" in pm.explain()
        trees = list(pm._engine.trees.values())
        assert len(trees[0]._library.cuts) == 3


def test_shorter_samples_filled_up_are_exact() -> None:
    model = GPT().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12))
        short = batch(4, 9)
        filled = {"ids": torch.zeros(4, 12, dtype=torch.int64), "labels": torch.full((4, 12), -100)}
        for name, tensor in short.items():
            filled[name][:, :9] = tensor
        assert worst(pm, model, filled, short) < 1e-12


def on_ranks(spec: str, microbatches: int) -> tuple[float, int, int, int]:
    torch.manual_seed(0)
    model = GPT().double()
    mesh = mp.make_mesh(spec)

    def shared(length: int, samples: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(length)
        whole = batch(samples, length)
        return mp.local_batch(whole, mesh), whole

    pm = mp.parallelize(model, mesh, example=shared(12)[0], config=mp.ParallelConfig(microbatches=microbatches))
    found = 0.0
    for length in (12, 14, 18, 9, 12, 11, 16, 13):
        local, whole = shared(length)
        found = max(found, worst(pm, model, local, whole))
    return found, pm._makes.shapes.count.captured, pm._makes.planner.plans.made, pm._variants._resized.made


@pytest.mark.slow
def test_ranks_and_stages_do_not_part(gloo: Pool) -> None:
    for found, captured, plans, told in gloo.run(on_ranks, "pp=2,dp=2", 2, world=4, timeout=300):
        assert found < 1e-12
        assert captured == 2
        assert plans > 0
        assert told > 0
