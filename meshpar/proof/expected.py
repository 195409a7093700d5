"""What the original gives, and whether that can prove anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from meshpar._torch import without_modes
from meshpar.proof.differences import distance, gradient_floor, scalar_distance
from meshpar.proof.reference import (
    FLOOR,
    LEARNING_RATE,
    Reference,
    Task,
    wide,
)
from meshpar.proof.reference import reference as reference_of
from meshpar.proof.reference import unproved as unproved_by


@dataclass(frozen=True)
class Expected:
    """What is right, and how far rounding may carry from it."""

    right: Reference
    unproved: tuple[str, ...]
    silent: tuple[str, ...]
    """The parameters of which a comparison would prove nothing."""
    own: Mapping[str, Mapping[str, float]]
    """In bfloat16, quantity -> name -> how far that dtype alone carries the model on one device; else empty."""


def expectation(task: Task, device: torch.device) -> Expected:
    """The original on `device`, in the wanted dtype and in float64, and what can be said against it."""
    with without_modes():
        if task.dtype != torch.bfloat16:
            right = reference_of(task, device)
            return _judged(right, unproved_by(task, right, device), {}, task.tolerance)
        exact = wide(task)
        right = reference_of(exact, device)
        reasons = unproved_by(exact, right, device)
        own = {} if reasons else _own(reference_of(task, device, eps=right.eps), right, len(task.batches))
    if not reasons and median(own["gradients"].values()) * task.tolerance > 1:
        share = median(own["gradients"].values())
        reasons = (
            f"in bfloat16 alone the model on one device differs from float64 by {share:.0%} of its gradients: a mistake of that size "
            f"would not show. Compare in float64.",
        )
    return _judged(right, reasons, own, task.tolerance)


def _judged(right: Reference, reasons: tuple[str, ...], own: Mapping[str, Mapping[str, float]], tolerance: float) -> Expected:
    """With the parameters of which nothing is proved; most of them, and nothing is proved of the model."""
    if reasons:
        return Expected(right, reasons, (), own)
    sizes = {name: g.numel() for name, g in right.gradients.items() if g is not None and g.numel()}
    floor, units = gradient_floor(right), own.get("gradients", {})
    silent = tuple(name for name in sizes if _would_pass_without(right.gradients[name], floor, units.get(name, 1.0) * tolerance))
    if 4 * len(silent) > 3 * len(sizes):
        reasons = (
            f"most of the model is silent: the gradients of {few(silent)} ({len(silent)} of {len(sizes)} parameters) are zero on one "
            f"device, or too small beside the others to be missed. Give samples that reach them, or more of them.",
        )
    return Expected(right, reasons, silent, own)


def _would_pass_without(wanted: torch.Tensor | None, floor: float, tolerance: float) -> bool:
    """Whether a program that gave zeros for a gradient would pass."""
    assert wanted is not None
    return distance(torch.zeros_like(wanted), wanted, wanted, floor) <= tolerance


def few(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    return f"{', '.join(names[:3])} and {len(names) - 3} others" if len(names) > 4 else ", ".join(names)


def _own(low: Reference, right: Reference, steps: int) -> dict[str, dict[str, float]]:
    """What a narrow dtype does to the model by itself, for every quantity that is compared: the units of a comparison in it."""
    floor = gradient_floor(right)
    gradients = {}
    for name, wanted in right.gradients.items():
        found = low.gradients[name]
        if wanted is not None and found is not None:
            gradients[name] = distance(found, wanted, wanted, floor)
    parameters = {n: distance(low.parameters[n], p, p, LEARNING_RATE) for n, p in right.parameters.items()}
    every = {
        "loss": {f"step {i}": scalar_distance(torch.tensor(a), b) for i, (a, b) in enumerate(zip(low.losses, right.losses), 1)},
        "gradients": gradients,
        "gradient norm": {f"step {i}": scalar_distance(torch.tensor(a), b) for i, (a, b) in enumerate(zip(low.norms, right.norms), 1)},
        after(steps): parameters,
        "buffers": {n: distance(low.buffers[n], b, b, FLOOR) for n, b in right.buffers.items() if b.numel()},
    }
    return {quantity: _fair(values) for quantity, values in every.items()}


def _fair(own: Mapping[str, float]) -> dict[str, float]:
    """Units that are no luck: at least one rounding, and at least the median of their kind."""
    least = max(torch.finfo(torch.bfloat16).eps, median(own.values())) if own else 0.0
    return {name: max(value, least) for name, value in own.items()}


def after(steps: int) -> str:
    """The name of a quantity of the report."""
    return f"parameters after {steps} AdamW step{'s' if steps > 1 else ''}"
