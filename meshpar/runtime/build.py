"""The modules of this rank: parameters at their original places, cut as the plan says, filled with this rank's part of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import alone as alone_in
from meshpar._torch import forget_meshes
from meshpar.compile.program import Program
from meshpar.compile.summed import left_alone
from meshpar.config import ParallelConfig
from meshpar.consensus import spread
from meshpar.errors import ConfigError
from meshpar.init.meta import Share, WeightsFrom, materialise
from meshpar.init.weights import Lazy
from meshpar.mesh import axis, stage_axis
from meshpar.pipeline.order import Schedule
from meshpar.pipeline.run import Pipelined
from meshpar.pipeline.ties import Ties
from meshpar.plan import ParameterPlan, Plan
from meshpar.roles import ROLES, dividing
from meshpar.roles import stage_axis as stages
from meshpar.runtime import place
from meshpar.runtime.blocks import Block, Tree
from meshpar.runtime.data_parallel import DataParallelism
from meshpar.runtime.data_parallel import apply as apply_data_parallel
from meshpar.runtime.engine import Engine, Whole, teach
from meshpar.runtime.parameters.specs import ParameterSpec, mark_all
from meshpar.runtime.parameters.statistics import mark_batch_norms
from meshpar.runtime.parameters.tensors import adopt
from meshpar.runtime.recompute import Mode
from meshpar.sharding.types import Owned, Shard
from meshpar.simulate import is_simulated


def build(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig,
    program: Program,
    schedule: Schedule | None,
    *,
    weights: WeightsFrom | None = None,
    filled: bool = True,
) -> Engine:
    """The engine that runs `program` on this rank, with the values of `model`, or those in `weights`; with none if not `filled`.

    Raises ConfigError for a pipeline on simulated ranks: they all run one program.
    """
    forget_meshes()
    own = _own_stages(mesh, schedule)
    spmd = without_pipeline(mesh)
    plans = {n: p for n, p in program.plan.parameters.items() if set(p.stages) & set(own) and _is_here(p, mesh)}
    specs = {name: _spec(name, plan, config, own) for name, plan in plans.items()}
    if is_simulated():
        tree = _simulated(model, mesh, config, program, specs, weights, filled)
        return Whole(tree, DataParallelism(Block(), config.data_parallel, ()), program)
    parameters = {name: place.empty(spec, spmd) for name, spec in specs.items()}
    trees = _trees(model, config, program, own, parameters, _buffers(model, mesh.device_type))
    data = _data_parallel(trees, mesh, spmd, config, program, schedule)
    without_memory = _has_no_peers() and weights is None and all(p.is_meta for p in model.parameters())
    for tree in trees.values():
        if not without_memory:
            place.allocate(tree, mesh.device_type)
        mark_all(tree, specs)
        adopt(tree, specs, apart=are_apart(program.plan, mesh))
        parameters.update(tree.named_parameters())
    if filled and not without_memory:
        _fill(
            model,
            config,
            trees,
            parameters,
            weights,
            Share(lambda n: place.share_of(parameters[n]), (*program.plan.parameters,), spread(mesh)),
        )
    if schedule is None:
        return Whole(trees[0], data[0], program)
    ties = _ties(program.plan, mesh, parameters)
    device = torch.device(mesh.device_type)
    return Pipelined(trees, program, data, ties, schedule, stage_axis(mesh), device, overlaps=config.overlap_p2p)


def trees_in_memory(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig,
    program: Program,
    schedule: Schedule | None,
    memory: AbstractContextManager[Any],
    stages: Sequence[int],
) -> tuple[dict[int, Tree], dict[int, DataParallelism]]:
    """The trees of some `stages`, as the ranks with this one's other coordinates have them, and their data parallelism.

    Tensors are allocated inside of `memory`, such as a `FakeTensorMode`; their values are whatever is there.
    """
    forget_meshes()
    spmd = without_pipeline(mesh)
    plans = {n: p for n, p in program.plan.parameters.items() if _is_here(p, mesh)}
    specs = {name: _spec(name, plan, config, stages) for name, plan in plans.items()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in model.named_buffers()}
    trees: dict[int, Tree] = {}
    for stage in stages:  # each has parameters of its own, also those that several use
        parameters = {name: place.empty(spec, spmd) for name, spec in specs.items() if stage in plans[name].stages}
        trees |= _trees(model, config, program, (stage,), parameters, buffers)
    data = _data_parallel(trees, mesh, spmd, config, program, schedule)
    for tree in trees.values():
        with memory:
            place.allocate(tree, mesh.device_type)
        mark_all(tree, specs)
        adopt(tree, specs, apart=are_apart(program.plan, mesh))
    return trees, data


def _data_parallel(
    trees: Mapping[int, Tree], mesh: DeviceMesh, spmd: DeviceMesh, config: ParallelConfig, program: Program, schedule: Schedule | None
) -> dict[int, DataParallelism]:
    """`spmd`: the very mesh that the parameters are on."""
    keeps = schedule is not None and schedule.defers(config.microbatches)
    alone = left_alone(program.plan, mesh, config)
    return {i: apply_data_parallel(tree, spmd, config, keeps=keeps, alone=alone) for i, tree in trees.items()}


@torch.no_grad()
def copy_values(source: Engine, target: Engine) -> dict[int, Any]:
    """Make the parameters, their gradients and the buffers of one engine those of another, built from the same program.

    Returns the copy of every parameter and buffer by the `id` of its source.
    """
    copies: dict[int, Any] = {}
    for index, tree in source.trees.items():
        parameters, buffers = dict(target.trees[index].named_parameters()), dict(target.trees[index].named_buffers())
        for name, parameter in tree.named_parameters():
            copy = copies[id(parameter)] = parameters[name].requires_grad_(parameter.requires_grad)
            copy.copy_(parameter)
            copy.grad = None if parameter.grad is None else parameter.grad.clone()
        for name, buffer in tree.named_buffers():
            copies[id(buffer)] = buffers[name].copy_(buffer)
    return copies


def _has_no_peers() -> bool:
    """Whether the other ranks are only thought of: then a model that has no memory gets none, whatever its size."""
    return dist.is_initialized() and dist.get_backend() == "fake" and not is_simulated()


def _buffers(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    return {name: b.detach().clone() if b.is_meta else b.detach().clone().to(device) for name, b in model.named_buffers()}


def _fill(
    model: nn.Module,
    config: ParallelConfig,
    trees: Mapping[int, Tree],
    parameters: Mapping[str, nn.Parameter],
    weights: WeightsFrom | None,
    share: Share,
) -> None:
    """Give parameters and buffers their values."""
    buffers = materialise(
        model,
        list(parameters),
        lambda n, value: place.fill(parameters[n], value),
        weights=weights,
        dtype=config.precision.param_dtype,
        share=share,
    )
    with torch.no_grad():
        for tree in trees.values():
            for name, buffer in tree.named_buffers():
                buffer.copy_(buffers[name])


def without_pipeline(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of the ranks that run the same stages: what parameters lie on."""
    names = tuple(n for n in mesh.mesh_dim_names or () if ROLES[n].typed)
    if len(names) == mesh.ndim:
        return mesh
    return mesh[names] if names else alone_in(mesh, stages(), dividing("weights")[0])


