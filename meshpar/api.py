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
from .mesh import agree, check_batch, check_mesh
from .plan import ParameterPlan, Plan
from .runtime.blocks import Tree
from .runtime.data_parallel import DataParallel
from .runtime.data_parallel import apply as apply_data_parallel
from .runtime.init import materialise
from .runtime.model import ParallelModel, add
from .runtime.parameters import ParameterSpec, convert_state_dicts, distribute
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

    `example`: one data rank's local batch, keyword arguments as a dict or positional ones as a tuple; may be left out when the model offers
    `dummy_inputs`. `rules`: pattern of parameter names -> "tp:DIM" or "replicate", constraints on the solver. `plan`: an earlier plan for the
    same graph and mesh, obeyed as it is. `loss_fn(output, batch)`: the loss, where the model returns none. `weights`: safetensors to fill a
    model built on `meta` from; each rank reads only its bytes. The given model is left as it is.

    Raises ConfigError, CaptureError, PlanError or BatchError before anything is allocated.

        mesh = mp.make_mesh("dp=2,tp=2")
        pm = mp.parallelize(model, mesh, example=batch)
        loss = pm.train_step(**batch)
    """
    check_mesh(mesh)
    config = config or ParallelConfig()
    args, kwargs = _example(model, example)
    check_batch((args, kwargs), mesh)
    programs = Programs(model, mesh, config, rules=rules, loss_fn=loss_fn, plan=plan)
    program = programs.make(args, kwargs, training=model.training, microbatches=config.microbatches)
    agree(program.plan.hash, mesh, "the plan")
    tree = _tree(model, mesh, config, program, weights)
    data = DataParallel(tree, config.data_parallel, ()) if is_simulated() else apply_data_parallel(tree, mesh, config)
    built = ParallelModel(tree, mesh, config, programs, data, program)
    convert_state_dicts(built)
    return built


def _example(model: nn.Module, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        example = getattr(model, "dummy_inputs", None)
        if example is None:
            raise ConfigError(
                f"{type(model).__name__} needs an example batch to be captured: pass example=batch, the keyword arguments (a dict) or positional "
                f"ones (a tuple) of one data rank's local batch."
            )
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise ConfigError(f"example= must be a dict of keyword arguments or a tuple of positional ones, not {type(example).__name__}.")


def _tree(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, program: Program, weights: str | PathLike[str] | None) -> Tree:
    """All parameters cut as the plan says, in modules at their original places, with the first program."""
    parameters: dict[str, nn.Parameter] = {}
    plans = program.plan.parameters

    def place(name: str, value: torch.Tensor | Lazy) -> None:
        full = value.read() if isinstance(value, Lazy) else value
        full = full.to(mesh.device_type, config.precision.param_dtype if full.is_floating_point() else None)
        parameters[name] = distribute(full, _spec(name, plans[name]), mesh)

    buffers = materialise(model, list(plans), place, seed=None, weights=weights)
    tree = Tree(
        {name: parameters[name] for name in plans},
        {name: buffer.detach().clone().to(mesh.device_type) for name, buffer in buffers.items()},
        aliases=_aliases(model),
        non_persistent=_non_persistent(model),
        recompute=config.recompute,
    )
    add(tree, program)
    return tree


def _spec(name: str, plan: ParameterPlan) -> ParameterSpec:
    placements = {axis: type_ for axis, type_ in plan.placements.items() if axis == "tp"}
    return ParameterSpec(name, plan.shape, getattr(torch, plan.dtype), plan.trainable, placements)


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


