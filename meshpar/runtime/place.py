"""Give every rank its part of every parameter: modules are built without memory, data parallelism cuts them, then each part is filled.

    spec (tp layout) ──> empty DTensor on meta ──> fully_shard ──> memory for this rank's part only ──> read(ranges of the part)

No rank ever holds a whole model; from a safetensors file it reads only the bytes of its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshpar._torch import part_here
from meshpar.init.weights import Lazy, Ranges, read
from meshpar.runtime.blocks import Tree
from meshpar.runtime.parameters.specs import ParameterSpec, distribute, spec_of, to_parameter
from meshpar.sharding.types import chunk
from meshpar.simulate import is_simulated


def empty(spec: ParameterSpec, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter over `mesh` without memory, laid out as `spec` says."""
    axes = {name: (mesh.size(d), mesh.get_local_rank(d)) for d, name in enumerate(mesh.mesh_dim_names or ())}
    return to_parameter(torch.empty(spec.local_shape(axes), dtype=spec.dtype, device="meta"), spec, mesh)


def whole(value: torch.Tensor | Lazy, spec: ParameterSpec, mesh: DeviceMesh) -> nn.Parameter:
    """The parameter of simulated ranks, which all live in this process."""
    return distribute(read(value).to(mesh.device_type), spec, mesh)


@torch.no_grad()
def allocate(tree: Tree, device: str) -> None:
    """Memory for this rank's part of every parameter; buffers, which have theirs, keep their values."""
    saved = {name: buffer.clone() for name, buffer in tree.named_buffers() if not buffer.is_meta}
    tree.to_empty(device=device)
    for name, buffer in tree.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


@torch.no_grad()
def fill(parameter: nn.Parameter, value: torch.Tensor | Lazy) -> None:
    """Copy this rank's part of a whole tensor, or of one in a file, into the parameter."""
    local = part_here(parameter)
    if local.numel():
        local.copy_(read(value, part_of(parameter)))


def share_of(parameter: torch.Tensor) -> Ranges:
    """`part_of`, also where that is nothing."""
    local = part_here(parameter)
    return part_of(parameter) if local.numel() or not parameter.dim() else [(0, 0, 0)]


def part_of(parameter: torch.Tensor) -> Ranges:
    """Which ranges of the whole tensor this rank holds, as (dim, start, stop).

    Its layout cuts first, data parallelism cuts what is left.
    """
    spec = spec_of(parameter)
    assert spec is not None and isinstance(parameter, DTensor) and not is_simulated()
    mesh = parameter.device_mesh
    at = mesh.get_coordinate() or [0] * mesh.ndim
    held: list[list[tuple[int, int]]] = [[(0, n)] for n in spec.shape]
    for d, name in enumerate(mesh.mesh_dim_names or ()):
        type_ = dict(spec.shards()).get(name)
        if type_ is not None:
            held[type_.dim] = _within(held[type_.dim], type_.ranges(mesh.size(d), at[d]))
    for d, name in enumerate(mesh.mesh_dim_names or ()):
        placement = parameter.placements[d]
        dim = getattr(placement, "dim", None)
        if dim is not None and name not in dict(spec.shards()):
            length = sum(b - a for a, b in held[dim])
            held[dim] = _within(held[dim], [chunk(length, mesh.size(d), at[d])])
    return [(dim, a, b) for dim, ranges in enumerate(held) for a, b in ranges if ranges != [(0, spec.shape[dim])]]


def _within(held: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of the whole that lie at `ranges` of what is held."""
    found, base = list[tuple[int, int]](), 0
    for start, stop in held:
        for low, high in ranges:
            a, b = max(low, base), min(high, base + stop - start)
            if a < b:
                found.append((start + a - base, start + b - base))
        base += stop - start
    return sorted(found)
