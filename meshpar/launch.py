"""Local ranks: run a function on a few new processes of this machine that form one gloo process group.

    results = run(train, config, world=4)          # train(config) on ranks 0..3

When one rank fails all end within seconds, and its error is the one that is raised.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from .errors import MeshparError, RankError

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""One thread per rank: as many ranks as cores, or more, would otherwise fight over them. And no advice that every rank repeats."""


def run(fn: Callable[..., Any], *args: Any, world: int, timeout: float = 900.0) -> list[Any]:
    """Call `fn(*args)` on ranks 0..world-1 of a new gloo group; the results by rank.

    `fn` is a function at the top of a module; it, `args` and the results travel by file (torch.save). As with all of multiprocessing, a
    script that calls this needs `if __name__ == "__main__":`. Raises RankError with the message of the rank that failed first, or after
    `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="meshpar-ranks-") as folder:
        _save((fn, args), Path(folder, "task"))
        with _environment():
            started = multiprocessing.spawn(_rank, args=(world, folder, timeout), nprocs=world, join=False)
        deadline = time.monotonic() + timeout
        try:
            while not started.join(timeout=1.0, grace_period=1.0):
                if time.monotonic() > deadline:
                    raise RankError(f"{world} local ranks did not finish within {timeout:.0f} s.")
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            raise _explained(Path(folder), world, error) from None
        finally:
            for process in started.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def launched() -> bool:
    """Whether this process is one of several ranks already: torchrun, or a launcher with the same variables, started it."""
    if dist.is_initialized():
        return dist.get_world_size() > 1 and dist.get_backend() != "fake"
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _save(task: Any, path: Path) -> None:
    try:
        torch.save(task, path)
    except Exception as error:
        raise MeshparError(
            f"{error}\n  What local ranks are to run is sent to them by file: define models and functions (loss_fn too) at the top of a "
            f"module, not inside another function or as a lambda."
        ) from error


@contextmanager
def _environment() -> Iterator[None]:
    """The variables new processes must find before they import torch."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


def _rank(rank: int, world: int, folder: str, timeout: float) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        fn, args = torch.load(Path(folder, "task"), weights_only=False)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        torch.save(fn(*args), Path(folder, f"result-{rank}"))
        dist.barrier()  # nobody closes connections that another still uses
        dist.destroy_process_group()
    except BaseException as error:
        text = str(error) if isinstance(error, MeshparError) else traceback.format_exc()
        Path(folder, f"error-{rank}").write_text(f"{time.monotonic()}\n{text}")
        raise SystemExit(1) from None


def _explained(folder: Path, world: int, error: Exception) -> RankError:
    """The first error: the others fail because of it."""
    found = []
    for rank in range(world):
        path = folder / f"error-{rank}"
        if path.exists():
            moment, _, text = path.read_text().partition("\n")
            found.append((float(moment), rank, text))
    if not found:
        return RankError(f"a local rank died: {error}")
    _, rank, text = min(found)
    return RankError(f"rank {rank} of {world} failed: {text.strip()}")
