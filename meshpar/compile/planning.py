"""The plan of every program of a run: solved on the first rank and sent to the others, or the one that was given.

Parameters lie where the first plan of a training program put them; every later one is made around that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.capture.experts.seam import advise
from meshpar.compile.agreement import agree_on_graph
from meshpar.compile.balance import ExampleBatch
from meshpar.compile.claimed import check_rules
from meshpar.compile.decide import Decision, StageRequest, decide, place_as_before
from meshpar.compile.given import ParameterFacts, check_given
from meshpar.compile.place import place
from meshpar.compile.priced import priced
from meshpar.compile.shapes.plans import Plans
from meshpar.config import ParallelConfig
from meshpar.consensus import agree
from meshpar.errors import ConfigError, PlanError
from meshpar.graph.captured import Captured
from meshpar.graph.text import calls_of, fingerprint
from meshpar.mesh import mesh_sizes, typed_axes
from meshpar.pipeline.order import schedule_of
from meshpar.plan import ParameterPlan, Plan, StagePlan
from meshpar.roles import dividing
from meshpar.simulate import is_simulated

T = TypeVar("T")


class Planner:
    """Plans the programs of one model on one mesh. `rules`: the user's; `given`: a plan to be obeyed."""

    def __init__(self, mesh: DeviceMesh, config: ParallelConfig, rules: Mapping[str, str] | None = None, given: Plan | None = None) -> None:
        self.mesh, self.config, self.rules, self.given = mesh, config, dict(rules or {}), given
        self.schedule = schedule_of(mesh, config)
        self.pinned: dict[str, ParameterPlan] = {}
        self.buffers: Mapping[str, tuple[int, ...]] = {}
        self.first: tuple[str, tuple[StagePlan, ...]] = "", ()
        """The calls of the first graph, and its stages: where others have the same, they are on the same stages."""
        self.chunks = 0
        """How many pieces of sequences each rank has, where an example told, and they are more than usual."""
        self.plans = Plans()

    def copy(self) -> Planner:
        """The same for a copy of the model."""
        new = copy.copy(self)
        new.pinned, new.plans = dict(self.pinned), Plans()
        return new

    def plan(self, captured: Captured, parameters: ParameterFacts, example: ExampleBatch | None = None) -> Plan:
        """The plan of a step. Collective; raises PlanError where ranks differ or the plan that was given does not fit.

        `example`: a batch whose values may tell what is best.
        """
        self._check_experts(captured)
        self._agree(captured, parameters)
        check_rules(captured.graph)
        stages = self._stages()
        if self.given is not None and not self.pinned:
            ranks = () if stages is None else stages.ranks
            check_given(self.given, captured, parameters, mesh_sizes(self.mesh), self._options, ranks, simulated=is_simulated())
        calls = calls_of(captured)  # (a solver leaves its marks in a graph)
        plan = self._planned(captured, parameters, stages, example)
        if not self.pinned:
            self.pinned, self.buffers = dict(plan.parameters), plan.buffers
            self.first = calls, plan.stages
            self.chunks = max((axis.chunks for axis in plan.axes if axis.chunks > 2), default=0)
        return plan

    def plan_counts(self, captured: Captured, parameters: ParameterFacts) -> Plan:
        """That of a program which counts the denominators of a loss: it runs whole on every stage, and parameters are not placed by it."""
        self._agree(captured, parameters)
        return self._planned(captured, parameters, None)

    def from_first_rank(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank of the mesh, on all of them."""
        return make() if self._alone else _from_first_rank(self.mesh, make)

    @property
    def _alone(self) -> bool:
        """Whether this process stands for all ranks."""
        return is_simulated() or dist.get_backend() == "fake" or self.mesh.size() == 1

    def _agree(self, captured: Captured, parameters: ParameterFacts) -> None:
        if not self._alone:
            agree_on_graph(captured, parameters, self.mesh)
            decided = replace(self.config, compile=False)  # which each rank may do its own way: a function in it prints where it lies
            asked = f"{decided} {sorted(self.rules.items())} {self.given and self.given.hash}"
            agree(asked, self.mesh, "the configuration, the rules or the plan that was given")

    def _planned(
        self, captured: Captured, parameters: ParameterFacts, stages: StageRequest | None, example: ExampleBatch | None = None
    ) -> Plan:
        if self.given is not None and self.given.graph == fingerprint(captured):
            return self.given
        request = Decision(
            tuple(mesh_sizes(self.mesh).items()),
            tuple((a.name, a.size) for a in typed_axes(self.mesh)),
            sequence=self.config.sequence_parallel,
            context=self.config.context,
            chunks=None if self.config.context_chunks == "auto" else self.config.context_chunks,
            before=self.chunks,
            example=example,
            rules=self.rules if not self.pinned else {},
            pinned=self.pinned,
            buffers=self.buffers,
            stages=stages,
            earlier=self.first[1] if self.pinned and stages is not None and self.first[0] == calls_of(captured) else (),
            owned=not is_simulated(),
            ordered=self.config.outputs == "cut",
            options=self._options,
            price=priced(self.config, self.mesh),
            others=parameters,
        )
        like = stages is None, tuple(trains for _, _, trains in parameters.values())
        if self.pinned:
            if request.stages is not None:
                place_as_before(captured, request)
            if (found := self.plans.at(captured, like)) is not None:
                return found
        plan = self._decided(captured, request)
        if plan.stages:  # where it was not decided, too: what is learned of a graph is the same on all ranks
            place(captured.graph, plan.stages, {name: p.stages for name, p in plan.parameters.items()}, plan.buffers)
        self.plans.learn(captured, like, plan)
        return plan

    def _decided(self, captured: Captured, request: Decision) -> Plan:
        if self._alone:
            return decide(captured, request)
        return Plan.from_json(_from_first_rank(self.mesh, lambda: decide(captured, request).to_json()))

    @property
    def _options(self) -> dict[str, Any]:
        """What a plan records of what was asked for."""
        config = self.config
        asked: dict[str, Any] = {
            "microbatches": config.microbatches,
            "recompute": config.recompute,
            "data_parallel": config.data_parallel,
            "sequence_parallel": config.sequence_parallel,
            "context": config.context,
            "context_chunks": config.context_chunks,
            "outputs": config.outputs,
            "rules": self.rules,
        }
        if config.hardware is not None:
            asked["hardware"] = config.hardware.name
        if self.schedule is not None:
            stages = None if config.stages is None else list(config.stages)
            asked |= {"schedule": config.schedule, "virtual_stages": config.virtual_stages, "stages": stages}
        return asked

    def _stages(self) -> StageRequest | None:
        if self.schedule is None:
            return None
        return StageRequest(self.schedule.order(1, backward=False).place, self.config.stages)

    def _check_experts(self, captured: Captured) -> None:
        sizes = mesh_sizes(self.mesh)
        cutting = [name for name in dividing("experts", sizes) if sizes[name] > 1]
        if cutting and not any(node.target is torch.ops.meshpar.grouped_mm.default for node in captured.graph.nodes):
            name, ranks = cutting[0], sizes[cutting[0]]
            advice = advise(captured.unrecognised)
            raise ConfigError(
                f"{name}={ranks} divides experts among ranks, and the model has none that could be divided. Use dp={ranks} instead: "
                f"outside of experts, {name} is data parallelism." + (f"\n{advice}" if advice else "")
            )


def _from_first_rank(mesh: DeviceMesh, make: Callable[[], T]) -> T:
    ranks = mesh.mesh.flatten().tolist()
    sent: list[Any] = [None]
    if dist.get_rank() == ranks[0]:
        try:
            sent = [make()]
        except PlanError as error:
            sent = [error]
    dist.broadcast_object_list(sent, src=ranks[0], group=_whole_group(mesh))
    if isinstance(sent[0], PlanError):
        raise sent[0]
    found: T = sent[0]
    return found


def _whole_group(mesh: DeviceMesh) -> Any:
    if mesh.size() != dist.get_world_size():
        raise PlanError(
            f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks; meshes over a part of the world are not supported yet."
        )
    return None
