"""Parameters as they are laid out over the mesh: what a rank holds of each, its DTensor, and the way back to the original order.

torch's placements express most layouts: `Shard` a contiguous one, `_StridedShard` equal stretches (gate | up, q | k | v of one size). Two
they cannot: segments of several sizes (q | k | v with fewer key and value heads), and chunks that keep units whole where torch would cut
them (3 heads over 2 ranks). Such a parameter is a DTensor of the right global shape and the right local tensor whose `Shard` placement does
not tell the order of its elements: fine for optimizers and norms, wrong for `DTensor.full_tensor()`. So every parameter carries its
`ParameterSpec`, and

    full_tensor(p), full_grad(p)        give the original order for every layout, also under FSDP2 (collective over the parameter's mesh)
    convert_state_dicts(module)         makes state_dict() give true DTensors instead, and load_state_dict() accept them and whole tensors
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as ReplicatePlacement
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement

from meshpar._torch import LocalTensor, StridedShard, as_parameter, dtensor_like, local_of, maybe_disable_local_tensor_mode
from meshpar.errors import StateDictError, raise_all
from meshpar.init.same import difference_of_dtensors
from meshpar.sharding.types import Shard, Type, chunk, local_shape
from meshpar.simulate import is_simulated, per_rank

Coordinates = Mapping[str, tuple[int, int]]
"""Axis name -> (size, rank), outermost first."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter and its layout: `placements` maps axis names to types (axes it does not name hold the parameter as it is).

    Two axes that shard are nested: the later axis cuts what the earlier one left.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    placements: Mapping[str, Type]
    is_copy: bool = False
    """Whether an earlier stage of the pipeline, on another rank, holds it too: that one counts it in norms."""

    def shards(self) -> tuple[tuple[str, Shard], ...]:
        """The axes that cut this parameter, and how."""
        return tuple((name, type_) for name, type_ in self.placements.items() if isinstance(type_, Shard))

    def local_shape(self, axes: Coordinates) -> tuple[int, ...]:
        """What the rank at `axes` holds."""
        shape = self.shape
        for name, type_ in self.shards():
            shape = local_shape(shape, type_, *axes.get(name, (1, 0)))
        return shape


def local_part(full: torch.Tensor, spec: ParameterSpec, axes: Coordinates) -> torch.Tensor:
    """The part of `full` that the rank at `axes` holds: a contiguous tensor that shares no memory with `full` if it is cut.

    >>> spec = ParameterSpec("w", (4,), torch.int64, False, {"tp": Shard(0, 1, ((2, 1), (2, 1)))})
    >>> local_part(torch.arange(4), spec, {"tp": (2, 1)})
    tensor([1, 3])
    """
    for name, type_ in spec.shards():
        if name in axes:
            full = _take(full, type_, *axes[name])
    return full.contiguous()


def to_dtensor(local: torch.Tensor, spec: ParameterSpec, mesh: DeviceMesh) -> DTensor:
    """The DTensor of global shape `spec.shape` over `mesh` whose local tensor is `local` (not copied; in simulation, of every rank)."""
    names = mesh.mesh_dim_names or ()
    placements = [placement(spec.placements.get(name), size) for name, size in zip(names, mesh.shape, strict=True)]
    tensor = DTensor.from_local(
        local.detach(), mesh, placements, run_check=False, shape=torch.Size(spec.shape), stride=_strides(spec.shape)
    )
    return mark(tensor, spec)


def to_parameter(local: torch.Tensor, spec: ParameterSpec, mesh: DeviceMesh) -> nn.Parameter:
    """`to_dtensor` as a parameter."""
    return as_parameter(to_dtensor(local, spec, mesh), spec.requires_grad)


def distribute(full: torch.Tensor, spec: ParameterSpec, mesh: DeviceMesh) -> nn.Parameter:
    """The parameter over `mesh` of a full tensor that every rank has; on the simulated ranks too."""
    return to_parameter(_each_rank(mesh, lambda axes, whole: local_part(whole, spec, axes), full.detach()), spec, mesh)


def placement(type_: Type | None, size: int) -> Placement:
    """torch's placement for a type over `size` ranks; for a layout torch cannot express, the nearest one (see `is_exact`)."""
    if not isinstance(type_, Shard):
        return ReplicatePlacement()
    stretches = _stretches(type_)
    if stretches > 1 and _is_equal(type_) and type_.is_even(size) and size > 1:
        return StridedShard(type_.dim, split_factor=stretches)
    return ShardPlacement(type_.dim)


