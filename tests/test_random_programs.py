"""A few random programs on meshes drawn with them; `python benchmarks/random_programs/run.py` runs as many as there is time for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.random_programs import settings, typings
from benchmarks.random_programs.compare import Outcome, outcome
from benchmarks.random_programs.programs import Program, draw, shortest
from meshpar.capture.export import capture
from meshpar.graph.operators import OPERATORS
from meshpar.sharding.rules import row
from tests.pool import Pool

SIMULATED = (0, 1, 2, 7)
PROCESSES = (4,)
"""Seeds."""


def checked_against_one_device(seed: int, pool: Pool | None = None) -> Outcome:
    """The outcome of a seed, which has to be fine."""
    how = settings.setting(seed, processes=pool is not None)
    program = settings.program_of(seed, how)
    found = outcome(program, how, settings.shapes_of(program, how), pool)
    assert found.status == "ok" and found.static in ("proved", "partly"), f"{how}\n{program.source}\n{found}"
    return found


@pytest.mark.sweep(1)
@pytest.mark.parametrize("seed", SIMULATED)
def test_random_programs_compute_what_they_compute_on_one_device(seed: int) -> None:
    checked_against_one_device(seed)


@pytest.mark.parametrize("seed", PROCESSES)
def test_random_programs_on_processes(seed: int, gloo: Pool) -> None:
    """Pipelines, data parallelism, batches of other shapes, on ranks with other hash seeds."""
    checked_against_one_device(seed, gloo)


def checked(program: Program) -> typings.Typings:
    """All typings of one program."""
    model, batch = program.model(), program.batch()
    captured = capture(model, (), batch)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants, **batch}
    found = typings.Typings(captured.graph, tensors, set())
    with torch.no_grad():
        found.run()
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("seed", range(100, 104))
def test_every_typing_of_random_programs_computes_the_operator(seed: int) -> None:
    found = checked(draw(seed, lines=14))
    assert found.checked.total() > 50 and not found.wrong, "\n".join(found.wrong)


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax must not be cut along its own dim."""
    lines = ("v1 = torch.softmax(self.m1(x), 1)", "loss = v1.pow(2).sum()")
    program = Program(0, ("self.m1 = nn.Linear(4, 6)",), lines, (("x", "torch.randn(4, 4, dtype=torch.double)"),))
    assert not checked(program).wrong
    monkeypatch.setitem(OPERATORS, "softmax", replace(OPERATORS["softmax"], rule=row("a b -> a b")))
    assert any("softmax" in line and "other values" in line for line in checked(program).wrong)
    found = outcome(program, settings.Setting("tp=2", {}), [(0, 0)])
    assert found.status == "wrong"


def test_a_program_is_the_same_each_time_and_shortened_to_what_fails() -> None:
    program = draw(3)
    assert program == draw(3) and program.runs()
    assert all(torch.equal(a, b) for a, b in zip(program.model().state_dict().values(), draw(3).model().state_dict().values(), strict=True))
    word = program.lines[0].split(" = ")[0]
    short = shortest(program, lambda p: any(line.startswith(f"{word} = ") for line in p.lines))
    assert len(short.lines) <= len(program.lines) and short.runs() and short.lines[0].startswith(word)
