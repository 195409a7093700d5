"""What takes long says so on a terminal or in a notebook, after a while, with a bar where it is known how much there is; else nowhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

import meshpar as mp
from meshpar import waiting
from meshpar.init.meta import materialise
from meshpar.waiting import each, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of the error stream. (Not a fixture: pytest puts its own there between setting up and calling a test.)"""
    pytest.importorskip("rich")
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(waiting, "AFTER", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    return made


def test_what_lasts_is_said_and_what_runs_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    with working("outer"):
        with working("inner"):
            wait_for("inner 0:00:0", terminal)
        wait_for("outer 0:00:0", terminal)


def test_a_bar_says_how_many_of_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    with working("reading"):
        for number in each(range(40, 47)):
            if number in (42, 45):
                wait_for(f" {number - 40}/7 ", terminal)
        wait_for("reading 0:00:0", terminal, of=terminal.getvalue())
    assert "reading ━" in terminal.getvalue()


def test_alone_it_is_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    assert [(number, time.sleep(0.05)) for number in each(iter((1, 2, 3)), 3)] == [(1, None), (2, None), (3, None)]
    assert terminal.getvalue() == ""


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))


@pytest.mark.parametrize("said", ["from a file", "by the model"])
def test_weights_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    """Of six tensors the fourth waits until it is shown that three are done."""
    terminal, placed = watched(monkeypatch), list[str]()
    save_file(layers().state_dict(), tmp_path / "w.safetensors")
    with mp.meta():
        model = layers()

    def place(name: str, value: Any) -> None:
        placed.append(name)
        if len(placed) == 4:
            wait_for("weights", terminal)
            wait_for(" 3/6 ", terminal)

    with working("weights"):
        materialise(model, list(model.state_dict()), place, weights=tmp_path / "w.safetensors" if said == "from a file" else None)
    assert len(placed) == 6


@pytest.fixture
def shell() -> Iterator[Any]:
    """The shell of a notebook, of which the kernel says whether somebody could be asked."""
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    config = pytest.importorskip("traitlets.config").Config({"HistoryManager": {"enabled": False}})
    made = interactive.instance(config=config)
    made.kernel = SimpleNamespace(_allow_stdin=True)
    yield made
    interactive.clear_instance()


def test_in_a_notebook_it_is_a_line_below_the_cell(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    published: list[tuple[str, bool]] = []
    monkeypatch.setattr(shell.display_pub, "publish", lambda data, update=False, **_: published.append((data["text/html"], update)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(waiting, "AFTER", 0.05)
    with working("lists <of> rows"):
        for number in each(range(3)):
            while number == 2 and not any("2/3" in html for html, _ in published):
                time.sleep(0.05)
    bars = [html for html, _ in published if "2/3" in html]
    assert bars[0].startswith('lists &lt;of&gt; rows <progress value="2" max="3"></progress> 2/3 0:00:0')
    assert published[-1] == ("", True) and [update for _, update in published] == [False] + [True] * (len(published) - 1)
    shell.kernel._allow_stdin = False  # a program runs the notebook
    published.clear()
    with working("lists"):
        time.sleep(0.3)
    assert published == []


def wait_for(text: str, terminal: Terminal, *, of: str = "") -> None:
    """Until `text` is on the terminal, after `of`, what was there before."""
    deadline = time.monotonic() + 30
    while text not in terminal.getvalue()[len(of) :]:
        assert time.monotonic() < deadline, terminal.getvalue()[-300:]
        time.sleep(0.05)


def test_what_is_quick_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    monkeypatch.setattr(waiting, "AFTER", 5.0)
    with working("quick"):
        pass
    assert terminal.getvalue() == ""


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    mp.progress(False)
    try:
        with working("something"):
            time.sleep(0.3)
    finally:
        mp.progress(True)
    assert terminal.getvalue() == ""


def test_silent_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    with working("something"):
        time.sleep(0.3)
    assert plain.getvalue() == ""
