"""Batches that do not fit are filled up: exact on every mesh, or refused on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshpar as mp
from tests.capture.padding.test_proof import LM, Attention, Balanced
from tests.models import GPT
from tests.pool import Pool
from tests.runtime.state.test_shapes import batch, worst


def test_the_last_batch_of_an_epoch_is_filled_up() -> None:
    model = GPT().double()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch(4, 12), config=mp.ParallelConfig(microbatches=2))
        last = batch(3, 12)
        assert worst(pm, model, last, last) < 1e-12
        assert pm._makes.shapes.count.captured == 1, "it is the program of a whole batch"
        assert abs(float(pm.eval_step(**last) - model(**last))) < 1e-12


def test_lengths_are_padded_and_outputs_are_not() -> None:
    model = LM(Attention(True)).double()
    with mp.simulate(2):
        config = mp.ParallelConfig(pad_to=[8, 16])
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=named(4, 7), config=config)
        for length in (5, 8, 7, 6):
            one = named(4, length)
            assert worst(pm, model, one, one) < 1e-12, length
            out = pm(**one)
            assert (out["logits"] - model(**one)["logits"]).abs().max() < 1e-12
            assert out["logits"].shape[1] == length
        assert pm._makes.shapes.count.captured == 1
        with pytest.raises(mp.BatchError, match="has 17 positions, and the longest of .* is 16"):
            pm.train_step(**named(4, 17))


def named(samples: int, length: int) -> dict[str, Tensor]:
    return batch_of(31, samples, length)


def batch_of(vocabulary: int, samples: int, length: int) -> dict[str, Tensor]:
    if not samples:
        return {name: x[:0] for name, x in batch_of(vocabulary, 1, length).items()}
    return {name: x % vocabulary if name == "ids" else torch.where(x < 0, x, x % vocabulary) for name, x in batch(samples, length).items()}


def test_what_would_count_is_refused() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(LM(Balanced()), mp.make_mesh("tp=2"), example=named(4, 8), config=mp.ParallelConfig(pad_to=8))
        pm.train_step(**named(4, 8))
        with pytest.raises(
            mp.BatchError, match="(?s)filled up with positions.*padding would count: the loss moves .so does extra.*Pass attention"
        ):
            pm.train_step(**named(4, 6))


def other_lengths(spec: str, microbatches: int) -> tuple[float, int, str]:
    torch.manual_seed(0)
    mesh = mp.make_mesh(spec)
    model, rank = LM(Attention(True)).double(), mp.data_rank(mesh)[0]

    def share(sizes: list[tuple[int, int]], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A batch of every data rank, and what one process would see: all of them, padded."""
        torch.manual_seed(seed)
        parts = [named(samples, length) for samples, length in sizes]
        longest = max(length for _, length in sizes)
        whole = {
            n: torch.cat([nn.functional.pad(p[n], (0, longest - p[n].shape[1]), value=v) for p in parts])
            for n, v in (("ids", 0), ("labels", -100))
        }
        return parts[rank], whole

    config = mp.ParallelConfig(microbatches=microbatches, pad_to=1)
    pm = mp.parallelize(model, mesh, example=share([(4, 8), (4, 6)], 0)[0], config=config)
    found = 0.0
    for seed, sizes in enumerate(([(4, 8), (4, 6)], [(4, 5), (4, 7)], [(4, 8), (3, 8)], [(2, 7), (3, 4)], [(1, 3), (0, 3)])):
        found = max(found, worst(pm, model, *share(sizes, seed)))
    refused = ""
    try:
        mp.parallelize(LM(Balanced()), mesh, example=share([(4, 8), (4, 6)], 0)[0], config=config).train_step(
            **share([(4, 8), (4, 6)], 0)[0]
        )
    except mp.BatchError as error:
        refused = str(error)
    return found, pm._makes.shapes.count.captured, refused


def test_data_ranks_of_different_lengths(gloo: Pool) -> None:
    for found, _, refused in gloo.run(other_lengths, "pp=2,dp=2", 2, world=4, timeout=300):
        assert found < 1e-12
        assert "filled up with positions" in refused and "so does extra" in refused


def odd_on_context(spec: str) -> float:
    torch.manual_seed(0)
    model, mesh = LM(Attention(True)).double(), mp.make_mesh(spec)
    pm = mp.parallelize(model, mesh, example=named(2, 8), config=mp.ParallelConfig(pad_to=1))
    return max(worst(pm, model, one, one) for length in (8, 7, 5) for one in [named(2, length)])


def test_lengths_that_cp_does_not_divide() -> None:
    with mp.simulate(2):
        assert odd_on_context("cp=2") < 1e-12
