"""How far a parallel program's gradients, parameters and buffers are from the original's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch.distributed.tensor import DTensor

from meshpar._torch import local_of, maybe_disable_local_tensor_mode
from meshpar.proof.reference import (
    FLOOR,
    LEARNING_RATE,
    Reference,
)
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.specs import full_grad, full_tensor, local_part, spec_of
from meshpar.simulate import is_simulated, local_tensors


@dataclass(frozen=True)
class Differences:
    """Quantity -> name -> relative difference."""

    values: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


def gradient_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    """How far the gradient of every parameter is from the original's, relative to its largest element."""
    floor = gradient_floor(reference)
    found = {}
    for name, parameter in pm.named_parameters():
        wanted, grad = reference.gradients[name], parameter.grad
        if grad is None:  # torch leaves gradients out where they are zero because nothing depends on a parameter
            found[name] = 0.0 if wanted is None or not wanted.any() else inf
            continue
        wanted = torch.zeros_like(reference.parameters[name]) if wanted is None else wanted
        found[name] = max(distance(a, b, wanted, floor) for a, b in _pairs(grad, parameter, wanted, full_grad))
    return found


def gradient_floor(reference: Reference) -> float:
    """What gradients are compared with that are zero but for rounding."""
    return FLOOR * max((g.abs().max().item() for g in reference.gradients.values() if g is not None and g.numel()), default=0.0)


def parameter_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    """The same for parameters after the optimizer's steps."""
    found = {}
    for name, parameter in pm.named_parameters():
        wanted = reference.parameters[name]
        found[name] = max(distance(a, b, wanted, LEARNING_RATE) for a, b in _pairs(parameter, parameter, wanted, full_tensor))
    return found


def buffer_distances(pm: ParallelModel, reference: Reference) -> dict[str, float]:
    """The same for buffers."""
    found = {}
    unsaved = {f"{path}.{name}".lstrip(".") for path, module in pm.named_modules() for name in module._non_persistent_buffers_set}
    for name, buffer in pm.named_buffers():
        wanted = reference.buffers.get(name)
        remade = wanted is not None and wanted.shape != buffer.shape and name in unsaved
        if wanted is not None and wanted.numel() and not remade:  # (a table that grew is no state: it is made again in every forward)
            found[name] = max(distance(local, wanted, wanted, FLOOR) for local in local_tensors(buffer).values())
    return found


def _pairs(
    tensor: torch.Tensor, parameter: torch.Tensor, wanted: torch.Tensor, whole: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(What is there, what should be): this rank's whole, or every simulated rank's own part, so that no copy goes unseen."""
    if not is_simulated():
        full = whole(parameter)
        assert full is not None
        yield full, wanted
        return
    spec = spec_of(parameter)
    assert isinstance(parameter, DTensor) and isinstance(tensor, DTensor) and spec is not None
    parts = local_tensors(local_of(tensor))
    with maybe_disable_local_tensor_mode():
        grid = parameter.device_mesh.mesh
        names = parameter.device_mesh.mesh_dim_names or ()
        for place in torch.ones_like(grid).nonzero().tolist():
            axes = {name: (grid.shape[d], place[d]) for d, name in enumerate(names)}
            yield parts[int(grid[tuple(place)])], local_part(wanted, spec, axes)


@torch.no_grad()
def distance(a: torch.Tensor, b: torch.Tensor, whole: torch.Tensor, floor: float) -> float:
    """max|a - b| / (max|whole| + floor); infinite for other shapes and for what is not a number."""
    with maybe_disable_local_tensor_mode():
        if a.shape != b.shape:
            return inf
        if not a.numel():
            return 0.0
        a, b, whole = (torch.view_as_real(x).double() if x.is_complex() else x.double() for x in (a, b, whole))
        scale = whole[whole.isfinite()].abs().amax().item() + floor if whole.isfinite().any() else floor
        largest = torch.where(a == b, 0.0, a - b).abs().max().item()  # infinities that agree agree: masks are full of them
        return largest / scale if largest < inf and scale else (0.0 if largest == 0 else inf)


def scalar_distance(value: torch.Tensor, wanted: float) -> float:
    """The same for a number, on the rank where it is largest."""
    there = torch.tensor(wanted, dtype=torch.float64)
    return max(distance(local.cpu().reshape(()), there, there, FLOOR) for local in local_tensors(value).values())


def in_units(values: Mapping[str, float], own: Mapping[str, float] | None) -> Mapping[str, float]:
    """Distances in units of the model's own rounding, where it is known."""
    return values if not own else {name: value / own[name] if name in own else value for name, value in values.items()}


def merged(found: Sequence[Differences]) -> Differences:
    """The largest difference of any rank; ranks of a pipeline hold different parameters."""
    largest: dict[str, dict[str, float]] = {}
    for one in found:
        for quantity, values in one.values.items():
            own = largest.setdefault(quantity, {})
            own.update({name: max(value, own.get(name, 0.0)) for name, value in values.items()})
    return Differences(largest, tuple(dict.fromkeys(note for one in found for note in one.notes)))


def complete(found: Differences, reference: Reference) -> Differences:
    """A parameter that no rank has is lost."""
    for quantity, values in found.values.items():
        if quantity.startswith(("gradients", "parameters")):
            found = replace(found, values={**found.values, quantity: {**dict.fromkeys(reference.parameters, inf), **values}})
    return found