def is_exact(type_: Type | None, size: int) -> bool:
    """Whether `placement` says where every element lies."""
    if not isinstance(type_, Shard) or size == 1:
        return True
    if type_.is_contiguous:
        units, unit = type_.segments[0]
        return units % size == 0 or unit == 1
    return _is_equal(type_) and type_.is_even(size)


def mark(tensor: Any, spec: ParameterSpec) -> Any:
    """Attach its layout to a parameter; FSDP2 makes new parameters, which must be marked again (`mark_all`)."""
    tensor._meshpar_spec = spec
    return tensor


def mark_all(module: nn.Module, specs: Mapping[str, ParameterSpec]) -> None:
    """Attach their layouts to the parameters of `module`, by name."""
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        if fqn in specs:
            mark(parameter, specs[fqn])


def spec_of(tensor: torch.Tensor) -> ParameterSpec | None:
    """The layout attached to a parameter."""
    return getattr(tensor, "_meshpar_spec", None)


# ---- back to the original order --------------------------------------------------------------------------------------------------------


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter in its original order, on every rank. Collective over the parameter's mesh; a copy that needs no gradient."""
    return gathered(parameter, spec_of(parameter))


def full_grad(parameter: torch.Tensor) -> torch.Tensor | None:
    """The whole gradient in the original order of its parameter, on every rank; None where there is none. Collective like `full_tensor`."""
    return None if parameter.grad is None else gathered(parameter.grad, spec_of(parameter))


@torch.no_grad()
def gathered(tensor: torch.Tensor, spec: ParameterSpec | None) -> torch.Tensor:
    """The whole of a tensor laid out as `spec` says (a parameter, its gradient, its optimizer state), in the original order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    if spec is None:
        return tensor.full_tensor()
    local, mesh = local_of(tensor), tensor.device_mesh
    if spec.shards() and all(p.is_replicate() for p in tensor.placements):  # whole on every rank, unlike its parameter
        return (next(iter(local._local_tensors.values())) if isinstance(local, LocalTensor) else local).clone()
    if isinstance(local, LocalTensor):
        return _assemble(local._local_tensors, spec, mesh)
    axes = _coordinates(mesh)
    local = _undo_data_sharding(local, tensor, spec, axes)
    shapes = list(_nested_shapes(spec, axes))
    for (name, type_), shape in zip(reversed(spec.shards()), reversed(shapes), strict=True):
        if name in axes and axes[name][0] > 1:
            pieces = _gather(local, [local_shape(shape, type_, axes[name][0], r) for r in range(axes[name][0])], mesh, name)
            local = _put_together(pieces, type_)
    return local.clone() if local is local_of(tensor) else local


@torch.no_grad()
def true_dtensor(tensor: DTensor, spec: ParameterSpec) -> DTensor:
    """`tensor`, or, where its placements do not tell its order, the same values under placements that do. Collective in that case.

    The result has plain `Shard`s on the dims that were cut before, nested in mesh order, so any torch code reads it right.
    """
    if tells_order(tensor, spec):
        return tensor
    full, mesh = gathered(tensor, spec), tensor.device_mesh
    placements = [ShardPlacement(p.dim) if _cuts(p) else p for p in tensor.placements]  # type: ignore[attr-defined]
    local = _each_rank(mesh, lambda axes, whole: _nested_chunk(whole, placements, list(axes.values())), full)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


@torch.no_grad()
def from_true(value: torch.Tensor, spec: ParameterSpec, like: DTensor) -> DTensor:
    """The inverse of `true_dtensor`: a full tensor, or a DTensor in true order, laid out as `like`. Collective when it is a DTensor."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    names = like.device_mesh.mesh_dim_names or ()

    def part(axes: Coordinates, whole: torch.Tensor) -> torch.Tensor:
        local = local_part(whole, spec, axes)
        for name, p in zip(names, like.placements, strict=True):
            if _cuts(p) and not _is_shard(spec, name):
                low, high = chunk(local.shape[p.dim], *axes[name])  # type: ignore[attr-defined]
                local = local.narrow(p.dim, low, high - low)  # type: ignore[attr-defined]
        return local.contiguous()

    return dtensor_like(_each_rank(like.device_mesh, part, full), like)


