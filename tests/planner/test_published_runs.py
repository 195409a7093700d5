"""The published runs as the benchmark reads them: FLOPs agree with the rates, and shipped constants with the accuracy that is claimed."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from benchmarks.planner_accuracy.runs import CSV, SOURCES, Run, baselines, load, wider
from benchmarks.planner_accuracy.scores import memory_errors, pairs, per_configuration
from meshpar.planner import Constants, check, flops_per_token

RUNS, LEFT = load()


def errors() -> np.ndarray:
    return np.array([run.estimate(Constants.default()).seconds / run.seconds - 1 for run in RUNS])


def test_every_row_is_a_run_or_says_why_not() -> None:
    with CSV.open() as file:
        rows = sum(1 for _ in csv.DictReader(file))
    assert {run.row for run in RUNS} | set(LEFT) == set(range(rows))
    assert len({run.row for run in RUNS}) >= 150
    for run in RUNS:
        check(run.job, run.mapping)


def _rates() -> list[tuple[int, Run, float]]:
    """Rows that state tokens/s and FLOP/s: what their FLOPs per token are."""
    by_row = {run.row: run for run in RUNS}
    found = []
    with CSV.open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            if number in by_row and row["tok_s_gpu"] and row["tflops_gpu"]:
                tokens, flops = (float(row[name].split(" (")[0]) for name in ("tok_s_gpu", "tflops_gpu"))
                found.append((number, by_row[number], flops * 1e12 / tokens))
    return found


@pytest.mark.parametrize("number, run, published", _rates(), ids=lambda value: str(value) if isinstance(value, int) else "")
def test_flops_per_token_are_those_of_the_published_rates(number: int, run: Run, published: float) -> None:
    convention = next(c for start, (_, c) in SOURCES.items() if run.source.startswith(start))
    rounding = 0.5e12 / (published * run.job.tokens / run.job.cluster.gpus / run.seconds)
    assert flops_per_token(run.job.model, run.job.seq, convention) == pytest.approx(published, rel=0.005 + rounding)  # type: ignore[arg-type]


def test_shipped_constants_are_as_near_as_the_readme_says() -> None:
    found = errors()
    dense, sparse = (list(per_configuration(RUNS, found, kind).values()) for kind in (False, True))
    assert np.median(dense) < 0.055 and np.quantile(dense, 0.9) < 0.17
    assert np.median(sparse) < 0.10 and np.quantile(sparse, 0.9) < 0.30
    needs = [abs(e) for _, e in memory_errors(RUNS, Constants.default())]
    assert np.median(needs) < 0.08 and np.quantile(needs, 0.9) < 0.15
    right, of = pairs(RUNS, found, same_cluster=False)
    assert right > 0.85 * of > 50


def test_baselines_that_no_fit_saw() -> None:
    """Fully sharded experts at 2 to 4 % of peak as well as pipelines of them at 40 %: the planner tells them apart."""
    off = [abs(run.estimate(Constants.default()).seconds / run.seconds - 1) for _, run in baselines()]
    assert len(off) == 22
    assert np.median(off) < 0.2 and max(off) < 0.45


def test_tensor_parallelism_over_ever_more_ranks_that_no_fit_saw() -> None:
    """From two ranks to four servers: 70 % of the last step is communication."""
    off = [run.estimate(Constants.default()).seconds / run.seconds - 1 for run in wider()]
    assert len(off) == 5
    assert all(-0.12 < e < 0.05 for e in off), off
