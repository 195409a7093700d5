"""Local ranks: run a function on a few processes of this machine that form one gloo process group.

    results = run(train, config, world=4)          # train(config) on ranks 0..3

When one rank fails all end within seconds, and its error is the one that is raised.

How ranks start decides what they can be given. *Forked* ones are copies of this process: they have its classes, its closures and its model,
wherever those were defined (a notebook, a script without a guard, `python -c`), and nothing is pickled or imported again. A fork keeps only
the thread that forked, so it is right only where no other thread is needed afterwards: ranks use one thread each (torch's pool of OpenMP
threads is not entered then, as in forked workers of a DataLoader), and no accelerator (its driver does not survive a fork, and autograd
keeps a thread for each). Whether it is right here is tried, not guessed: `afresh` runs one forward and backward in a fork first. Where it
is not, ranks are *spawned*: fresh interpreters that import the script again and are sent everything by pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import multiprocessing as processes

from meshpar._torch import without_modes
from meshpar.errors import MeshparError, RankError
from meshpar.waiting import working

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""One thread per rank: as many ranks as cores, or more, would otherwise fight over them. And no advice that every rank repeats."""

Start = Literal["fork", "spawn"]
RankTask = tuple[Callable[..., Any], tuple[Any, ...]]
PATIENCE = 30.0
"""Seconds for the trial of `afresh`, which takes milliseconds where forks are right and may hang where they are not."""


def run(fn: Callable[..., Any], *args: Any, world: int, timeout: float = 900.0, start: Start | None = None) -> list[Any]:
    """Call `fn(*args)` on ranks 0..world-1 of a new gloo group; the results by rank.

    `start` says how ranks begin; by default they are forked where that is safe, else spawned. Spawned ranks are sent `fn` (a function at
    the top of a module) and `args` by file (torch.save), and a script that calls this needs `if __name__ == "__main__":`. Results always
    travel by file. Raises RankError with the message of the rank that failed first, or after `timeout` seconds; MeshparError when
    something cannot be sent to ranks that had to be spawned.
    """
    reason = "it was asked for" if start == "spawn" else afresh() if start is None else None
    with tempfile.TemporaryDirectory(prefix="meshpar-ranks-") as folder:
        if reason is not None:
            _save((fn, args), Path(folder, "task"), reason)
        with _environment(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # (it warns of what `afresh` has tried)
            started = processes.start_processes(
                _forked if reason is None else _spawned,
                args=(world, folder, timeout, *((fn, args) if reason is None else ())),
                nprocs=world,
                join=False,
                start_method="fork" if reason is None else "spawn",
            )
        assert started is not None
        try:
            with working(f"waiting for {world} local ranks"):  # (from here on nothing is forked)
                _joined(started, world, timeout)
        except (processes.ProcessRaisedException, processes.ProcessExitedException) as error:
            raise _explained(Path(folder), world, error, reason) from None
        finally:
            for process in started.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def _joined(started: Any, world: int, timeout: float) -> None:
    """Wait for all ranks. Raises RankError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not started.join(timeout=1.0, grace_period=1.0):
        if time.monotonic() > deadline:
            raise RankError(f"{world} local ranks did not finish within {timeout:.0f} s.")


def launched() -> bool:
    """Whether this process is one of several ranks already: torchrun, or a launcher with the same variables, started it."""
    if dist.is_initialized():
        return dist.get_world_size() > 1 and dist.get_backend() != "fake"
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def afresh() -> str | None:
    """Why ranks must be new interpreters on this machine at this moment, in words; None where copies of this process are right."""
    if sys.platform != "linux":
        return f"{sys.platform} has no fork that its own libraries survive"
    if torch.cuda.is_initialized() or torch.xpu.is_initialized():
        return "this process uses an accelerator already, which no fork survives"
    if dist.is_initialized() and dist.get_backend() != "fake":
        return f"this process belongs to a {dist.get_backend()} process group already"
    return None if _fork_works() else "a forked copy of this process could not compute (autograd keeps threads for its accelerators)"


def _fork_works() -> bool:
    """Whether a forward and backward end well in a fork of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if _computes() else 1)
        finally:
            os._exit(1)  # whatever was raised: a copy of this process must not go on
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _computes() -> bool:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    with without_modes(), torch.enable_grad():
        x = torch.ones(64, 64, requires_grad=True)
        (x @ x).sum().backward()
        return x.grad is not None and bool((x.grad == 128).all())


def _save(task: Any, path: Path, reason: str) -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise MeshparError(
            "this script starts local ranks while one of them imports it. Put what starts them under `if __name__ == '__main__':`."
        )
    try:
        torch.save(task, path)
    except Exception as error:
        raise MeshparError(
            f"{error}\n  What local ranks are to run is sent to them by file, because {reason}: define models and functions (loss_fn too) "
            f"at the top of a module, not inside another function or as a lambda. What cannot be pickled at all runs on ranks that each "
            f"build it: `torchrun --nproc-per-node N script.py`."
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


def _spawned(rank: int, world: int, folder: str, timeout: float) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _rank(rank, world, folder, timeout, lambda: torch.load(Path(folder, "task"), weights_only=False))


def _forked(rank: int, world: int, folder: str, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    if dist.is_initialized():  # simulated ranks of the process this is a copy of
        dist.destroy_process_group()
    with without_modes():
        _rank(rank, world, folder, timeout, lambda: (fn, args))


def _rank(rank: int, world: int, folder: str, timeout: float, task: Callable[[], RankTask]) -> None:
    try:
        fn, args = task()
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        torch.save(fn(*args), Path(folder, f"result-{rank}"))
        dist.barrier()  # nobody closes connections that another still uses
        dist.destroy_process_group()
    except BaseException as error:
        text = str(error) if isinstance(error, MeshparError) else traceback.format_exc()
        Path(folder, f"error-{rank}").write_text(f"{time.monotonic()}\n{text}")
        raise SystemExit(1) from None


def _explained(folder: Path, world: int, error: Exception, reason: str | None) -> RankError:
    """The first error: the others fail because of it."""
    found = []
    for rank in range(world):
        path = folder / f"error-{rank}"
        if path.exists():
            moment, _, text = path.read_text().partition("\n")
            found.append((float(moment), rank, text))
    if not found:
        imported = f" Ranks import this script again, because {reason}: has it `if __name__ == '__main__':`?" if reason else ""
        return RankError(f"a local rank died: {error}{imported}")
    _, rank, text = min(found)
    return RankError(f"rank {rank} of {world} failed: {text.strip()}")
