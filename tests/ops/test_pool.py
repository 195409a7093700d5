"""The pool itself: results by rank, errors with rank and traceback, a hang that ends, and work after each of them."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, WorkerError, WorkerTimeout


def rank_sum(start: float) -> tuple[int, torch.Tensor]:
    x = torch.full((2,), start + dist.get_rank())
    dist.all_reduce(x)
    return dist.get_rank(), x


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise RuntimeError("this rank is the culprit")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def world_size() -> int:
    return dist.get_world_size()


def test_results_come_by_rank(gloo: Pool) -> None:
    for world in (1, 2, 4):
        results = gloo.run(rank_sum, 1.0, world=world)
        assert [rank for rank, _ in results] == list(range(world))
        assert all(x.tolist() == [world * (world + 1) / 2] * 2 for _, x in results)


def test_an_error_names_the_rank_and_the_next_run_works(gloo: Pool) -> None:
    with pytest.raises(WorkerError, match="(?s)failed on rank 1 of 3.*in fail_on.*this rank is the culprit"):
        gloo.run(fail_on, 1, world=3)
    assert gloo.run(world_size, world=2) == [2, 2]


@pytest.mark.slow
def test_a_hang_ends_and_says_where() -> None:
    pool = Pool(2)
    try:
        assert pool.run(world_size, world=2) == [2, 2]
        with pytest.raises(WorkerTimeout, match=r"(?s)ranks \[1\] of 2 did not finish within 3 s.*in hang_on"):
            pool.run(hang_on, 1, world=2, timeout=3)
        assert pool.run(world_size, world=2) == [2, 2]
    finally:
        pool.close()
