"""What takes long says so on a terminal, after a while; elsewhere nothing is written."""

from __future__ import annotations

import io
import sys
import time

import pytest

import meshpar as mp
from meshpar import waiting
from meshpar.waiting import working


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
    return made


def test_what_lasts_is_said_and_what_runs_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    with working("outer"):
        with working("inner"):
            wait_for("inner 0:00:0", terminal)
        wait_for("outer 0:00:0", terminal)


def wait_for(text: str, terminal: Terminal) -> None:
    deadline = time.monotonic() + 30
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
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