def convert_state_dicts(module: nn.Module, known: Collection[str] = (), tied: Sequence[Sequence[str]] = ()) -> None:
    """Make `module.state_dict()` speak true DTensors; collective if torch cannot express some layout.

    `load_state_dict()` takes them, and whole tensors in the original order too (a state dict of the unparallel model), of which every rank
    keeps its part. `known`: names of the unparallel model; those that this rank has not, as others hold them, are passed over. `tied`:
    names of one tensor. If a state dict has several of them, they must hold the same values (else StateDictError, on all ranks: whole
    tensors are compared whole, DTensors that lie alike part by part, others gathered).
    """

    def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name, parameter, spec in _laid_out(module):
            if prefix + name in state and not tells_order(parameter, spec):
                state[prefix + name] = true_dtensor(parameter.detach(), spec)  # type: ignore[arg-type]

    def load(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
        _check_tied(state, prefix, tied)
        own = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))}
        for name in set(known) - own:
            state.pop(prefix + name, None)
        for name, parameter, spec in _laid_out(module):
            value = state.get(prefix + name)
            whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape
            if value is not None and (whole or not tells_order(parameter, spec)):
                state[prefix + name] = from_true(value, spec, parameter)

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)


def _check_tied(state: dict[str, Any], prefix: str, tied: Sequence[Sequence[str]]) -> None:
    """Refuse several values for one tensor. A name that is not there is nothing to compare."""
    complaints = []
    for group in tied:
        present = [name for name in group if isinstance(state.get(prefix + name), torch.Tensor)]
        for other in present[1:]:
            where = difference_of_dtensors(state[prefix + present[0]], state[prefix + other])
            complaints += [f"{prefix}{present[0]} and {prefix}{other}: {where}."] if where else []
    raise_all(
        StateDictError,
        "the state dict holds different values under names that are one tensor in the model. Leave one of them out of it, or build the "
        "model without the tie.",
        complaints,
    )


