"""How far estimates are from published runs: per configuration, dense and with experts apart, sources left out of the fit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Map
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.planner_accuracy.runs import Run
from meshpar.planner.constants import PRIORS, Constants
from meshpar.planner.fit import FREE, Calibration, Measurement, error, fit


@dataclass(frozen=True)
class Scored:
    """Every run with its error under priors, under the fit of all, and under the fit of the other sources."""

    runs: Sequence[Run]
    whole: Calibration
    errors: Map[str, np.ndarray]
    """Name of the constants -> estimated / measured - 1 of every run."""


WAYS = {"priors": "priors, nothing fitted", "fit": "fitted on all", "left out": "fitted on the other sources"}


def source_of(run: Run) -> str:
    """What is left out together: a paper, a repository's page of one release."""
    return run.source.split(" Table")[0]


def scored(runs: Sequence[Run], worth: float = 1.0) -> Scored:
    """Fit, leave every source out, and compare. A source is worth at most so many observations: one, however many rows it has, since
    what one cluster and release deviate by, all its rows deviate by."""
    often = Counter(run.key for run in runs)
    of_source = Counter(source for source, _ in {(source_of(run), run.key) for run in runs})
    weights = [min(1.0, worth / of_source[source_of(run)]) / often[run.key] for run in runs]
    measurements = [
        Measurement(run.work(), run.job.cluster.hardware, run.job.software, run.seconds, weight, source_of(run))
        for run, weight in zip(runs, weights)
    ]
    whole = fit(measurements)
    without = {source: whole.without(source) for source in dict.fromkeys(map(source_of, runs))}
    errors = {
        "priors": [error(m, Constants.priors()) for m in measurements],
        "fit": list(whole.errors),
        "left out": [error(m, without[source_of(run)]) for m, run in zip(measurements, runs)],
    }
    return Scored(runs, whole, {name: np.expm1(np.array(values)) for name, values in errors.items()})


def per_configuration(runs: Sequence[Run], errors: np.ndarray, sparse: bool) -> dict[tuple[object, ...], float]:
    """The median absolute error of the runs of every configuration."""
    found: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run, e in zip(runs, errors):
        if run.sparse == sparse:
            found[run.key].append(abs(float(e)))
    return {key: float(np.median(values)) for key, values in found.items()}


def quantiles(values: Sequence[float]) -> str:
    """Median / 90th percentile, in percent."""
    return f"{100 * np.median(values):.1f} / {100 * np.quantile(values, 0.9):.1f}"


def spread(runs: Sequence[Run], errors: np.ndarray, sparse: bool) -> tuple[float, float]:
    """Measured / estimated, 10th and 90th percentile over configurations."""
    found: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for run, e in zip(runs, errors):
        if run.sparse == sparse:
            found[run.key].append(1 / (1 + float(e)))
    ratios = [float(np.median(values)) for values in found.values()]
    return float(np.quantile(ratios, 0.1)), float(np.quantile(ratios, 0.9))


def memory_errors(runs: Sequence[Run], constants: Constants) -> list[tuple[Run, float]]:
    """Runs whose memory was published, with estimated / published - 1."""
    return [(run, run.needs(constants) / run.published_memory - 1) for run in runs if run.published_memory]


def pairs(runs: Sequence[Run], errors: np.ndarray, *, same_cluster: bool) -> tuple[int, int]:
    """Of pairs of mappings of one model that differ by more than 10 % per GPU in the data: how many are in the right order, of how many.

    With `same_cluster` both on as many GPUs and with the same batch; else only on the same kind of GPU, in the same precision.
    """
    return tuple(map(sum, zip(*((right, 1) for right in _orders(runs, errors, same_cluster))))) or (0, 0)  # type: ignore[return-value]


def _orders(runs: Sequence[Run], errors: np.ndarray, same_cluster: bool) -> Iterator[bool]:
    rate = [run.job.tokens / run.job.cluster.gpus / run.seconds for run in runs]
    for a, b in _alike(runs, same_cluster):
        if max(rate[a], rate[b]) > 1.1 * min(rate[a], rate[b]):
            estimated = rate[a] / (1 + errors[a]), rate[b] / (1 + errors[b])
            yield (estimated[0] > estimated[1]) == (rate[a] > rate[b])


def _alike(runs: Sequence[Run], same_cluster: bool) -> Iterator[tuple[int, int]]:
    for a, b in combinations(range(len(runs)), 2):
        x, y = runs[a], runs[b]
        alike = (x.name, x.job.seq, x.job.cluster.hardware, x.job.dtype) == (y.name, y.job.seq, y.job.cluster.hardware, y.job.dtype)
        if not alike or x.mapping == y.mapping:
            continue
        if same_cluster and (x.job.cluster.gpus, x.job.batch) != (y.job.cluster.gpus, y.job.batch):
            continue
        yield a, b


def apart(runs: Sequence[Run], errors: np.ndarray, *, sparse: bool) -> tuple[float, int]:
    """By how much errors of two mappings of one model on one kind of GPU deviate from each other (the standard deviation of one of them,
    in the logarithm, by the median), and how many pairs say so. What is wrong with both alike moves no choice between them."""
    found = [abs(np.log1p(errors[a]) - np.log1p(errors[b])) for a, b in _alike(runs, False) if runs[a].sparse == runs[b].sparse == sparse]
    return float(np.median(found)) / 0.6745 / 2**0.5, len(found)


def constants_table(whole: Calibration) -> list[list[str]]:
    """Prior, fitted value and how sure, for every constant."""
    factors = whole.factors()
    rows = []
    for name, prior in PRIORS.items():
        fitted = f"{whole.constants[name]:.3g}, within x{factors[name]:.2f}" if name in FREE else "not fitted"
        rows.append([name, prior.meaning, f"{prior.value:.3g}, within x{prior.factor:.2f}", fitted, prior.source])
    return rows
