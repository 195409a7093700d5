"""Data parallelism over a tree of blocks: FSDP2, one unit per block, the root for the rest.

    mode        what data ranks share out                 when gradients are summed
    zero3       parameters, gradients, optimizer state    every microbatch; parameters are gathered in forward and again in backward
    zero2       gradients, optimizer state                every microbatch; parameters are gathered once per step
    zero1       optimizer state                           after the last microbatch; parameters are gathered once per step
    replicate   nothing                                   after the last microbatch, one all-reduce per unit

Gradients are summed, not averaged: the loss is already the mean over the global batch. With `dp_replicate` x `dp_shard` the sharing out
is over `dp_shard`, and what is left is summed over `dp_replicate` after the last microbatch.

On CPU (gloo) FSDP2 waits for each collective where it is started: `beside.py` has it wait later. Reductions are plain sums (`PREMUL_SUM`,
FSDP2's own way to divide, does not exist on gloo).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import DataParallelMeshDims, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from meshpar import roles
from meshpar._torch import (
    accumulate_gradients,
    as_parameter,
    forget_step,
    groups_of,
    is_unfinished,
    local_of,
    mesh_info,
    part_here,
    reduce_gradients,
    shard_over,
    shares_out_over_several,
)
from meshpar.config import DataParallel as Mode
from meshpar.config import ParallelConfig
from meshpar.errors import ConfigError
from meshpar.runtime.beside import AllGather, ReduceScatter, SumInFlight
from meshpar.runtime.blocks import Tree, shared_blocks
from meshpar.runtime.parameters.specs import mark, spec_of
from meshpar.sharding.types import Owned


@dataclass(frozen=True)
class DataParallelism:
    """Data parallelism as it was applied: call `microbatch` before each microbatch's forward."""

    root: nn.Module
    mode: Mode
    units: tuple[tuple[str, ...], ...]
    """The blocks of each unit; the root is one more."""
    keeps: bool = False
    """Whether parameters stay gathered until the gradients of the step are summed."""
    beside: bool = True
    """Whether gradients are summed while backward still runs; else `done` sums them."""
    sums: SumInFlight = field(default_factory=SumInFlight)
    """The sum of gradients in flight, on CPUs."""
    stopped: list[str] = field(default_factory=list)
    """Why there can be no further step, if there is a reason."""

    def microbatch(self, index: int, count: int) -> None:
        """Say which microbatch of the step comes next: gradients are summed, and parameters let go, when the mode says so.

        A forward or backward before it that raised, in a loop of the user's for instance, is forgotten.
        """
        if not isinstance(self.root, FSDPModule):
            return
        if index == 0 and is_unfinished(self.root):
            self.reset()
        self._check()
        last = index == count - 1
        self.root.set_is_last_backward(last)
        self.root.set_requires_gradient_sync(last or self._each)
        self.root.set_requires_all_reduce(last)
        self.root.set_reshard_after_backward(last or self.mode == "zero3")

    def alone(self) -> None:
        """Say, before the backward of a microbatch of a step, that no gradients are to be summed in it."""
        if isinstance(self.root, FSDPModule) and not self.beside:
            self.root.set_requires_gradient_sync(False)

    def done(self, index: int, count: int) -> None:
        """Say which microbatch of the step is done: its gradients are summed now, where that is not done beside backward."""
        if not self.beside and (index == count - 1 or self._each):
            self.reduce()

    @property
    def _each(self) -> bool:
        """Whether gradients are summed for every microbatch."""
        return self.mode in ("zero2", "zero3")

    def backward(self, *, last: bool) -> None:
        """Say, before a pipeline stage's backward, whether it is its last of the step: gradients are summed in it."""
        if not isinstance(self.root, FSDPModule):
            return
        self._check()
        self._sums(last and self.beside)
        self.root.set_reshard_after_backward(last or (self.mode == "zero3" and not self.keeps))

    def _sums(self, now: bool) -> None:
        assert isinstance(self.root, FSDPModule)
        self.root.set_is_last_backward(now)
        self.root.set_requires_gradient_sync(now)
        self.root.set_requires_all_reduce(now)

    def accumulate(self) -> None:
        """Keep gradients that came outside of any backward in the dtype they are summed in."""
        if isinstance(self.root, FSDPModule):
            accumulate_gradients(self.root)

    def reduce(self) -> None:
        """Sum the gradients of a step now, outside of any backward."""
        if isinstance(self.root, FSDPModule):
            self._sums(True)
            self.root.set_reshard_after_backward(True)
            reduce_gradients(self.root)

    def reset(self) -> None:
        """Recover after an exception in forward or backward: the step's gradients are dropped."""
        if isinstance(self.root, FSDPModule):
            self.sums.land()
            if forget_step(self.root):
                self.microbatch(0, 1)
            else:
                self.stopped.append(
                    f"an earlier step raised, and FSDP2 of torch {torch.__version__} cannot forget what it had begun: parallelize again "
                    "and load the last checkpoint, or use torch 2.13."
                )

    def _check(self) -> None:
        if self.stopped:
            raise ConfigError(self.stopped[0])