def _laid_out(module: nn.Module) -> Iterator[tuple[str, DTensor, ParameterSpec]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        spec = spec_of(parameter)
        if spec is not None and isinstance(parameter, DTensor):
            yield name, parameter, spec


# ---- helpers ---------------------------------------------------------------------------------------------------------------------------


def _stretches(type_: Shard) -> int:
    return type_.repeat * len(type_.segments)


def _is_equal(type_: Shard) -> bool:
    return len({units * unit for units, unit in type_.segments}) == 1


def tells_order(tensor: DTensor, spec: ParameterSpec) -> bool:
    """Whether the placements of a parameter, FSDP2's included, are true to its layout."""
    cut_dims = []
    for name, size, p in zip(tensor.device_mesh.mesh_dim_names or (), tensor.device_mesh.shape, tensor.placements, strict=True):
        if size > 1 and _cuts(p):
            cut_dims.append(p.dim)  # type: ignore[attr-defined]
            if _is_shard(spec, name) and not is_exact(spec.placements[name], size):
                return False
    if len(cut_dims) == len(set(cut_dims)):
        return True
    # one dim cut twice: torch agrees as long as nothing is uneven or strided on its own account
    total = 1
    for size, p in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        total *= size if _cuts(p) else 1
    own = [type_ for _, type_ in spec.shards()]
    return all(type_.is_contiguous for type_ in own) and all(tensor.shape[d] % total == 0 for d in set(cut_dims))


def _cuts(p: Placement) -> bool:
    return isinstance(p, (ShardPlacement, StridedShard))


def _is_shard(spec: ParameterSpec, name: str) -> bool:
    return isinstance(spec.placements.get(name), Shard)


def _coordinates(mesh: DeviceMesh) -> dict[str, tuple[int, int]]:
    """This rank's axes, outermost first."""
    names = mesh.mesh_dim_names or ()
    place = mesh.get_coordinate() or [0] * mesh.ndim
    return {name: (mesh.size(d), int(place[d])) for d, name in enumerate(names)}


def _each_rank(mesh: DeviceMesh, make: Callable[[Coordinates, torch.Tensor], torch.Tensor], full: torch.Tensor) -> torch.Tensor:
    """`make(place, full)` at this rank's place; in simulation at every rank's, each in memory of its own."""
    if not is_simulated():
        return make(_coordinates(mesh), full)
    names = mesh.mesh_dim_names or ()
    places = {rank: {n: (mesh.size(d), place[d]) for d, n in enumerate(names)} for place, rank in _places(mesh)}
    made = per_rank(lambda rank, whole: make(places[rank], whole).clone(), full)
    assert isinstance(made, torch.Tensor)
    return made


def _places(mesh: DeviceMesh) -> list[tuple[tuple[int, ...], int]]:
    """Every place of the mesh and the rank that is there."""
    with maybe_disable_local_tensor_mode():
        grid = mesh.mesh
        return list(zip(map(tuple, torch.ones_like(grid).nonzero().tolist()), grid.flatten().tolist(), strict=True))


def _assemble(parts: Mapping[int, torch.Tensor], spec: ParameterSpec, mesh: DeviceMesh) -> torch.Tensor:
    """The whole from all simulated ranks' parts (FSDP2 does not run there, so only the layout's own axes cut)."""
    with maybe_disable_local_tensor_mode():
        names = list(mesh.mesh_dim_names or ())
        ranks = dict(_places(mesh))
        own = [(names.index(name), type_) for name, type_ in spec.shards() if name in names]

        def build(place: list[int], depth: int) -> torch.Tensor:
            if depth == len(own):
                return parts[ranks[tuple(place)]]
            d, type_ = own[depth]
            pieces = [build([*place[:d], r, *place[d + 1 :]], depth + 1) for r in range(mesh.size(d))]
            return _put_together(pieces, type_)

        return build([0] * mesh.ndim, 0).detach().clone()


def _undo_data_sharding(local: torch.Tensor, tensor: DTensor, spec: ParameterSpec, axes: Coordinates) -> torch.Tensor:
    """Gather over the axes on which FSDP2 cut the local part again: with `torch.chunk`, along one dim."""
    shape = spec.local_shape(axes)
    for name, p in zip(axes, tensor.placements, strict=True):
        size = axes[name][0]
        if size > 1 and _cuts(p) and not _is_shard(spec, name):
            type_ = Shard(p.dim, 1, ((shape[p.dim], 1),))  # type: ignore[attr-defined]
            pieces = _gather(local, [local_shape(shape, type_, size, r) for r in range(size)], tensor.device_mesh, name)
            local = _put_together(pieces, type_)
    return local


def _nested_shapes(spec: ParameterSpec, axes: Coordinates) -> Iterator[tuple[int, ...]]:
    """The shape each sharding axis finds before it cuts."""
    shape = spec.shape
    for name, type_ in spec.shards():
        yield shape
        shape = local_shape(shape, type_, *axes.get(name, (1, 0)))


def _gather(local: torch.Tensor, shapes: Sequence[tuple[int, ...]], mesh: DeviceMesh, name: str) -> list[torch.Tensor]:
    """Every rank's tensor along one axis; shapes may differ, so the flat data travels padded to the longest."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    longest = max(counts)
    padded = local.new_zeros(longest)
    padded[: local.numel()] = local.reshape(-1)
    everything = local.new_empty(longest * len(shapes))
    dist.all_gather_into_tensor(everything, padded, group=mesh.get_group(name))
    return [row[:n].view(shape) for row, n, shape in zip(everything.view(len(shapes), -1), counts, shapes, strict=True)]


def _take(full: torch.Tensor, type_: Shard, size: int, rank: int) -> torch.Tensor:
    pieces = [full.narrow(type_.dim, low, high - low) for low, high in type_.ranges(size, rank)]
    return torch.cat(pieces, type_.dim) if pieces else full.narrow(type_.dim, 0, 0).clone()


def _put_together(pieces: Sequence[torch.Tensor], type_: Shard) -> torch.Tensor:
    shape = list(pieces[0].shape)
    shape[type_.dim] = type_.length
    full = pieces[0].new_empty(shape)
    for rank, piece in enumerate(pieces):
        at = 0
        for low, high in type_.ranges(len(pieces), rank):
            full.narrow(type_.dim, low, high - low).copy_(piece.narrow(type_.dim, at, high - low))
            at += high - low
    return full


def _nested_chunk(full: torch.Tensor, placements: Sequence[Placement], places: Sequence[tuple[int, int]]) -> torch.Tensor:
    for p, (size, rank) in zip(placements, places, strict=True):
        if isinstance(p, ShardPlacement):
            low, high = chunk(full.shape[p.dim], size, rank)
            full = full.narrow(p.dim, low, high - low)
    return full.contiguous()


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
