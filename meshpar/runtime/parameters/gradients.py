"""The norm of all gradients over every mesh axis, and clipping by it: exact for parameters on different meshes, in one collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import LocalTensor, flatten_mesh, local_of, local_tensor_mode, maybe_disable_local_tensor_mode, root_mesh
from meshpar.errors import ConfigError
from meshpar.roles import ROLES
from meshpar.runtime.parameters.specs import spec_of
from meshpar.sharding.types import Owned


class OnMesh(Iterator[torch.nn.Parameter]):
    """Parameters, perhaps none, and the mesh they are on."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter], mesh: DeviceMesh) -> None:
        self._parameters, self.mesh = parameters, mesh

    def __next__(self) -> torch.nn.Parameter:
        return next(self._parameters)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    mesh: DeviceMesh | None = None,
) -> torch.Tensor:
    """Scale all gradients so that their norm, taken over all of them as one vector, is at most `max_norm`; returns the norm before.

    Like `torch.nn.utils.clip_grad_norm_`, for DTensors and plain tensors in any mixture: every element counts once, however many ranks hold
    it. The result is a plain scalar, the same on every rank. Collective over `mesh`, by default the whole mesh the parameters' meshes are
    part of: all its ranks call it, also one without parameters (`pm.parameters()` knows its mesh even then; a list must be given `mesh`).

    Raises RuntimeError with `error_if_nonfinite` when the norm is infinite or not a number, ConfigError where there are several ranks, no
    parameters and no mesh.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    """
    found, mesh = _on_mesh(parameters, mesh, "clip_grad_norm_")
    total = grad_norm(found, norm_type, foreach=foreach, mesh=mesh)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is {total.item()}, so it cannot be clipped to {max_norm}. "
            f"Look for the first parameter whose mp.full_grad is not finite, or pass error_if_nonfinite=False."
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grads in _by_kind([local for local, _ in _local_grads(found)]):
        factor = scale.to(grads[0].device, grads[0].dtype)
        if foreach is False or isinstance(grads[0], LocalTensor):
            for grad in grads:
                grad.mul_(factor)
        else:
            torch._foreach_mul_(grads, factor)
    return total


@torch.no_grad()
def grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    *,
    foreach: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> torch.Tensor:
    """The norm of all gradients as one vector: a plain scalar, the same on every rank; nothing is clipped.

    With `norm_type=math.inf` the largest magnitude, which is finite if and only if all gradients are. Parameters, mesh and errors are those
    of `clip_grad_norm_`; collective like it.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> grad_norm([weight])
    tensor(5.)
    """
    if not norm_type > 0:
        raise ConfigError(f"norm_type={norm_type}: the order of a norm is a positive number or inf.")
    found, mesh = _on_mesh(parameters, mesh, "grad_norm")
    grads = _local_grads(p for p in found if not _is_copy(p))
    mesh = mesh or _common_mesh([p.device_mesh for p in found if isinstance(p, DTensor)])
    dtype = _result_dtype([local for local, _ in grads])
    if mesh is None:
        return _power([local for local, _ in grads], norm_type, foreach).pow(_root(norm_type)).to(dtype)
    if local_tensor_mode() is not None:
        return _simulated(grads, norm_type, mesh, dtype)
    counted = _counted(grads, mesh, _place(mesh, dist.get_rank()))
    device = next((local.device for local, _ in grads), torch.device(mesh.device_type))
    power = _power(counted, norm_type, foreach)
    sent = torch.stack([power, power.new_tensor(dtype is torch.float64)]).to(device)  # a rank without gradients learns their dtype
    if mesh.size() > 1:
        dist.all_reduce(sent, dist.ReduceOp.MAX if norm_type == inf else dist.ReduceOp.SUM, group=group_of(mesh))
    return sent[0].pow(_root(norm_type)).to(torch.float64 if sent[1] > 0 else dtype)


def _on_mesh(
    parameters: torch.Tensor | Iterable[torch.Tensor], mesh: DeviceMesh | None, caller: str
) -> tuple[list[torch.Tensor], DeviceMesh | None]:
    """The parameters, and the mesh they are on as far as it is told."""
    if not isinstance(parameters, Iterable) or isinstance(parameters, nn.Module):
        raise ConfigError(
            f"{caller} of a {type(parameters).__name__}: it takes parameters, as in mp.{caller}(pm.parameters()"
            f"{', 1.0' if caller.startswith('clip') else ''})."
        )
    if isinstance(parameters, OnMesh):
        mesh = mesh or parameters.mesh
    found = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if not found and mesh is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"{caller}: no parameters on this rank, so the mesh over which the norm is taken is not known, and the other ranks would "
            f"wait for this one. Pass mesh=pm.mesh, or pm.parameters() as it is."
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    if found and several and all(p.grad is None and not isinstance(p, DTensor) for p in found):
        raise ConfigError(
            f"{caller}: none of these {len(found)} parameters has a gradient. If they are those of the model given to parallelize: "
            f"pm.train_step trains pm.parameters()."
        )
    return found, mesh