def apply(tree: Tree, mesh: DeviceMesh, config: ParallelConfig, *, keeps: bool = False, alone: Collection[str] = ()) -> DataParallelism:
    """Apply data parallelism over the data axes of `mesh` to all blocks of `tree`, then to the rest.

    Every parameter becomes a DTensor over all axes of `mesh` but `pp`, under its own name; layouts attached to parameters stay attached.
    Blocks that share a parameter are one unit. Without a data axis only the precision is set. Call it after the first `add_program`
    and before any optimizer is made.

    `keeps`: parameters stay gathered from a step's first use to its end, also with "zero3": weight gradients that are put off arrive late.
    `alone`: names of parameters that are left as they are (those without dims FSDP2 cannot share out). Parameters divided among the ranks
    of `ep` are shared out over the other axes.
    """
    precision = config.precision
    names = tuple(n for n in mesh.mesh_dim_names or () if roles.ROLES[n].typed)
    data = roles.summing(names)
    if not data:
        tree.set_compute_dtype(precision.compute_dtype)
        return DataParallelism(tree, config.data_parallel, (), beside=config.overlap_grad_reduce)
    dims = _dims(data, config.data_parallel)
    if len(dims.shard_names) > 1 and not shares_out_over_several():
        raise ConfigError(
            f"FSDP2 of torch {torch.__version__} shares parameters out over one axis, not over {' and '.join(dims.shard_names)}: use "
            f'data_parallel="replicate", one of these axes alone, or torch 2.13.'
        )
    spmd = mesh if names == mesh.mesh_dim_names else mesh[names]
    left = {p for name, p in tree.named_parameters() if name in alone}
    if left:
        tree.set_compute_dtype(precision.compute_dtype)
    _spread(tree, spmd)
    options: dict[str, Any] = {
        "mesh": spmd,
        "dp_mesh_dims": dims,
        "reshard_after_forward": config.data_parallel == "zero3" and not keeps,
        "mp_policy": MixedPrecisionPolicy(precision.compute_dtype, precision.reduce_dtype, cast_forward_inputs=False),
        "ignored_params": left,
        "shard_placement_fn": _experts_apart(spmd, data, config.data_parallel),
    }
    specs = {name: spec_of(p) for name, p in tree.named_parameters(remove_duplicate=False)}
    units = _units(tree, config)
    for unit in units:
        fully_shard([tree.get_submodule(path) for path in unit], **options)
    fully_shard(tree, **options | {"reshard_after_forward": False})  # its backward comes first: letting go would gather twice
    for name, parameter in tree.named_parameters(remove_duplicate=False):
        if (spec := specs[name]) is not None:
            mark(parameter, spec)
    for module in _fsdp_modules(tree):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(tree, units, config)
    sums = _beside(tree, spmd, config)
    tree.register_forward_hook(_reshard_without_gradients)
    return DataParallelism(tree, config.data_parallel, units, keeps, config.overlap_grad_reduce, sums)


def _dims(data: Sequence[str], mode: Mode) -> DataParallelMeshDims:
    replicated = tuple(data) if mode == "replicate" else roles.copying(data)
    shared = tuple(n for n in data if n not in replicated)
    return DataParallelMeshDims(shard=shared or None, replicate=replicated or None)


