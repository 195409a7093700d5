"""parallelize(): the whole story, top to bottom.

model ── capture ──> graph ── rules + solver ──> Plan ── lower ──> local graph ── stages, blocks, FSDP2 ──> ParallelModel
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar.arguments import check_arguments
from meshpar.capture.structure import order_of
from meshpar.compile.agreement import agree_on_values
from meshpar.compile.programs import Programs
from meshpar.config import ParallelConfig
from meshpar.consensus import agree, check_batch
from meshpar.errors import ConfigError
from meshpar.init.meta import WeightsFrom
from meshpar.mesh import check_mesh, mesh_sizes
from meshpar.pipeline.order import schedule_of
from meshpar.plan import Plan
from meshpar.roles import ROLES
from meshpar.runtime.build import build
from meshpar.runtime.failures import Together
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.originals import watch_originals
from meshpar.runtime.padding import RunSizes
from meshpar.sharding.policy import POLICIES
from meshpar.waiting import working

Example = Mapping[str, Any] | tuple[Any, ...]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    example: Example | None = None,
    config: ParallelConfig | str | Path | None = None,
    rules: Mapping[str, str] | None = None,
    plan: Plan | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    weights: WeightsFrom | None = None,
) -> ParallelModel:
    """A module that trains `model` over all axes of `mesh` and computes the same function, gradients included.

    `example`: one data rank's local batch, keyword arguments as a dict or positional ones as a tuple; may be left out when the model
    offers `dummy_inputs`. `config`: a ParallelConfig, or a file that `meshpar plan` wrote. `rules`: pattern of parameter names ->
    "tp:DIM" or "replicate", constraints on the solver. `plan`: an earlier plan for the same graph, mesh and configuration, obeyed as it
    is; PlanError says what differs where it was made for something else.
    `loss_fn(output, batch)`: the loss, where the model returns none. `weights`: safetensors to fill a model built on `meta` (or any other)
    from; each rank reads only its bytes. `mp.Weights(path, ...)` says what is accepted where a file does not fit the model: a new head,
    old buffers, another dtype. The given model is left as it is.

    Attributes that forward reads (also of objects, closures and globals) may change between steps, alike on every rank: set them on the
    model, on the module returned (`pm.beta = 0.5`, `pm.get_submodule(path)`) or on `pm.original_module`. A number that only enters
    arithmetic becomes an input of the program; any other change costs a capture. What forward writes is the returned module's own, once a
    step, and so are modes, requires_grad and buffers. `capture/state/ambient.py` lists what else may change, and what is done about it.

    Raises ConfigError, CaptureError, PlanError or BatchError before anything is allocated, CheckpointError for weights that do not fit.

        mesh = mp.make_mesh("dp=2,tp=2")
        pm = mp.parallelize(model, mesh, example=batch)
        loss = pm.train_step(**batch)
    """
    config = check_arguments(model, mesh, config, rules, loss_fn, plan=plan, weights=weights)
    check_mesh(mesh)
    check_supported(mesh)
    if (schedule := schedule_of(mesh, config)) is not None:
        schedule.order(config.microbatches)  # what it does not allow is told before anything is captured
    args, kwargs = example_of(model, example)
    together = Together(mesh)
    with together.section("parallelize"):
        return _parallelize(model, mesh, args, kwargs, config, rules, plan, loss_fn, weights, together)


def _parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: ParallelConfig,
    rules: Mapping[str, str] | None,
    plan: Plan | None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    weights: WeightsFrom | None,
    together: Together,
) -> ParallelModel:
    args, kwargs = RunSizes(mesh, config).alike(args, kwargs)
    check_batch((args, kwargs), mesh)
    programs = Programs(model, mesh, config, rules=rules, loss_fn=loss_fn, plan=plan)
    begun = time.monotonic()
    with working(f"capturing {type(model).__name__}"):
        seen = programs.seen(args, kwargs, training=model.training, microbatches=config.microbatches)  # capture: what the model computes
    with working("planning"):
        decided = programs.planned(seen)  # which rank holds what, and what moves
    with working("lowering"):
        program = programs.lowered(seen, decided)  # the part of it that this rank runs
    programs.seconds = time.monotonic() - begun
    agree(program.plan.hash, mesh, "the plan")
    agree_on_values(model, mesh, weights=weights)
    with working("making parameters" if weights is None else "reading weights"):
        engine = build(model, mesh, config, program, programs.schedule, weights=weights)
    pm = ParallelModel(engine, mesh, config, programs, program, together)
    watch_originals(model, pm)
    return pm


def check_supported(mesh: DeviceMesh) -> None:
    """Raise ConfigError for axes that programs cannot be made for yet."""
    missing = [name for name, size in mesh_sizes(mesh).items() if size > 1 and ROLES[name].typed and ROLES[name].divides not in POLICIES]
    if missing:
        raise ConfigError(
            f"parallelize does not support the axes {', '.join(missing)} yet; "
            f"use {', '.join(name for name, role in ROLES.items() if role.typed is None or role.divides in POLICIES)}."
        )


def example_of(model: nn.Module, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to capture a model with: those given, or its `dummy_inputs`."""
    if example is None:
        example = getattr(model, "dummy_inputs", None)
        if example is None:
            raise ConfigError(
                f"{type(model).__name__} needs an example batch to be captured: pass example=batch, the keyword arguments (a dict) or "
                f"positional ones (a tuple) of one data rank's local batch."
            )
    if isinstance(example, Mapping):
        return (), order_of(model)(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise ConfigError(f"example= must be a dict of keyword arguments or a tuple of positional ones, not {type(example).__name__}.")
