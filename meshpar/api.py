"""parallelize(): the whole story, top to bottom.

model ── capture ──> graph ── rules + solver ──> Plan ── lower ──> local graph ── blocks, FSDP2 ──> ParallelModel
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .config import ParallelConfig
from .errors import ConfigError
from .mesh import agree, check_batch, check_mesh, mesh_sizes
from .plan import ParameterPlan, Plan
from .runtime import place
from .runtime.blocks import Block, Tree
from .runtime.data_parallel import DataParallel
from .runtime.data_parallel import apply as apply_data_parallel
from .runtime.failures import Together
from .runtime.init import materialise
from .runtime.model import ParallelModel, add
from .runtime.parameters import ParameterSpec, convert_state_dicts, mark_all
from .runtime.program import Program, Programs
from .runtime.weights import Lazy
from .simulate import is_simulated

Example = Mapping[str, Any] | tuple[Any, ...]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    example: Example | None = None,
    config: ParallelConfig | None = None,
    rules: Mapping[str, str] | None = None,
    plan: Plan | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    weights: str | PathLike[str] | None = None,
) -> ParallelModel:
    """A module that trains `model` over all axes of `mesh` and computes the same function, gradients included.

    `example`: one data rank's local batch, keyword arguments as a dict or positional ones as a tuple; may be left out when the model
    offers `dummy_inputs`. `rules`: pattern of parameter names -> "tp:DIM" or "replicate", constraints on the solver. `plan`: an earlier
    plan for the same graph and mesh, obeyed as it is. `loss_fn(output, batch)`: the loss, where the model returns none. `weights`:
    safetensors to fill a model built on `meta` from; each rank reads only its bytes. The given model is left as it is.

    Raises ConfigError, CaptureError, PlanError or BatchError before anything is allocated.

        mesh = mp.make_mesh("dp=2,tp=2")
        pm = mp.parallelize(model, mesh, example=batch)
        loss = pm.train_step(**batch)
    """
    check_mesh(mesh)
    _check_supported(mesh)
    config = config or ParallelConfig()
    args, kwargs = _example(model, example)
    together = Together(mesh)
    with together.section("parallelize"):
        return _parallelize(model, mesh, args, kwargs, config, rules, plan, loss_fn, weights, together)


def _parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: ParallelConfig,
    rules: Mapping[str, str] | None,
    plan: Plan | None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    weights: str | PathLike[str] | None,
    together: Together,
) -> ParallelModel:
    check_batch((args, kwargs), mesh)
    programs = Programs(model, mesh, config, rules=rules, loss_fn=loss_fn, plan=plan)
    program = programs.make(args, kwargs, training=model.training, microbatches=config.microbatches)
    agree(program.plan.hash, mesh, "the plan")
    tree, data = _build(model, mesh, config, program, weights)
    built = ParallelModel(tree, mesh, config, programs, data, program, together)
    convert_state_dicts(built)
    return built


def _check_supported(mesh: DeviceMesh) -> None:
    missing = [name for name, size in mesh_sizes(mesh).items() if name in ("pp", "cp", "ep") and size > 1]
    if missing:
        raise ConfigError(f"parallelize does not support the axes {', '.join(missing)} yet; use dp (or dp_replicate, dp_shard) and tp.")


def _example(model: nn.Module, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        example = getattr(model, "dummy_inputs", None)
        if example is None:
            raise ConfigError(
                f"{type(model).__name__} needs an example batch to be captured: pass example=batch, the keyword arguments (a dict) or "
                f"positional ones (a tuple) of one data rank's local batch."
            )
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise ConfigError(f"example= must be a dict of keyword arguments or a tuple of positional ones, not {type(example).__name__}.")


def _build(
    model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, program: Program, weights: str | PathLike[str] | None
) -> tuple[Tree, DataParallel]:
    """Modules at their original places that hold this rank's part of every parameter, with the first program."""
    plans = program.plan.parameters
    specs = {name: _spec(name, plan, config) for name, plan in plans.items()}
    parameters: dict[str, nn.Parameter] = {}

    def put(name: str, value: torch.Tensor | Lazy) -> None:
        if is_simulated():
            parameters[name] = place.whole(value, specs[name], mesh)
        else:
            place.fill(parameters[name], value)

    def tree_of(buffers: Mapping[str, torch.Tensor]) -> Tree:
        found = Tree(parameters, buffers, aliases=_aliases(model), non_persistent=_non_persistent(model), recompute=config.recompute)
        add(found, program)
        return found

    dtype = config.precision.param_dtype
    if is_simulated():
        buffers = materialise(model, list(plans), put, weights=weights, dtype=dtype)
        tree = tree_of({n: b.detach().clone() for n, b in buffers.items()})
        tree.set_compute_dtype(config.precision.compute_dtype)
        return tree, DataParallel(Block(), config.data_parallel, ())
    parameters.update({name: place.empty(specs[name], mesh) for name in plans})
    tree = tree_of({n: b.detach().clone().to(mesh.device_type) for n, b in model.named_buffers()})
    data = apply_data_parallel(tree, mesh, config)
    place.allocate(tree, mesh.device_type)
    mark_all(tree, specs)
    parameters.update(tree.named_parameters())
    buffers = materialise(model, list(plans), put, weights=weights, dtype=dtype)
    with torch.no_grad():
        for name, buffer in tree.named_buffers():
            buffer.copy_(buffers[name])
    return tree, data


def _spec(name: str, plan: ParameterPlan, config: ParallelConfig) -> ParameterSpec:
    own: torch.dtype = getattr(torch, plan.dtype)
    dtype = config.precision.param_dtype if config.precision.param_dtype is not None and own.is_floating_point else own
    placements = {axis: type_ for axis, type_ in plan.placements.items() if axis == "tp"}
    return ParameterSpec(name, plan.shape, dtype, plan.trainable, placements)


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) in first:
            found[name] = first[id(tensor)]
        first.setdefault(id(tensor), name)
    return found


def _non_persistent(model: nn.Module) -> tuple[str, ...]:
    found = []
    for path, module in model.named_modules():
        found += [f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set]
    return tuple(found)
