"""What this rank holds of a tensor: its local part, and the runs of every dim that part is made of, for any DTensor layout.

The layout attached to a parameter (`runtime.parameters.specs`) decides, else the DTensor's placements. Optimizer state carries no layout
of its own: `held(state, like=parameter)` gives it the parameter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from meshpar._torch import LocalTensor, StridedShard, local_of
from meshpar.checkpoint.format.boxes import Box, Cut, Run, Runs, local_shape, runs_of
from meshpar.checkpoint.format.casts import TORCH_DTYPES, Array, word
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.errors import CheckpointError, ConfigError
from meshpar.roles import ROLES
from meshpar.runtime.parameters.specs import ParameterSpec, is_exact, spec_of
from meshpar.runtime.parameters.tensors import is_whole
from meshpar.sharding.types import Shard, plain

Step = tuple[str, Shard, int, int]
"""One cut of a tensor: axis, layout, size, this rank's coordinate."""


@dataclass(frozen=True)
class Held:
    """A rank's part of a tensor of global `shape`. `cuts` are for the record; `is_plain` if every rank should hold the same."""

    local: torch.Tensor
    shape: tuple[int, ...]
    runs: Runs
    cuts: tuple[Cut, ...] = ()
    is_plain: bool = False

    @property
    def dtype(self) -> str:
        """The safetensors name of its dtype."""
        return _stored_dtype(self.local.dtype)

    def words(self, *, copy: bool = False) -> Array:
        """The local part as unsigned words in host memory; the tensor's own memory where that is possible and `copy` does not forbid it."""
        local = self.local.clone() if copy and self.local.device.type == "cpu" else self.local
        flat = local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return flat.view(word(self.dtype)).reshape(tuple(self.local.shape))

    def slices(self, box: Box) -> tuple[slice, ...]:
        """Where a box lies in the local part, whose dims are the runs put side by side."""
        return tuple(slice(at, at + size) for at, size in zip(map(_place, box.offset, self.runs), box.size, strict=True))


@lru_cache
def _stored_dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise CheckpointError(f"Tensors of dtype {name} cannot be stored; {', '.join(TORCH_DTYPES)} can.")
    return TORCH_DTYPES[name]


def held(tensor: torch.Tensor | Held, *, like: torch.Tensor | None = None) -> Held:
    """What this rank holds of a tensor. `like`: the parameter whose state it is.

    Raises CorruptError when the local tensor has not the shape that the layout says.
    """
    if isinstance(tensor, Held):
        return tensor
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        _check_real(tensor)
        return Held(tensor.detach(), shape, tuple(runs_of(n, []) for n in shape), is_plain=True)
    _check_real(local_of(tensor))
    spec = None if is_whole(tensor) else spec_of(tensor if like is None else like)
    if spec is not None and shape != spec.shape:
        runs, steps = _factored(tensor, spec), []
    else:
        steps = cuts_of(tensor, spec)
        runs = _runs(shape, steps)
    found = Held(local_of(tensor).detach(), shape, runs, tuple(Cut(axis, shard) for axis, shard, _, _ in steps if axis in ROLES))
    if local_shape(runs) != tuple(found.local.shape):
        raise CorruptError(
            f"The placements {tensor.placements} of a tensor {list(shape)} say that this rank holds {list(local_shape(runs))} of it, "
            f"but its local tensor is {list(found.local.shape)}."
        )
    return found


