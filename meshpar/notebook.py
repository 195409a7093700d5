"""Real ranks behind a notebook: gloo processes that stay, keep their variables from cell to cell, and can be interrupted.

    ranks = mp.notebook.ranks(4)             # copies of this notebook at this moment: its models and batches are there
    %%ranks                                  # a cell that runs on all of them; `rank` and `world` are names there
    pm = mp.parallelize(model, mp.make_mesh("dp=2,tp=2"), example=batch)
    ranks("pm.train_step(**batch).item()")   # an expression: its value on every rank

Why not ipyparallel: a rank must be able to use what the notebook defined (a model written in a cell cannot be pickled to an engine that
never saw its class), and one that hangs in a collective cannot be stopped by an exception. So ranks are forks, and those that do not
come back are started anew, in words.

An interrupt (the notebook's stop button) reaches every rank. Ranks that stop keep their variables, unless one of them is a collective
ahead of another: then nothing that they compute together would be right, and all start anew.
"""

from __future__ import annotations

import ast
import io
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from meshpar._torch import without_modes
from meshpar.errors import ConfigError, MeshparError, RankError
from meshpar.proof.launch import afresh

PATIENCE = 3.0
"""Seconds that ranks have to come back after one failed or all were interrupted; those still in a collective then will not."""


def ranks(world: int, *, timeout: float = 600.0, names: Mapping[str, Any] | None = None) -> LocalRanks:
    """Start `world` gloo ranks as copies of this process, and the cell magic `%%ranks` where this is a notebook.

    `names`: the variables they start with; by default those of the notebook (of `__main__`). `timeout`: seconds of a collective.

    Raises ConfigError for fewer than one rank, MeshparError where a copy of this process could not compute (an accelerator is in use).

    >>> with ranks(2, names={}) as two:                                                    # doctest: +SKIP
    ...     two("rank * 10 + world")
    [2, 12]
    """
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ConfigError(f"notebook.ranks({world!r}): how many ranks, a whole number of at least 1.")
    if (reason := afresh()) is not None:
        raise MeshparError(f"notebook.ranks: ranks are copies of this process, and {reason}. Start them by torchrun, with a script.")
    made = LocalRanks(world, timeout, names)
    _register(made)
    return made


class LocalRanks:
    """Ranks that stay. Make them with `ranks`; `with` or `close()` ends them, as does the end of the notebook."""

    def __init__(self, world: int, timeout: float, names: Mapping[str, Any] | None) -> None:
        self.world, self._timeout, self._names = world, timeout, names
        self._folder = tempfile.TemporaryDirectory(prefix="meshpar-notebook-")
        self._starts = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._start()

    def run(self, source: str) -> None:
        """Run statements on every rank. What they print appears behind the number of the rank, as does the value of a last expression.

        Raises RankError with the traceback of the rank that failed first, and what became of the others.
        """
        for rank, value in enumerate(self._ask("run", source)):
            if value is not None:
                print(f"{rank}: {value}")

    def __call__(self, expression: str) -> list[Any]:
        """The value of an expression on every rank, by rank. Raises RankError as `run` does, and where a value cannot be pickled."""
        return [torch.load(io.BytesIO(value), weights_only=False) for value in self._ask("value", expression)]

    def put(self, **values: Any) -> None:
        """Give every rank these variables: what the notebook made since they were started."""
        kept = io.BytesIO()
        torch.save(values, kept)
        self._ask("put", kept.getvalue())

    def restart(self) -> None:
        """End all ranks and start others, as copies of the notebook as it is now: what was made on the old ones is gone."""
        self.close()
        self._start()

    def close(self) -> None:
        """End all ranks."""
        for process, pipe in zip(self._processes, self._pipes):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        alive = sum(process.is_alive() for process in self._processes)
        return f"LocalRanks({alive} of {self.world} gloo processes, process ids {', '.join(str(p.pid) for p in self._processes)})"

    # -- how -------------------------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        context = get_context("fork")
        self._starts += 1
        store = Path(self._folder.name, f"store-{self._starts}")
        names = dict(vars(sys.modules["__main__"]) if self._names is None else self._names)
        for rank in range(self.world):
            here, there = context.Pipe()
            inherited = [*self._pipes, here]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: `afresh` has tried one
                process = context.Process(target=_rank, args=(rank, self.world, store, self._timeout, there, inherited, names), daemon=True)
                process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._ask("run", "")

    def _ask(self, what: str, given: Any) -> list[Any]:
        """Send the same to every rank, and collect the answers."""
        if not self._pipes:
            raise RankError("these ranks were ended. Type ranks.restart() for new ones.")
        for pipe in self._pipes:
            pipe.send((what, given))
        answers: dict[int, tuple[str, Any]] = {}
        interrupted = False
        deadline = float("inf")
        while len(answers) < self.world and time.monotonic() < deadline:
            try:
                answers |= dict(self._heard(answers, min(1.0, max(0.0, deadline - time.monotonic()))))
            except KeyboardInterrupt:
                interrupted = True
                self._signal(answers)
            if interrupted or any(kind == "error" for kind, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + PATIENCE)
        return self._settled(answers, interrupted)

    def _heard(self, answers: Mapping[int, Any], seconds: float) -> Iterator[tuple[int, tuple[str, Any]]]:
        """Answers that came in meanwhile; what ranks print is printed."""
        waiting = {self._pipes[rank]: rank for rank in range(self.world) if rank not in answers}
        for pipe in wait(list(waiting), timeout=seconds):
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                yield rank, ("error", f"rank {rank} died")
                continue
            if kind == "print":
                print("".join(f"{rank}: {line}\n" for line in value.splitlines()), end="", flush=True)
            else:
                yield rank, (kind, value)

    def _signal(self, answers: Mapping[int, Any]) -> None:
        for rank, process in enumerate(self._processes):
            if rank not in answers and process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)

    def _settled(self, answers: Mapping[int, tuple[str, Any]], interrupted: bool) -> list[Any]:
        """The answers of all ranks; an error of one, or an interrupt, after seeing what it left of the others."""
        errors = [text for kind, text in answers.values() if kind == "error"]
        if len(answers) == self.world and not errors and not interrupted:
            return [value for _, (_, value) in sorted(answers.items())]
        after = self._left(answers)
        if interrupted:
            raise KeyboardInterrupt(after)
        raise RankError(f"{errors[0].strip()}\n{after}")

    def _left(self, answers: Mapping[int, Any]) -> str:
        """What is left after an error: ranks that are in step keep their variables, others cannot go on."""
        missing = [rank for rank in range(self.world) if rank not in answers]
        if missing:
            reason = f"rank {', '.join(map(str, missing))} of {self.world} did not come back from a collective"
        elif self._in_step():
            return "All ranks are in step, and keep their variables."
        else:
            reason = "some ranks were a collective ahead of others"
        self.restart()
        return f"All ranks were started anew, as {reason}: what was made on them is gone."

    def _in_step(self) -> bool:
        """Whether all ranks are alive and have run equally many collectives: else a barrier of all of them fails."""
        try:
            for pipe in self._pipes:
                pipe.send(("meet", PATIENCE))
        except OSError:
            return False
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + 2 * PATIENCE
        while len(answers) < self.world and time.monotonic() < deadline:
            answers |= dict(self._heard(answers, 0.5))
        return len(answers) == self.world and all(kind == "done" for kind, _ in answers.values())


