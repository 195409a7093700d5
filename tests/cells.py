"""Cells of a notebook, run by IPython in a process that is forked from one where torch is imported already: a kernel imports it anew."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "matplotlib.pyplot matplotlib_inline.backend_inline IPython.core.interactiveshell transformers.modeling_utils torch.distributed.fsdp "
    "meshpar.api meshpar.proof.verify meshpar.dry_run.searching meshpar.checkpoint.online.training"
).split()
"""Once, by the process that is forked; a copy of it has run nothing else."""


def run(cells: Sequence[str], folder: Path, *, timeout: float) -> str | None:
    """Run the cells one after the other, from `folder`; what was raised, with its traceback, or None."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, __name__])
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, tuple(cells), str(folder)))
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            return f"not done after {timeout:.0f} s"
        found: str | None = here.recv()
        return found
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def _run(answer: Connection, cells: Sequence[str], folder: str) -> None:
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        answer.send(_failed(cells))


def _failed(cells: Sequence[str]) -> str | None:
    shell = _shell()
    for number, cell in enumerate(cells):
        try:
            shell.run_cell(cell, store_history=True).raise_error()
        except BaseException:
            return f"cell {number}:\n{cell}\n{traceback.format_exc()}"
    return None


def _shell() -> Any:
    """IPython as in a kernel: pictures and tables of what a cell ends with are made."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui: object = None) -> None:
            """Pictures are files: there are no windows."""

    shell = Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.run_line_magic("matplotlib", "inline")
    return shell
