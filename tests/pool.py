"""A pool of processes that run a function on 1 to 4 gloo ranks, so that importing torch is paid for once per session.

def double(x):                       # at the top of a test module: workers import it by name
    x = torch.full((2,), float(dist.get_rank())) + x
    dist.all_reduce(x)
    return x

def test_double(gloo):
    assert gloo.run(double, 1.0, world=2)[0].tolist() == [3.0, 3.0]
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0
"""How long a machine with a busy disk may take to import torch in all workers."""


class WorkerError(AssertionError):
    """A rank raised; the message holds its number and its traceback."""


class WorkerTimeout(AssertionError):
    """Some ranks did not finish in time; the message says where they were. The pool has been restarted."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """Persistent workers, started at the first `run`. Each run has its own process group and its own random seed."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="meshpar-pool-")
        self._runs = 0

    def run(self, fn: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        """Call `fn(*args, **kwargs)` on ranks 0..world-1 of a gloo process group; the results by rank.

        `fn` is a module-level function; arguments and results are pickled. Raises `WorkerError` if a rank raises (the first to do so is
        reported: the others fail because of it), `WorkerTimeout` after `timeout` seconds.
        """
        if not 1 <= world <= self.size:
            raise ValueError(f"world={world}: the pool has {self.size} workers")
        try:
            return self._run(fn, args, kwargs, world, timeout)
        except (WorkerError, WorkerTimeout):
            if self._connected():
                raise
        self.close()  # a crowded machine may keep ranks from connecting at all, before the function was called: once more, with new workers
        return self._run(fn, args, kwargs, world, timeout)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], world: int, timeout: float) -> list[Any]:
        self._start()
        self._runs += 1
        store = os.path.join(self._folder.name, f"store-{self._runs}")
        payload = pickle.dumps((fn, args, kwargs))
        for rank, worker in enumerate(self._workers[:world]):
            worker.pipe.send((payload, rank, world, store, self._where(rank), timeout))
        return self._collect(world, timeout, getattr(fn, "__name__", str(fn)))

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _start(self) -> None:
        if self._workers and all(worker.process.is_alive() for worker in self._workers):
            return
        self.close()
        context = get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, [str(ROOT), *sys.path]), daemon=True)
            with _hash_seed(rank + 1):  # sets of strings are iterated in another order on every rank, as on real ones
                process.start()
            there.close()
            self._workers.append(_Worker(process, here))
        for worker in self._workers:
            if not worker.pipe.poll(START_SECONDS):
                self.close()
                raise WorkerTimeout(f"a worker did not import torch within {START_SECONDS:.0f} s")
            worker.pipe.recv()

    def _collect(self, world: int, timeout: float, name: str) -> list[Any]:
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers[:world])}
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    moment, error, payload = pipe.recv()
                except EOFError:
                    moment, error, payload = 0.0, "the process died", b""
                if error is not None:
                    failures.append((moment, rank, error))
                    deadline = min(deadline, time.monotonic() + 10)  # its peers fail too, or hang
                else:
                    results[rank] = pickle.loads(payload)
        stacks = {rank: Path(self._where(rank)).read_text() for rank in waiting.values() if Path(self._where(rank)).exists()}
        if waiting:
            self.close()
        if failures:
            _, rank, error = min(failures)
            raise WorkerError(f"{name} failed on rank {rank} of {world}:\n{error}")
        if waiting:
            where = "\n".join(f"--- rank {rank}\n{stack}" for rank, stack in stacks.items())
            raise WorkerTimeout(f"{name}: ranks {sorted(waiting.values())} of {world} did not finish within {timeout:g} s\n{where}")
        return [results[rank] for rank in range(world)]

    def _connected(self) -> bool:
        """Whether any rank of the last run came as far as to call the function."""
        return any(Path(f"{self._where(rank)}-called").exists() for rank in range(self.size))

    def _where(self, rank: int) -> str:
        """The file for the stack of a rank that hangs."""
        return os.path.join(self._folder.name, f"stack-{self._runs}-{rank}")


@contextmanager
def _hash_seed(seed: int) -> Iterator[None]:
    """Processes that are started inside hash strings with this seed."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = str(seed)
    try:
        yield
    finally:
        os.environ.pop("PYTHONHASHSEED")
        os.environ |= {} if before is None else {"PYTHONHASHSEED": before}


def _work(pipe: Connection, path: list[str]) -> None:
    """The life of a worker: import torch, then serve until the pool hangs up."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    sys.path[:] = list(dict.fromkeys(path))
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # (as in conftest.py)
    gc.set_threshold(10_000, 10, 20)
    pipe.send("ready")
    while True:
        try:
            payload, rank, world, store, stack, timeout = pipe.recv()
        except (EOFError, OSError):
            return
        with open(stack, "w") as file:
            faulthandler.dump_traceback_later(max(timeout - 2, timeout / 2), file=file)
            answer = _serve(payload, rank, world, store, timeout, f"{stack}-called")
            faulthandler.cancel_dump_traceback_later()
        os.unlink(stack)
        pipe.send(answer)


def _serve(payload: bytes, rank: int, world: int, store: str, timeout: float, called: str) -> tuple[float, str | None, bytes]:
    import torch
    import torch.distributed as dist

    try:
        fn, args, kwargs = pickle.loads(payload)
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        dist.barrier()  # a rank that returns at once closes connections which its peers may still be making
        Path(called).touch()
        answer = time.monotonic(), None, pickle.dumps(fn(*args, **kwargs))
    except BaseException:
        answer = time.monotonic(), traceback.format_exc(), b""
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        if dist.is_initialized():
            dist.destroy_process_group()  # closes the connections, so that peers waiting for this rank fail at once
    return answer
