"""A few constants from measured steps: least squares on the logarithm, held near their priors; and a scale from a single step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from meshpar.errors import ConfigError
from meshpar.planner.constants import PRIORS, Constants
from meshpar.planner.cost import Memo, rates, timed
from meshpar.planner.hardware import Hardware
from meshpar.planner.stack import Stack
from meshpar.planner.workload import Workload

FREE = (
    *("matrix volta", "matrix ampere", "matrix hopper", "matrix hopper fp8", "matrix blackwell fp8"),
    *("nic", "exposed ep", "moe 2025", "power"),
)
"""What is fitted: nine. With the 13 others that published runs say something about, sources that were left out came out worse."""
NOISE = 0.06
"""Standard deviation of ln(measured / estimated) that a good model would leave: the data's own is 0.03 to 0.08."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """A step that somebody timed."""

    work: Workload
    hardware: Hardware
    stack: Stack
    seconds: float
    weight: float = 1.0
    """Less than 1 for a configuration measured several times."""
    group: Hashable = ""
    """What is left out together."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted constants, and how errors change with them."""

    constants: Constants
    measurements: tuple[Measurement, ...]
    free: tuple[str, ...]
    errors: np.ndarray
    """ln(estimated / measured) of every measurement."""
    slopes: np.ndarray
    """[measurements, constants]: change of an error per standard deviation of a constant's prior."""
    position: np.ndarray
    """Of every constant, in standard deviations from its prior."""

    def factors(self) -> dict[str, float]:
        """By what factor each constant may still be off (one standard deviation, from the curvature)."""
        scaled = self.slopes * np.sqrt([m.weight for m in self.measurements])[:, None] / NOISE
        sigma = np.sqrt(np.diag(np.linalg.inv(scaled.T @ scaled + np.eye(len(self.free)))))
        return {name: exp(s * log(PRIORS[name].factor)) for name, s in zip(self.free, sigma)}

    def without(self, group: Hashable) -> Constants:
        """The constants that all measurements but those of a group give, from the slopes at the whole fit."""
        keep = np.array([m.group != group for m in self.measurements])
        return _at(self.constants, self.free, _settle(self, keep))


def fit(measurements: Sequence[Measurement], free: Sequence[str] = FREE, start: Constants | None = None, *, rounds: int = 4) -> Calibration:
    """The constants in `free` that explain the measurements best, pulled to their priors. Outliers hardly count (Cauchy).

    Every round takes slopes by differences and solves with them. Raises `ConfigError` for no measurements and for unknown names.
    """
    if not measurements:
        raise ConfigError("fit: no measurements. Give at least one; with a single one, `scaled` is what you want.")
    start = (start or Constants.priors()).changed({})
    start.changed(dict.fromkeys(free, 1.0))
    position = np.array([log(start[name] / PRIORS[name].value) / log(PRIORS[name].factor) for name in free])
    for _ in range(rounds):
        here = _slopes(measurements, tuple(free), start, position)
        position = _settle(here, np.ones(len(measurements), bool))
    return _slopes(measurements, tuple(free), start, position)


def error(measurement: Measurement, constants: Constants, *, simulate: bool = True) -> float:
    """ln(estimated / measured) of a step's time."""
    m = measurement
    return log(timed(m.work, rates(m.hardware, m.stack, constants), Memo(), simulate=simulate).seconds / m.seconds)


def scaled(measurement: Measurement, constants: Constants) -> float:
    """The factor by which one measured step is slower than estimated: multiply other estimates of the same program and cluster by it."""
    return exp(-error(measurement, constants))


def _at(start: Constants, free: Sequence[str], position: np.ndarray) -> Constants:
    return start.changed({name: PRIORS[name].value * PRIORS[name].factor ** float(x) for name, x in zip(free, position)})


def _slopes(
    measurements: Sequence[Measurement], free: tuple[str, ...], start: Constants, position: np.ndarray, step: float = 0.3
) -> Calibration:
    """Errors by simulation; their slopes, which the order of a pipeline hardly changes, by the closed form."""

    def errors(where: np.ndarray, simulate: bool) -> np.ndarray:
        constants = _at(start, free, where)
        return np.array([error(m, constants, simulate=simulate) for m in measurements])

    now, closed = errors(position, True), errors(position, False)
    slopes = np.stack([(errors(position + step * unit, False) - closed) / step for unit in np.eye(len(free))], axis=1)
    return Calibration(_at(start, free, position), tuple(measurements), free, now, slopes, position)


def _settle(here: Calibration, keep: np.ndarray) -> np.ndarray:
    """Least Cauchy loss of linearised errors plus squares of the distance from the priors, by reweighting; at most 1.5 away."""
    weights = np.array([m.weight for m in here.measurements]) * keep
    slopes, begin = here.slopes / NOISE, here.errors / NOISE
    move = np.zeros(len(here.free))
    for _ in range(30):
        w = weights / (1 + (begin + slopes @ move) ** 2 / 4)
        left = slopes.T @ (w[:, None] * slopes) + np.eye(len(move))
        move = np.clip(np.linalg.solve(left, -(slopes.T @ (w * begin) + here.position)), -1.5, 1.5)
    return np.asarray(here.position + move)