def cuts_of(tensor: DTensor, spec: ParameterSpec | None) -> list[Step]:
    """The cuts of a tensor in the order they apply.

    A `_StridedShard` beside later axes on the same dim, whose sizes multiply to its split factor, is FSDP over TP: those axes cut first.
    A lone one is a row of equal segments, each of them cut.
    """
    mesh, rows = tensor.device_mesh, list(_axes(tensor))
    if spec is not None:
        place = {name: (size, rank) for name, _, size, rank in rows}
        known = [(axis, shard, *place[axis]) for axis, shard in spec.shards() if axis in place]
        own = dict(spec.shards())
        return known + [(n, plain(p.dim % tensor.ndim, tensor.shape[p.dim]), s, r) for n, p, s, r in rows if _is_cut(p) and n not in own]
    late: list[Step] = []
    out: list[Step] = []
    for k, (name, p, size, rank) in enumerate(rows):
        if not _is_cut(p):
            continue
        dim = p.dim % tensor.ndim
        length = int(tensor.shape[dim])
        if isinstance(p, StridedShard):
            after = [mesh.size(j) for j in range(k + 1, mesh.ndim) if _cuts(tensor.placements[j], dim, tensor.ndim)]
            parts = int(p.split_factor)
            if after and prod(after) == parts:
                late.append((name, plain(dim, length), size, rank))
            else:
                out.append((name, Shard(dim, parts, ((length // parts, 1),)), size, rank))
            continue
        out.append((name, plain(dim, length), size, rank))
    return out + late[::-1]


def _factored(tensor: DTensor, spec: ParameterSpec) -> Runs:
    """The runs of state whose shape is not its parameter's, such as row and column statistics.

    Where the parameter's placement does not tell its order, torch computes such state in the order of the ranks' local parts, one after the
    other: that is the order of its runs here.
    """
    dims = [runs for runs in _runs(tuple(tensor.shape), cuts_of(tensor, None))]
    sizes = {name: size for name, _, size, _ in _axes(tensor)}
    for axis, shard in spec.shards():
        size, dim = sizes.get(axis, 1), shard.dim
        if is_exact(shard, size) or tensor.ndim != len(spec.shape) or tensor.shape[dim] != spec.shape[dim]:
            continue
        if any(_cuts(p, dim, tensor.ndim) for p in tensor.placements) or sum(s.dim == dim for _, s in spec.shards()) > 1:
            raise CheckpointError(
                f"The state {list(tensor.shape)} of {spec.fqn} {list(spec.shape)} lies in an order that torch cannot name and that is cut "
                f"again along dim {dim}; it cannot be stored. Use an optimizer whose state has its parameter's shape for it."
            )
        dims[dim] = tuple(run for rank in range(size) for run in runs_of(spec.shape[dim], [(shard, size, rank)]))
    return tuple(dims)


def _runs(shape: Sequence[int], steps: Sequence[Step]) -> Runs:
    on_dim: list[list[tuple[Shard, int, int]]] = [[] for _ in shape]
    for _, shard, size, rank in steps:
        on_dim[shard.dim].append((shard, size, rank))
    return tuple(runs_of(int(n), row) for n, row in zip(shape, on_dim, strict=True))


def _axes(tensor: DTensor) -> Iterator[tuple[str, Any, int, int]]:
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or tuple(f"axis{k}" for k in range(mesh.ndim))
    for k, p in enumerate(tensor.placements):
        yield names[k], p, mesh.size(k), mesh.get_local_rank(k)


def _is_cut(placement: Any) -> bool:
    if placement.is_partial():
        raise ConfigError("A tensor with a pending sum cannot be saved or loaded; reduce it first.")
    return not placement.is_replicate()


def _cuts(placement: Any, dim: int, ndim: int) -> bool:
    return _is_cut(placement) and placement.dim % ndim == dim


def _check_real(tensor: torch.Tensor) -> None:
    if isinstance(tensor, LocalTensor):
        raise ConfigError("Simulated ranks cannot save or load; run real ones, or take mp.full_tensor of each parameter.")
    if tensor.is_meta:
        raise ConfigError("A tensor on the meta device has no values to save, and no memory to load into.")


def _place(start: int, row: Sequence[Run]) -> int:
    base = 0
    for a, b in row:
        if a <= start < b:
            return base + start - a
        base += b - a
    raise CheckpointError(f"position {start} is not among the runs {list(row)}")


def from_words(bits: Array, local: torch.Tensor) -> torch.Tensor:
    """Words of a local part as a tensor of its dtype, in host memory."""
    return torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(np.uint8)).view(local.dtype).reshape(local.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors one."""
    return next(getattr(torch, known) for known, code in TORCH_DTYPES.items() if code == name)
