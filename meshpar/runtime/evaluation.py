"""The loss over many batches, weighed by what each batch's loss is the mean over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import resolve_process_group
from meshpar.errors import BatchError, ConfigError
from meshpar.mesh import data_axis
from meshpar.simulate import is_simulated


def evaluate(
    step: Callable[..., torch.Tensor], batches: Iterable[Mapping[str, Any]], weight: Callable[[Any], Any], mesh: DeviceMesh
) -> float:
    """`step(**batch)` is the loss of a global batch; `weight(batch)` counts in this rank's part of it.

    Raises BatchError on every rank where data ranks have unequal numbers of batches, or nothing counts.
    """
    if is_simulated():
        raise ConfigError("evaluate gives one number on every rank, and simulated ranks have values of their own: use pm.eval_step.")
    total, count, rest = 0.0, 0.0, iter(batches)
    while True:
        batch = next(rest, None)
        own = 0.0 if batch is None else float(weight(batch))
        ended, counted, ranks = _summed([batch is None, own, 1.0], mesh)
        if 0 < ended < ranks:
            raise BatchError(f"{ended:.0f} of {ranks:.0f} data ranks have no more batches, and others have: give all equally many.")
        if batch is None:
            break
        loss = step(**batch).item()
        total, count = total + (loss * counted if counted else 0.0), count + counted
    if not count:
        raise BatchError("evaluate: weight(batch) was 0 for every batch, so that there is nothing to take a mean over.")
    return total / count


def _summed(numbers: list[float], mesh: DeviceMesh) -> list[float]:
    """Sums over the data ranks."""
    axis, summed = data_axis(mesh), torch.tensor(numbers, dtype=torch.float64, device=mesh.device_type)
    if axis.size > 1:
        dist.all_reduce(summed, group=resolve_process_group(axis.group))
    found: list[float] = summed.tolist()
    return found
