"""See a program before paying for it: the very plan that `parallelize` would execute, on ranks that do not exist.

    found = mp.dry_run(model, "pp=8,dp=8,tp=8", config, hardware="h100", example=batch)
    print(found)                          # memory of every pipeline rank, communication, time, utilisation
    found.to_json(); found.plot("plan.png")

The stages of the plan run once on tensors without memory (`rehearsal`), what they ask of the machine is read off (`reader`), and the
planner's cost model says how long that takes (`meshpar.planner`; how far to trust it: benchmarks/planner_accuracy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshpar import roles
from meshpar.api import Example, check_supported, example_of
from meshpar.compile.program import Program
from meshpar.compile.programs import Programs
from meshpar.config import ParallelConfig
from meshpar.dry_run.ledger import ledger
from meshpar.dry_run.memory import needs
from meshpar.dry_run.pricing import Pricing
from meshpar.dry_run.reader import workload
from meshpar.dry_run.rehearsal import Rehearsed, absent, rehearse
from meshpar.dry_run.result import DryRun
from meshpar.mesh import format_mesh, parse_mesh, rank_grid
from meshpar.passes.inputs import extra_inputs
from meshpar.pipeline.order import Schedule
from meshpar.planner import Cluster, Constants, Hardware, Stack
from meshpar.planner import stack as stack_of
from meshpar.planner.hardware import hardware as hardware_of
from meshpar.waiting import working

__all__ = ["DryRun", "dry_run"]
OURS = "meshpar"
"""The stack that stands for this runtime: then bytes are those that it allocates."""


@working("running on ranks that do not exist")
def dry_run(
    model: nn.Module,
    mesh: str | Path | Mapping[str, int],
    config: ParallelConfig | str | Path | None = None,
    *,
    hardware: str | Path | Hardware = "h100",
    example: Example | None = None,
    stack: str | Stack = OURS,
    rules: Mapping[str, str] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    constants: Constants | None = None,
) -> DryRun:
    """What `parallelize(model, mesh, example=example, config=config)` would need and take on a cluster, without it.

    `model` may be on `meta`: 175 B parameters on 512 ranks take less than a minute and 3 GiB. `example` is the local batch of one data
    rank, of all its microbatches. `hardware` is a name in `planner.HARDWARE`, a file that `mp.calibrate` wrote of a machine, or a
    `planner.Hardware`; the program is the one that such ranks would run with this `config` (whose own `hardware` decides what is left to
    price). `stack` says whose software: "meshpar" counts what this runtime allocates and overlaps; another of `planner.STACKS` prices the
    same program as that software would run it (its bytes per parameter, what it keeps and gathers again, its kernels, its overlap).

    Raises ConfigError for unknown hardware or stacks (with the known ones), a cluster that cannot be, or inside a job; and whatever
    `parallelize` raises.

    >>> found = dry_run(model, "pp=2,dp=64,tp=8", hardware="h100", example=batch)    # doctest: +SKIP
    >>> found.ranks[0].peak / 2**30, found.time.seconds, found.mfu["causal"]         # doctest: +SKIP
    """
    config = ParallelConfig.from_toml(config) if isinstance(config, (str, Path)) else config or ParallelConfig()
    sizes = parse_mesh(mesh)
    part, software = hardware if isinstance(hardware, Hardware) else hardware_of(hardware), stack_of(stack)
    Cluster(part, prod(sizes.values()))
    args, kwargs = example_of(model, example)
    config = _as_run_by(software, config)
    with absent(sizes) as there:
        check_supported(there)
        programs = Programs(model, there, config, rules=rules, loss_fn=loss_fn)
        if part.measured is None:
            programs.lowering = replace(programs.lowering, device="cuda")
        program = programs.make(args, kwargs, training=model.training, microbatches=config.microbatches)
        stages = rehearse(programs, program, model, there, config)
        grids = rank_grid(there)
        work = workload(
            stages,
            program,
            there,
            programs.schedule,
            config.microbatches,
            fused=software.fused,
            regathers=software.name != OURS,
        )
    known = constants or Constants.default()
    return _priced(program, stages, work, programs.schedule, config, sizes, part, software, known, grids)


def _as_run_by(software: Stack, config: ParallelConfig) -> ParallelConfig:
    """The configuration for a stack: another one gathers and sums as it is said to (`Stack.hides_tp`), not in our pieces; where its
    selective recompute means the core of attention, a fused attention leaves nothing to compute again."""
    if software.name == OURS:
        return config
    core_only = software.selective == "attention" and config.recompute == "selective"
    return replace(config, overlap_tensor_parallel=False, recompute="none" if core_only else config.recompute)


def _priced(
    program: Program,
    stages: tuple[Rehearsed, ...],
    work: Any,
    schedule: Schedule | None,
    config: ParallelConfig,
    sizes: Mapping[str, int],
    part: Hardware,
    software: Stack,
    constants: Constants,
    grids: str,
) -> DryRun:
    order = None if schedule is None else schedule.order(config.microbatches)
    pricing = Pricing(work, order, software.counted(), constants)
    time = pricing.on(part)
    axes = work.axes
    shared = axes["dp"].size // prod(sizes[name] for name in roles.copying(sizes))
    memory = needs(
        stages,
        order,
        config.microbatches,
        stack=None if software.name == OURS else software,
        data=(config.data_parallel, shared, max(1, shared // axes["ep"].size)),
        constants=constants,
    )
    precision = _precision(work)
    rate = work.tokens / time.seconds / work.gpus
    return DryRun(
        mesh=format_mesh(sizes),
        gpus=work.gpus,
        hardware=part,
        software=software.name,
        config=config,
        precision=precision,
        ranks=memory,
        ledger=ledger(work, part, time.seconds),
        time=time,
        spread=pricing.spread(part, "experts" if extra_inputs(program.graph).expert_tally else "dense"),
        tokens=work.tokens,
        mfu={name: rate * flops / part.peak(precision) for name, flops in work.info.items()},
        workload=work,
        order=order,
        grids=grids,
        notes=program.plan.notes,
        pricing=pricing,
    )


def _precision(work: Any) -> str:
    """The precision in which most of the products are."""
    sums: dict[str, float] = {}
    for stage in work.stages:
        for layer, times in stage.layers:
            for o in layer.operators:
                sums[o.dtype] = sums.get(o.dtype, 0.0) + o.flops * times
    return max(sums, key=lambda name: sums[name], default="bf16")
