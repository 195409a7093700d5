"""Ranks behind a notebook: variables stay, an error or an interrupt ends work, and what was left of the ranks is said."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from meshpar import notebook
from meshpar.errors import ConfigError, RankError


@pytest.fixture(scope="module")
def two() -> Iterator[notebook.LocalRanks]:
    with notebook.ranks(2, names={"base": 40}) as made:
        yield made


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, signal.raise_signal, [signal.SIGINT]).start()


def test_variables_stay_and_values_come_back(two: notebook.LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    two.run("import torch, torch.distributed as dist\nx = torch.full((2,), float(base + rank))\ndist.all_reduce(x)")
    assert [value.tolist() for value in two("x")] == [[81.0, 81.0], [81.0, 81.0]]
    two.put(y=torch.ones(2))
    two.run("print('sum', (x + y).sum().item() + rank)\nrank * 2")
    assert sorted(capsys.readouterr().out.splitlines()) == ["0: 0", "0: sum 164.0", "1: 2", "1: sum 165.0"]
    with pytest.raises(ConfigError, match="notebook.ranks\\(0\\): how many ranks"):
        notebook.ranks(0)


def test_an_error_on_all_ranks_leaves_them_as_they_are(two: notebook.LocalRanks) -> None:
    two.run("kept = rank")
    with pytest.raises(RankError, match="NameError: name 'nothing' is not defined(.|\n)*keep their variables"):
        two.run("nothing")
    assert two("kept") == [0, 1]


def test_an_interrupt_reaches_all_ranks(two: notebook.LocalRanks) -> None:
    two.run("kept = 7 + rank")
    interrupt_after(0.5)
    with pytest.raises(KeyboardInterrupt, match="All ranks are in step, and keep their variables"):
        two.run("while True: pass")
    assert two("kept") == [7, 8]


def test_ranks_that_hang_or_die_are_started_anew(two: notebook.LocalRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "PATIENCE", 1.0)
    two.run("import torch, torch.distributed as dist\nkept = 1")
    begun = time.monotonic()
    with pytest.raises(RankError, match="only one(.|\n)*started anew, as rank 1 of 2 did not come back from a collective"):
        two.run("if rank == 0: raise ValueError('only one')\ndist.all_reduce(torch.ones(1))")
    assert time.monotonic() - begun < 60 and two("base + rank") == [40, 41]
    with pytest.raises(RankError, match="name 'kept' is not defined"):
        two("kept")
    with pytest.raises(RankError, match="rank 0 died\nAll ranks were started anew"):
        two.run("import os, time\nos._exit(1) if rank == 0 else None")
    two.run("import torch.distributed as dist, torch")
    with pytest.raises(RankError, match="some ranks were a collective ahead of others"):
        two.run("if rank == 0: dist.all_reduce(torch.ones(1), async_op=True)\nraise ValueError")
    assert two("rank") == [0, 1]
