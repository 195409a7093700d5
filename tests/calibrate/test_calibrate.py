"""A machine is measured, and what the runtime takes beside kernels comes out of steps."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

import meshpar as mp
from meshpar.pipeline.schedule import order
from meshpar.pipeline.timing import Costs, simulate
from meshpar.planner import Hardware
from meshpar.planner.hardware import hardware
from meshpar.planner.measured import RUNTIME, Curve, Measured, rising
from tests.planner.test_measured import machine

package = importlib.import_module("meshpar.calibrate")
collectives = importlib.import_module("meshpar.calibrate.collectives")
kernels = importlib.import_module("meshpar.calibrate.kernels")
programs = importlib.import_module("meshpar.calibrate.programs")
crowd = importlib.import_module("meshpar.dry_run.crowd")
FEW = [one for one in package.SMALL if one.sizes is package.TINY][:2]


@pytest.fixture(scope="module")
def runs() -> list[mp.DryRun]:
    made = [package.SmallProgram(package.TINY, "dp=1", 2, 32), package.SmallProgram(package.DEEP, "dp=1", 4, 32, {"microbatches": 2})]
    made += [package.SmallProgram(package.TINY, "dp=2", 2, 32), package.SmallProgram(package.TINY, "pp=2", 4, 32, {"microbatches": 4})]
    return [one.predicted(machine()) for one in made]


def with_runtime(**constants: float) -> Hardware:
    part = machine()
    assert part.measured is not None
    return replace(part, measured=replace(part.measured, runtime={**dict.fromkeys(RUNTIME, 0.0), **constants}))


@pytest.mark.slow
def test_the_runtimes_share_comes_out_of_steps(runs: list[mp.DryRun]) -> None:
    """Steps made with known constants: the fit explains them, and gives the constants that these programs can tell apart back."""
    truth = with_runtime(call=3e-5, data=3e-4, action=1e-3, step=2e-3)
    found = programs.fitted(machine(), runs, [run.time_on(truth).seconds for run in runs])
    for run in runs:
        assert run.time_on(replace(machine(), measured=found)).seconds == pytest.approx(run.time_on(truth).seconds, rel=0.02)
    assert found.runtime["call"] == pytest.approx(3e-5, rel=0.2) and found.runtime["data"] == pytest.approx(3e-4, rel=0.2)
    assert found.spread == (0.95, 1.05)


def test_a_step_rises_with_what_the_runtime_takes(runs: list[mp.DryRun]) -> None:
    bare, more = machine(), with_runtime(call=1e-4)
    for run in runs:
        calls = sum(o.calls * n for s in run.workload.stages for layer, n in s.layers for o in layer.operators if o.phase == "forward")
        grown = run.time_on(more).seconds - run.time_on(bare).seconds
        assert grown > 0.9e-4 * calls / run.workload.ranks


def test_a_tape_names_every_kernel(runs: list[mp.DryRun]) -> None:
    names = {o.name for s in runs[0].workload.stages for layer, _ in s.layers for o in layer.operators}
    assert {"aten.mm", "aten.add", "aten.silu", "aten.native_layer_norm"} <= names
    assert "aten._unsafe_view" not in names  # a view


def test_ranks_of_a_pipeline_share_cores() -> None:
    one, costs = order("1f1b", 4, 4, 8), Costs(1.0, 1.0, 1.0, 0.1)
    own = machine().measured
    assert own is not None
    alone = max(event.end for event in simulate(one, costs) if event.kind in "FB")
    assert crowd.crowded(one, costs, replace(own, crowd=(1.0,) * 4), 1) == pytest.approx(alone)
    shared = crowd.crowded(one, costs, replace(own, crowd=(1.0, 1.0, 1.5, 2.0)), 1)
    assert max(alone, 4 * 8 * 3 / 2) < shared < 2 * alone


def test_what_was_disturbed_counts_as_what_is_larger() -> None:
    assert rising([(1, 5.0), (2, 2.0), (4, 3.0)]) == Curve((1.0, 2.0, 4.0), (2.0, 2.0, 3.0))


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it once, with few sizes and programs: a file that a dry run takes."""
    monkeypatch.setattr(kernels, "ELEMENTS", (2**10, 2**14))
    monkeypatch.setattr(kernels, "TOKENS", ((16, 32), (32, 64), (64, 64)))
    monkeypatch.setattr(kernels, "SEQUENCES", ((32, 2), (64, 4)))
    monkeypatch.setattr(collectives, "BYTES", (2**10, 2**17))
    monkeypatch.setattr(package, "SMALL", FEW)
    path, said = tmp_path / "here.json", []
    found = mp.calibrate(path, ranks=2, rounds=1, say=said.append)
    own = found.measured
    assert isinstance(own, Measured) and own.ranks == 2 and hardware(path) == found
    assert said == ["kernels", "1 ranks", "2 ranks", "steps of small programs"]
    assert {"all_reduce 2 of 2", "all_gather 2 of 2", "reduce_scatter 2 of 2", "all_to_all 2 of 2", "send 2 of 2"} == set(own.collectives)
    assert set(kernels.OPERATORS) | {"matrix fp32", "attention forward fp32", "attention backward fp32"} <= set(own.kernels)
    assert all(curve.seconds[-1] >= curve.seconds[0] > 0 for curve in (*own.kernels.values(), *own.collectives.values()))
    assert FEW[0].predicted(found).time.seconds > 0


@pytest.mark.parametrize(
    "more, message", [({"path": "here.toml"}, "ends in .json"), ({"ranks": 0}, "ranks=0"), ({"rounds": 1.5}, "rounds=1.5")]
)
def test_bad_input_is_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(mp.ConfigError, match=message):
        mp.calibrate(**more)  # type: ignore[arg-type]
