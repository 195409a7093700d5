"""Local ranks: results by rank, and errors that end everything."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from meshpar.errors import ConfigError, MeshparError, RankError
from meshpar.launch import launched, run


def summed(x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return dist.get_rank(), x, torch.get_num_threads()


def failing(kind: type[Exception]) -> None:
    if dist.get_rank() == 1:
        raise kind("the second rank has had enough")
    dist.barrier()  # would wait for ever


@pytest.mark.slow
def test_results_by_rank() -> None:
    found = run(summed, torch.zeros(2), world=2)
    assert [rank for rank, _, _ in found] == [0, 1] and all(threads == 1 for _, _, threads in found)
    assert all(x.tolist() == [1.0, 1.0] for _, x, _ in found)


@pytest.mark.slow
def test_the_message_of_the_rank_that_failed() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="^rank 1 of 2 failed: the second rank has had enough$"):
        run(failing, ConfigError, world=2)
    with pytest.raises(RankError, match="(?s)rank 1 of 2 failed: Traceback.*in failing.*ValueError: the second rank has had enough$"):
        run(failing, ValueError, world=2)
    assert time.monotonic() - start < 240  # most of it imports torch; without an end the ranks would wait for the 900 s of the group


def test_what_cannot_be_sent() -> None:
    with pytest.raises(MeshparError, match="top of a module"):
        run(lambda: None, world=2)


def test_whether_this_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()