def _own_stages(mesh: DeviceMesh, schedule: Schedule | None) -> tuple[int, ...]:
    if schedule is None:
        return (0,)
    if is_simulated():
        raise ConfigError(
            f"simulated ranks all run one program, the {schedule.stages} stages of a pipeline run different ones: use processes (torchrun, "
            f"or mp.verify, which starts them), or leave pp out of the mesh."
        )
    return schedule.order(1, backward=False).stages_of(stage_axis(mesh).rank)


def trees_of(
    model: nn.Module,
    program: Program,
    own: Sequence[int],
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, torch.Tensor],
    *,
    recompute: Mode,
    compile: Mapping[str, Any] | None = None,
) -> dict[int, Tree]:
    """One tree per stage in `own`, with the parameters of its stage; it is yet to learn the program.

    Buffers that change are where they are used, others everywhere.
    """
    plans, trees = program.plan.parameters, dict[int, Tree]()
    for stage in own:
        held = {name: p for name, p in parameters.items() if stage in plans[name].stages}
        changed = program.all_stages[stage].mutations if program.all_stages else program.captured.mutations
        kept = {name: b for name, b in buffers.items() if name not in program.captured.mutations or name in changed}
        trees[stage] = Tree(
            held,
            kept,
            aliases=program.captured.aliases,
            non_persistent=_non_persistent(model),
            recompute=recompute,
            compile=compile,
        )
    return trees


