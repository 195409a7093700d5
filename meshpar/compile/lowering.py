"""From a graph and its plan to what a rank runs: pure, without communication; ranks have agreed before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from meshpar.compile.hooks import check_stages
from meshpar.compile.ledger import ledger
from meshpar.compile.place import check_buffers, place
from meshpar.compile.priced import priced
from meshpar.compile.program import Program
from meshpar.compile.signature import BatchSignature
from meshpar.compile.split import StageGraph, split
from meshpar.compile.summed import unmanaged
from meshpar.config import ParallelConfig
from meshpar.graph.captured import Captured
from meshpar.mesh import typed_axes
from meshpar.passes import order
from meshpar.pipeline.order import Schedule
from meshpar.plan import Plan
from meshpar.roles import ROLES


@dataclass(frozen=True)
class Lowering:
    """Makes the programs of one rank."""

    mesh: DeviceMesh
    config: ParallelConfig
    schedule: Schedule | None
    device: str
    """Where its programs run: "cuda" also where ranks of it do not exist."""

    def program(self, signature: BatchSignature, captured: Captured, plan: Plan) -> Program:
        """That of a step; with a pipeline, by stages (then the ledger is still to come: stages of one rank do not send to each other)."""
        if self.schedule is None:
            return self.whole(signature, captured, plan)
        graph = self._lowered(captured, plan)
        if self.schedule.defers(self.config.microbatches):
            graph = order.deferred(graph, frozenset(captured.parameters))
        program = in_stages(Program(signature, captured, plan, graph))
        check_buffers(program.all_stages, plan)
        check_stages(program.all_stages, [stage.rank for stage in plan.stages], captured.hooks)
        if self.config.logits_bytes is not None:
            for stage in program.stages:
                order.chunked(stage.graph, self.config.logits_bytes)
        for graph in dict.fromkeys(stage.graph for stage in (*program.all_stages, *program.stages)):
            self._finished(graph)
        return program

    def whole(self, signature: BatchSignature, captured: Captured, plan: Plan) -> Program:
        """One that every rank runs from its first to its last call."""
        graph = self._lowered(captured, plan)
        step = self._loss_alone(graph, captured)
        graph = self._finished(graph)
        return Program(signature, captured, replace(plan, ledger=ledger(graph, priced(self.config, self.mesh))), graph, step=step)

    def _loss_alone(self, graph: fx.Graph, captured: Captured) -> StageGraph | None:
        """The same for its loss alone, whose logits nobody else is to have: in chunks, where that is asked for."""
        if self.config.logits_bytes is None or captured.loss is None:
            return None
        (step,) = split(graph, 1, parameters=frozenset(captured.parameters), mutations=captured.mutations, wanted=(captured.loss,))
        self._finished(order.chunked(step.graph, self.config.logits_bytes))
        return step

    def _lowered(self, captured: Captured, plan: Plan) -> fx.Graph:
        if plan.stages:
            place(captured.graph, plan.stages, {**{name: p.stages for name, p in plan.parameters.items()}, **plan.buffers})
        axes = typed_axes(self.mesh)
        summed = {a.name: unmanaged(plan, a.name, self.mesh, self.config) for a in axes if ROLES[a.name].sums}
        return order.lowered(captured.graph, {a.axis: a for a in plan.axes}, axes, frozenset(captured.parameters), summed)

    def _finished(self, graph: fx.Graph) -> fx.Graph:
        config = self.config
        keeps, overlap = config.recompute != "selective", config.overlap_tensor_parallel
        known = config.hardware is not None or self.device != "cpu"  # (no two CPUs are alike)
        price = priced(config, self.mesh) if known else None
        return order.finished(graph, results=keeps, overlap=overlap, again=config.recompute == "none", price=price)


def in_stages(program: Program) -> Program:
    """The program with its graph cut into the stages of its plan, as every call is marked.

    A stage that computes the same for the loss alone as for every output (all but the last, as a rule) is one graph.
    """
    captured, count = program.captured, len(program.plan.stages)
    cut = partial(split, program.graph, count, parameters=frozenset(captured.parameters), mutations=captured.mutations)
    every = cut()
    alone = every if captured.loss is None else cut(wanted=(captured.loss,))
    return replace(program, all_stages=every, stages=tuple(a if _is_same(a, b) else b for a, b in zip(every, alone, strict=True)))


def _is_same(one: StageGraph, other: StageGraph) -> bool:
    """Whether two cuts of one graph are the same stage: names are those of the whole graph."""
    return replace(one, graph=other.graph) == other and [n.name for n in one.graph.nodes] == [n.name for n in other.graph.nodes]
