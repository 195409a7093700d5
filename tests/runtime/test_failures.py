"""One rank fails, the others fail with its message: processes of their own, since some of them die."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from meshpar.errors import BatchError, RankError
from meshpar.mesh import make_mesh
from meshpar.runtime.failures import Together

SECONDS = 20.0  # what "within seconds" means on a busy machine; the waits alone are 4


@contextmanager
def fail_together(mesh: DeviceMesh, where: str = "this section") -> Iterator[None]:
    """One section of `Together`: if a rank raises inside it, all do."""
    together = Together(mesh)
    try:
        with together.section(where):
            yield
    finally:
        together.close()


def one_dies(rank: int) -> str:
    mesh = make_mesh("tp=2")
    _use_all_groups(mesh)
    with fail_together(mesh, "train_step"):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(2))
    return "no error"


def all_fail_and_go_on(rank: int) -> str:
    mesh = make_mesh("tp=2")
    together = Together(mesh)
    for _ in range(2):
        try:
            with together.section("parallelize"):
                raise BatchError(f"bad on {rank}")
        except BatchError as error:
            assert str(error) == f"bad on {rank}"
    with together.section("train_step"):
        total = torch.ones(2)
        dist.all_reduce(total)
    return f"sum {total[0].item():.0f}"


def one_fails_late(rank: int) -> str:
    """The others are in a chain: rank 0 waits for rank 1, which waits for rank 2, which fails."""
    mesh = make_mesh("pp=3")
    _use_all_groups(mesh)
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    with fail_together(mesh, "train_step"):
        if rank == 2:
            raise ValueError("stage 2 is broken")
        dist.broadcast(torch.ones(2), src=rank + 1, group=pairs[rank])
    return "no error"


def test_a_rank_that_is_killed_is_noticed() -> None:
    results, seconds = _run(one_dies, 2)
    assert list(results) == [0]
    assert results[0].startswith("RankError: rank 0 lost its connection to another rank in train_step, and no rank left a message"), results
    assert seconds < SECONDS


def test_a_mistake_of_all_ranks_leaves_the_groups_usable() -> None:
    results, _ = _run(all_fail_and_go_on, 2)
    assert results == {0: "sum 2", 1: "sum 2"}


@pytest.mark.slow
def test_the_others_raise_the_message_of_the_rank_that_failed_along_a_chain() -> None:
    results, seconds = _run(one_fails_late, 3)
    assert "ValueError: stage 2 is broken" in results[2]
    for rank in (0, 1):
        assert results[rank].startswith("RankError: rank 2 failed in train_step: ValueError: stage 2 is broken (test_failures.py:"), results
    assert seconds < SECONDS


def sections_in_a_pool(fail: bool) -> str:
    mesh = make_mesh("tp=2")
    try:
        with fail_together(mesh, "parallelize"):
            dist.all_reduce(torch.ones(1))
            if fail:
                raise BatchError("no labels")
    except BatchError as error:
        return str(error)
    return "done"


def test_other_stores(gloo: Any) -> None:
    assert gloo.run(sections_in_a_pool, False) == ["done"] * 2
    assert gloo.run(sections_in_a_pool, True) == ["no labels"] * 2


def test_one_process_needs_no_watcher() -> None:
    mesh = make_mesh("tp=1")
    with pytest.raises(RankError, match="plain"), fail_together(mesh, "a section"):
        raise RankError("plain")
    dist.destroy_process_group()


def _use_all_groups(mesh: Any) -> None:
    for group in (None, *mesh.get_all_groups()):
        dist.all_reduce(torch.ones(1), group=group)


def _run(work: Callable[[int], str], size: int) -> tuple[dict[int, str], float]:
    """The answer of every rank that gave one, and how long the slowest took."""
    context = mp.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["meshpar.runtime.failures", "meshpar.mesh"])
    results: Any = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_rank, args=(work, rank, size, port, results)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    found, seconds = {}, 0.0
    while not results.empty():
        rank, text, took = results.get()
        found[rank] = text
        seconds = max(seconds, took)
    return found, seconds


def _rank(work: Callable[[int], str], rank: int, size: int, port: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    start = time.monotonic()
    try:
        text = work(rank)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    results.put((rank, text, time.monotonic() - start))
    sys.stdout.flush()
    time.sleep(6 if "fail" in text or "broken" in text else 0)  # a failed process may stay: the others must not depend on its end
    os._exit(0)
