"""Batches by data rank: together they are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import meshpar as mp
from meshpar.data import Batches
from tests.pool import Pool


def of(rank: int, ranks: int, samples: int = 10, size: int = 4, **options: bool) -> Batches:
    return Batches(samples, rank, ranks, size, shuffle=options.get("shuffle", True), seed=1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_read_what_one_process_reads(ranks: int) -> None:
    alone, parts = of(0, 1), [of(rank, ranks) for rank in range(ranks)]
    for _ in range(3):  # epochs
        whole = list(alone)
        assert [[i for share in shares for i in share] for shares in zip(*map(list, parts), strict=True)] == whole
        assert len(whole) == len(alone) == 2 and len({i for batch in whole for i in batch}) == 8


def test_epochs_differ_and_a_run_goes_on_where_it_was() -> None:
    batches = of(0, 1)
    run = [*batches, *batches, *batches]
    assert run[:2] != run[2:4]
    for done in range(7):
        again = of(0, 1).start(done)
        assert [*again, *again, *again][: max(6 - done, 0)] == run[done:]
    assert list(of(0, 1, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_cannot_be_meant() -> None:
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2")
        with pytest.raises(mp.ConfigError, match="mp.local_batch(.|\n)*does not divide among 2 data ranks. Take 4"):
            mp.data.batches(10, mesh, global_batch=3)
        with pytest.raises(mp.ConfigError, match=r"len\(dataset\)"):
            mp.data.batches([1, 2, 3], mesh, global_batch=2)  # type: ignore[arg-type]
    with pytest.raises(mp.ConfigError, match="at least 0"):
        of(0, 1).start(-1)


def read() -> list[list[int]]:
    mesh = mp.make_mesh("dp=2,tp=2")
    loader = DataLoader(torch.arange(10), batch_sampler=mp.data.batches(10, mesh, global_batch=4, seed=1))  # type: ignore[arg-type]
    return [batch.tolist() for batch in loader] + [[dist.get_rank()]]


def test_ranks_of_one_tp_group_read_the_same(gloo: Pool) -> None:
    found = {rank: rows for *rows, (rank,) in gloo.run(read, world=4)}
    assert found[0] == found[1] and found[2] == found[3]
    assert [a + b for a, b in zip(found[0], found[2], strict=True)] == list(of(0, 1))
