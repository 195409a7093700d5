"""Every program is read back before it is run: see `proof.static`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from meshpar.compile.denominators import Split
from meshpar.compile.program import Program
from meshpar.compile.split import StageGraph
from meshpar.compile.summed import left_alone
from meshpar.config import ParallelConfig
from meshpar.errors import ProgramFault
from meshpar.graph.captured import Captured
from meshpar.mesh import typed_axes
from meshpar.proof.static.check import ProgramPart, check
from meshpar.proof.static.claims import claims_of
from meshpar.proof.static.denominators import check_loss
from meshpar.proof.static.report import StaticReport
from meshpar.roles import ROLES
from meshpar.simulate import is_simulated


def proved(program: Program, mesh: DeviceMesh, config: ParallelConfig) -> Program:
    """The program, once it was read back. Warns where it contradicts the model's graph."""
    report = read_back(program, mesh, config)
    _tell(report)
    return replace(program, proof=report)


def proved_loss(captured: Captured, parts: Split, microbatches: int) -> StaticReport:
    """What can be proved of the loss of a step. Warns where the microbatches do not add up to the whole."""
    report = check_loss(captured, parts.captured, parts.counts, microbatches) if microbatches > 1 else StaticReport(0)
    _tell(report)
    return report


def _tell(report: StaticReport) -> None:
    """Warn of contradictions. (The check is younger than what it checks: it may be the one that errs, and `verify` decides.)"""
    try:
        report.check()
    except ProgramFault as fault:
        warnings.warn(str(fault), stacklevel=3)


def read_back(program: Program, mesh: DeviceMesh, config: ParallelConfig) -> StaticReport:
    """What can be proved of a program: of its graph, or of each way in which it is cut into stages."""
    captured, plan, axes = program.captured, program.plan, typed_axes(mesh)
    trained = frozenset(name for name, p in plan.parameters.items() if p.trainable)
    apart = trained if is_simulated() else left_alone(plan, mesh, config)
    summed: Mapping[str, frozenset[str]] = {a.name: trained - apart for a in axes if ROLES[a.name].sums}
    claims = claims_of(
        captured.graph,
        plan,
        axes,
        batch_dims=captured.batch_dims,
        loss=captured.loss,
        mutations=len(captured.mutations),
        summed=summed,
    )
    ways = (program.all_stages,) if program.stages == program.all_stages else (program.all_stages, program.stages)
    if program.step is not None:
        ways = (*ways, (program.step,))
    return check(claims, [_parts(program, stages) for stages in ways])


def _parts(program: Program, stages: Sequence[StageGraph]) -> list[ProgramPart]:
    """The graphs of a program, and which of the model's values each returns."""
    captured = program.captured
    returned: Any = next(n for n in reversed(captured.graph.nodes) if n.op == "output").args[0]
    if not stages:
        return [ProgramPart(program.graph, returns=tuple(range(len(returned))))]
    first = len(returned) - len(captured.mutations)
    buffers = {name: first + i for i, name in enumerate(captured.mutations)}
    return [ProgramPart(s.graph, s.receives, s.sends, (*s.outputs, *(buffers[name] for name in s.mutations))) for s in stages]