def _register(made: LocalRanks) -> None:
    """The cell magic, where this process is an IPython: it runs on the ranks that were made last."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.register_magic_function(lambda line, cell: made.run(cell), magic_kind="cell", magic_name="ranks")


# -- what a rank does ----------------------------------------------------------------------------------------------------------------------


class _Printed(io.TextIOBase):
    """What a rank prints, sent line by line."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe, self._rest = pipe, ""

    def write(self, text: str) -> int:
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._pipe.send(("print", whole))
        return len(text)

    def flush(self) -> None:
        """Nothing: a line is sent when it ends."""

    def finish(self) -> None:
        """Send what has no end of line."""
        if self._rest:
            self.write("\n")


class _Interrupts:
    """An interrupt while a rank works stops the work; one while it waits for some is late, and means nothing."""

    def __init__(self) -> None:
        self.working = False
        signal.signal(signal.SIGINT, self._arrived)

    def _arrived(self, _: int, __: FrameType | None) -> None:
        if self.working:
            self.working = False
            raise KeyboardInterrupt


def _rank(
    rank: int, world: int, store: Path, timeout: float, pipe: Connection, inherited: Sequence[Connection], names: dict[str, Any]
) -> None:
    os.setsid()  # the notebook tells ranks itself when it is interrupted
    for other in inherited:
        other.close()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    if dist.is_initialized():  # simulated ranks of the notebook
        dist.destroy_process_group()
    names |= {"rank": rank, "world": world}
    printed = sys.stdout = sys.stderr = _Printed(pipe)
    interrupts = _Interrupts()
    with without_modes():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        while True:
            try:
                what, given = pipe.recv()
            except EOFError:  # the notebook has ended
                os._exit(0)
            try:
                interrupts.working = what != "meet"
                answer = "done", _DO[what](given, names)
            except BaseException as error:
                answer = "error", str(error) if isinstance(error, MeshparError) else f"rank {rank}: {_told(error)}"
            interrupts.working = False
            printed.finish()
            pipe.send(answer)


def _run(source: str, names: dict[str, Any]) -> str | None:
    """Run statements; the text of the last one's value, if it is an expression with one."""
    tree = ast.parse(source, "<ranks>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<ranks>", "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    value = eval(compile(ast.Expression(last.value), "<ranks>", "eval"), names)
    return None if value is None else repr(value)


def _value(expression: str, names: dict[str, Any]) -> bytes:
    kept = io.BytesIO()
    torch.save(eval(expression, names), kept)
    return kept.getvalue()


def _put(values: bytes, names: dict[str, Any]) -> None:
    names |= torch.load(io.BytesIO(values), weights_only=False)


def _meet(seconds: float, _: dict[str, Any]) -> None:
    dist.monitored_barrier(timeout=timedelta(seconds=seconds))


_DO: dict[str, Callable[[Any, dict[str, Any]], Any]] = {"run": _run, "value": _value, "put": _put, "meet": _meet}


def _told(error: BaseException) -> str:
    """A traceback without the frames of this file."""
    found = traceback.TracebackException.from_exception(error)
    found.stack = traceback.StackSummary.from_list([frame for frame in found.stack if frame.filename != __file__])
    return "".join(found.format())