def _experts_apart(mesh: DeviceMesh, data: Sequence[str], mode: Mode) -> Callable[[nn.Parameter], Any] | None:
    """Experts are shared out over the data axes that do not divide them already."""
    rest = roles.summing(data, without="experts")
    if not (experts := roles.dividing("experts", data)) or mode == "replicate" or set(rest) <= set(roles.copying(rest)):
        return None  # no experts, or nothing to share them out over: then they are left alone
    info = mesh_info(mesh, _dims(rest, mode))
    at = (mesh.mesh_dim_names or ()).index(experts[0])

    def place(parameter: nn.Parameter) -> Any:
        assert isinstance(parameter, DTensor)
        spec = spec_of(parameter)
        owned = spec is not None and isinstance(spec.placements.get(experts[0]), Owned)
        if parameter.placements[at].is_replicate() and not owned:
            return None
        ranks, shape = info.shard_mesh_size, local_of(parameter).shape
        inside = shape[0] < ranks and len(shape) > 1 and shape[1] % ranks == 0  # fewer experts than ranks: a part of each
        return shard_over(info, 1 if inside else 0)

    return place


def _spread(tree: Tree, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor over the whole of `mesh`, of the same memory: FSDP2 finds its data axes by name there."""
    done: dict[int, nn.Parameter] = {}
    for module in tree.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done:
                done[id(parameter)] = _over(parameter, mesh)
            setattr(module, name, done[id(parameter)])


def _over(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    if isinstance(parameter, DTensor) and parameter.device_mesh is mesh:
        return parameter
    own: dict[str, Placement] = {}
    local: torch.Tensor = parameter.detach()
    if isinstance(parameter, DTensor):
        own = dict(zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True))
        local = local_of(parameter)
    placements = [own.get(name, Replicate()) for name in mesh.mesh_dim_names or ()]
    spread = DTensor.from_local(local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
    if (spec := spec_of(parameter)) is not None:
        mark(spread, spec)
    return as_parameter(spread, parameter.requires_grad)


def _units(tree: Tree, config: ParallelConfig) -> tuple[tuple[str, ...], ...]:
    """The blocks gathered and summed together: those that share a parameter; where whole parameters are kept, also a bucket of them."""
    units = shared_blocks(tree)
    if config.data_parallel not in ("replicate", "zero1"):
        return units
    buckets: list[tuple[str, ...]] = []
    size = 0
    for unit in units:
        parameters = [p for path in unit for p in tree.get_submodule(path).parameters()]
        bytes_ = sum(part_here(p).nbytes for p in parameters)
        if buckets and size + bytes_ <= config.bucket_bytes:
            buckets[-1] += unit
            size += bytes_
        else:
            buckets.append(unit)
            size = bytes_
    return tuple(buckets)


def _prefetch(tree: Tree, units: Sequence[Sequence[str]], config: ParallelConfig) -> None:
    """Gather the next unit's parameters while this one computes. In forward FSDP2 does so only when told which is next."""
    if not config.overlap_param_gather or config.data_parallel == "replicate":
        return
    firsts = [tree.get_submodule(unit[0]) for unit in units]
    for module, following in pairwise(firsts):
        assert isinstance(module, FSDPModule) and isinstance(following, FSDPModule)
        module.set_modules_to_forward_prefetch([following])


def _beside(tree: Tree, mesh: DeviceMesh, config: ParallelConfig) -> SumInFlight:
    """On CPUs, gather and sum beside computation, as streams do elsewhere. (FSDP2 reads what is summed over `dp_replicate` too at once.)"""
    sums = SumInFlight()
    if mesh.device_type != "cpu" or dist.get_backend() == "fake" or config.data_parallel == "replicate":
        return sums
    for module in _fsdp_modules(tree):
        assert isinstance(module, nn.Module)
        if len(groups_of(module)) != 1:  # experts are shared out over other axes: FSDP2 takes no collectives of one's own there
            continue
        if config.overlap_param_gather:
            module.set_custom_all_gather(AllGather())
        if config.overlap_grad_reduce and not roles.copying(mesh.mesh_dim_names or ()):
            module.set_custom_reduce_scatter(ReduceScatter(module, sums))
    return sums


def _fsdp_modules(tree: nn.Module) -> list[FSDPModule]:
    return [module for module in tree.modules() if isinstance(module, FSDPModule)]


def _reshard_without_gradients(tree: nn.Module, args: object, outputs: object) -> None:
    """After an evaluation no backward lets the gathered parameters go; what is registered must be the shared-out ones again."""
    if not torch.is_grad_enabled():
        for module in _fsdp_modules(tree):
            module.reshard()