def _owned_on(parameter: torch.Tensor) -> tuple[str, ...]:
    """The axes of which one rank alone has the parameter."""
    spec = spec_of(parameter)
    return () if spec is None else tuple(name for name, type_ in spec.placements.items() if isinstance(type_, Owned))


def _is_copy(parameter: torch.Tensor) -> bool:
    spec = spec_of(parameter)
    return spec is not None and spec.is_copy


Layout = tuple[DeviceMesh, tuple[bool, ...]] | None
"""Where a gradient lies: its mesh and, per mesh dim, whether the dim cuts it. None for a plain tensor, which every rank holds."""


def _local_grads(parameters: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, Layout]]:
    grads: list[tuple[torch.Tensor, Layout]] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if not isinstance(grad, DTensor):
            grads.append((grad, None))
            continue
        if any(p.is_partial() for p in grad.placements):
            raise ConfigError(
                f"a gradient of shape {tuple(grad.shape)} is a pending sum ({grad.placements}): reduce it before taking its norm."
            )
        owned = _owned_on(parameter)
        names = grad.device_mesh.mesh_dim_names or ()
        cuts = tuple(not p.is_replicate() or name in owned for name, p in zip(names, grad.placements, strict=True))
        grads.append((local_of(grad), (grad.device_mesh, cuts)))
    return grads


def _common_mesh(meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """The mesh that all these are part of."""
    with maybe_disable_local_tensor_mode():
        return max((root_mesh(mesh) for mesh in meshes), key=lambda mesh: mesh.size(), default=None)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The process group of all ranks of a mesh."""
    if mesh.size() == dist.get_world_size():
        return None  # the default group: all ranks
    return mesh.get_group() if mesh.ndim == 1 else flatten_mesh(mesh, "_".join(mesh.mesh_dim_names or ())).get_group()


def _counted(grads: Sequence[tuple[torch.Tensor, Layout]], mesh: DeviceMesh, place: Sequence[int]) -> list[torch.Tensor]:
    """The gradients that the rank at `place` of `mesh` counts. (Most have one of a few layouts.)"""
    known: dict[object, bool] = {}
    found = []
    for local, layout in grads:
        kind = None if layout is None else (id(layout[0]), tuple(layout[1]))
        if kind not in known:
            known[kind] = _counts_here(layout, mesh, place)
        if known[kind]:
            found.append(local)
    return found


def _counts_here(layout: Layout, mesh: DeviceMesh, place: Sequence[int]) -> bool:
    """Whether the rank at `place` of `mesh` is the one that counts a gradient: the first of those that hold the same part.

    Axes that cut the gradient hold different parts; of the others, except pipeline stages, only coordinate 0 counts.
    """
    names = mesh.mesh_dim_names or ()
    if layout is None:
        return all(place[d] == 0 for d in range(mesh.ndim) if not names or ROLES[names[d]].typed)
    own, cuts = layout
    rank = int(mesh.mesh[tuple(place)])
    if any(c != 0 for c, cut in zip(_place(own, rank), cuts, strict=True) if not cut):
        return False
    mine = own.mesh.flatten()
    for d in range(mesh.ndim):
        line: list[int | slice] = [*place[:d], slice(None), *place[d + 1 :]]
        outside = not bool(torch.isin(mesh.mesh[tuple(line)], mine).all())
        if outside and place[d] != 0 and (not names or ROLES[names[d]].typed):
            return False
    return True


def _place(mesh: DeviceMesh, rank: int) -> tuple[int, ...]:
    return tuple(int(i) for i in (mesh.mesh == rank).nonzero()[0].tolist())


def _power(grads: Sequence[torch.Tensor], norm_type: float, foreach: bool | None) -> torch.Tensor:
    """The sum of |g|^p over all elements, or the largest |g|, in float64: what may be added up (compared) between ranks."""
    filled = [grad.to(torch.float32) if grad.dtype.itemsize < 4 else grad for grad in grads if grad.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64)
    norm = torch.nn.utils.get_total_norm(filled, norm_type, foreach=foreach)
    return norm.to(torch.float64) if norm_type == inf else norm.to(torch.float64).pow(norm_type)


def _root(norm_type: float) -> float:
    return 1.0 if norm_type == inf else 1.0 / norm_type


def _simulated(grads: Sequence[tuple[torch.Tensor, Layout]], norm_type: float, mesh: DeviceMesh, dtype: torch.dtype) -> torch.Tensor:
    """The same for gradients that hold all ranks' parts."""
    with maybe_disable_local_tensor_mode():
        powers = []
        for rank in mesh.mesh.flatten().tolist():
            place = _place(mesh, rank)
            counted = _counted(grads, mesh, place)
            parts = [local._local_tensors[rank] if isinstance(local, LocalTensor) else local for local in counted]
            powers.append(_power(parts, norm_type, None))
        total = torch.stack(powers)
        return (total.max() if norm_type == inf else total.sum()).pow(_root(norm_type)).to(dtype)


def _result_dtype(grads: Sequence[torch.Tensor]) -> torch.dtype:
    dtype = torch.float32
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype.to_real())
    return dtype


def _by_kind(grads: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(kinds.values())