def _trees(
    model: nn.Module,
    config: ParallelConfig,
    program: Program,
    own: Sequence[int],
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, torch.Tensor],
) -> dict[int, Tree]:
    trees = trees_of(model, program, own, parameters, buffers, recompute=config.recompute, compile=_compile(config))
    for tree in trees.values():
        mark_batch_norms(tree, model)
    teach(trees, program)
    return trees


def _compile(config: ParallelConfig) -> Mapping[str, Any] | None:
    """The arguments of torch.compile. Simulated ranks run as they are: the tensors of several ranks in one are not compiled."""
    if config.compile is False or is_simulated() or _has_no_peers():
        return None
    return {} if config.compile is True else config.compile


def _simulated(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig,
    program: Program,
    specs: Mapping[str, ParameterSpec],
    weights: WeightsFrom | None,
    filled: bool,
) -> Tree:
    """The tree of all simulated ranks, which live in this process: whole values are here, and every rank's part is cut from them."""
    parameters: dict[str, nn.Parameter] = {}

    def put(name: str, value: torch.Tensor | Lazy) -> None:
        parameters[name] = place.whole(value, specs[name], mesh)

    if filled:
        buffers = materialise(model, list(specs), put, weights=weights, dtype=config.precision.param_dtype)
    else:
        buffers = _buffers(model, mesh.device_type)
        for name, spec in specs.items():
            put(name, torch.empty(spec.shape, dtype=spec.dtype))
    (tree,) = _trees(model, config, program, (0,), parameters, {n: b.detach().clone() for n, b in buffers.items()}).values()
    tree.set_compute_dtype(config.precision.compute_dtype)
    adopt(tree, specs, apart=False)
    return tree


def _spec(name: str, plan: ParameterPlan, config: ParallelConfig, own: Sequence[int]) -> ParameterSpec:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    if config.precision.param_dtype is not None and dtype.is_floating_point:
        dtype = config.precision.param_dtype
    placements = {n: type_ for n, type_ in plan.placements.items() if isinstance(type_, (Shard, Owned)) and ROLES[n].cuts_parameters}
    return ParameterSpec(name, plan.shape, dtype, plan.trainable, placements, plan.stages[0] not in own)


def _is_here(plan: ParameterPlan, mesh: DeviceMesh) -> bool:
    """Whether this rank has any part of a parameter."""
    return all(axis(mesh, name).rank == type_.rank for name, type_ in plan.placements.items() if isinstance(type_, Owned))


def are_apart(plan: Plan, mesh: DeviceMesh) -> bool:
    """Whether some ranks hold parameters that others have not: stages, or experts that are on one rank each."""
    owned = any(isinstance(type_, Owned) for p in plan.parameters.values() for type_ in p.placements.values())
    return owned or stage_axis(mesh).size > 1


def _ties(plan: Plan, mesh: DeviceMesh, parameters: Mapping[str, nn.Parameter]) -> Ties:
    holders = {}
    for name in parameters:
        ranks = tuple(dict.fromkeys(plan.stages[s].rank for s in plan.parameters[name].stages))
        if len(ranks) > 1 and plan.parameters[name].trainable:
            holders[name] = ranks
    return Ties(stage_axis(mesh), holders, {name: parameters[name] for name in holders})


def _non_persistent(model: nn.Module) -> tuple[str, ...]:
    found = []
    for path, module in model.named_modules():
        found += [f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set]
    return tuple(found)
