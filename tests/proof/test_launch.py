"""Local ranks: results by rank, and errors that end everything."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshpar.errors import ConfigError, MeshparError, RankError
from meshpar.proof import launch
from meshpar.proof.launch import Start, launched, run


def summed(x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return dist.get_rank(), x, torch.get_num_threads()


def failing(kind: type[Exception]) -> None:
    if dist.get_rank() == 1:
        raise kind("the second rank has had enough")
    dist.barrier()  # would wait for ever


@pytest.mark.sweep(1)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_results_by_rank(start: Start) -> None:
    found = run(summed, torch.zeros(2), world=2, start=start)
    assert [rank for rank, _, _ in found] == [0, 1] and all(threads == 1 for _, _, threads in found)
    assert all(x.tolist() == [1.0, 1.0] for _, x, _ in found)


def test_the_message_of_the_rank_that_failed() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="^rank 1 of 2 failed: the second rank has had enough$"):
        run(failing, ConfigError, world=2)
    with pytest.raises(RankError, match="(?s)rank 1 of 2 failed: Traceback.*in failing.*ValueError: the second rank has had enough$"):
        run(failing, ValueError, world=2)
    assert time.monotonic() - start < 240  # most of it imports torch; without an end the ranks would wait for the 900 s of the group


def test_what_cannot_be_sent() -> None:
    with pytest.raises(MeshparError, match="(?s)because it was asked for: .*top of a module.*torchrun"):
        run(lambda: None, world=2, start="spawn")


def test_what_cannot_be_pickled_is_given_to_copies_of_this_process() -> None:
    lock = threading.Lock()

    class Local:
        def __reduce__(self) -> Any:
            raise TypeError("not to be pickled")

        def loss(self, x: torch.Tensor) -> float:
            with lock, torch.enable_grad():
                x = x.clone().requires_grad_()
                (x @ x.T).sum().backward()
            assert x.grad is not None
            dist.all_reduce(x.grad)
            return x.grad.sum().item()

    torch.ones(4, requires_grad=True).sum().backward()  # this process has used autograd before it is copied
    assert launch.afresh() is None
    with torch.no_grad():
        assert run(Local().loss, torch.ones(300, 300), world=2) == [2 * 2 * 300.0**3] * 2


def test_why_ranks_must_be_new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_computes", lambda: 1 / 0)
        assert "could not compute" in str(launch.afresh())
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_computes", lambda: time.sleep(60))
        patch.setattr(launch, "PATIENCE", 0.1)
        assert "could not compute" in str(launch.afresh())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert "accelerator" in str(launch.afresh())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert "win32" in str(launch.afresh())


PLAIN = """
import torch
from torch import nn
import meshpar as mp

print("once")

class Net(nn.Sequential):
    pass

net = Net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
report = mp.verify(net, "pp=2", (torch.randn(4, 4),), loss_fn=lambda output, batch: output.square().sum())
print(report.ok, report.ranks)
"""


@pytest.mark.sweep(1)
@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_script_without_a_guard(how: str, tmp_path: Path) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    command, given = ([sys.executable, str(tmp_path / "plain.py")], None) if how == "file" else ([sys.executable, "-"], PLAIN)
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["once", "True gloo processes"], done.stderr


def test_whether_this_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()
