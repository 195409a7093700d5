"""From a model and a batch to a program: capture, decide, lower. One program per batch structure, as `jit` has one per shape."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import pytree, without_modes
from meshpar.capture.copies import copied, memories, refuse_originals
from meshpar.capture.experts.seam import advise
from meshpar.capture.export import capture
from meshpar.capture.hooks.models import ModelHooks
from meshpar.capture.state.places import Place
from meshpar.capture.state.taken import Ask, say
from meshpar.capture.structure import order_of
from meshpar.compile.agreement import agree_on_graph
from meshpar.compile.decide import Decision, StageRequest, decide
from meshpar.compile.denominators import split_denominators
from meshpar.compile.given import check_given
from meshpar.compile.hooks import check_microbatches, check_stages
from meshpar.compile.ledger import ledger, staged_ledger
from meshpar.compile.place import place
from meshpar.compile.split import StageGraph, split
from meshpar.compile.state.following import Following
from meshpar.compile.state.held import variant
from meshpar.compile.state.leaves import describe
from meshpar.config import ParallelConfig
from meshpar.errors import BatchError, ConfigError, PlanError
from meshpar.graph.captured import Captured, Slot
from meshpar.graph.text import fingerprint
from meshpar.mesh import Axis, agree, data_axis, mesh_sizes, typed_axes
from meshpar.passes.attention import SimplifyAttention
from meshpar.passes.batch_norm import expand_batch_norm
from meshpar.passes.coalesce import Coalesce
from meshpar.passes.inputs import ExtraInputs, extra_inputs
from meshpar.passes.lower import Lower
from meshpar.passes.randomness import SeedRandom
from meshpar.passes.reduce import ReduceGradients
from meshpar.passes.reuse import Reuse
from meshpar.passes.tally import TallyExperts
from meshpar.passes.weight_gradients import DeferWeightGradients
from meshpar.pipeline.order import schedule_of
from meshpar.plan import ParameterPlan, Plan
from meshpar.roles import ROLES, copying, dividing, summing
from meshpar.sharding.types import Owned, Shard
from meshpar.simulate import is_simulated

T = TypeVar("T")


@dataclass(frozen=True)
class BatchSignature:
    """What a batch must look like to run a program: structure, shapes and dtypes, and the values of what is not a tensor."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    training: bool
    state: str = ""
    """A fingerprint of what else the program was made for: see `capture.state`; empty for a batch."""

    @cached_property
    def key(self) -> str:
        """A name for the program in the module tree."""
        digest = hashlib.sha256(f"{self.spec} {self.leaves} {self.state}".encode()).hexdigest()[:8]
        return f"{'train' if self.training else 'eval'}_{digest}"

    @property
    def counting(self) -> BatchSignature:
        """That of the program which counts the denominators of such a batch."""
        return replace(self, leaves=(*self.leaves, "counts"))


@dataclass(frozen=True)
class Program:
    """A lowered graph, and how batches go in and outputs come out."""

    signature: BatchSignature
    captured: Captured
    plan: Plan
    graph: fx.Graph
    counts: Program | None = None
    """Counts the denominators of one microbatch, where the loss has any and the step several microbatches."""
    averaged: tuple[str, ...] = ()
    """Terms of the loss that are averaged over microbatches."""
    within: tuple[str, ...] = ()
    """Modules that take statistics of a microbatch."""
    stages: tuple[StageGraph, ...] = ()
    """Where the mesh has a pipeline: the graph by stages, returning the loss alone."""
    all_stages: tuple[StageGraph, ...] = ()
    """The same, returning every output."""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's placeholders, in order."""
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "placeholder")

    @cached_property
    def extra(self) -> ExtraInputs:
        """What the graph takes beside the batch."""
        return extra_inputs(self.graph)

    @property
    def key(self) -> str:
        """The name under which the module tree runs this program."""
        return self.signature.key


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> tuple[list[torch.Tensor], BatchSignature]:
    """The tensors of a batch, and its signature; keyword arguments are in the model's order."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors, BatchSignature(spec, tuple(map(describe, leaves)), training)


class Programs:
    """Makes programs for one model on one mesh. Placements of parameters are those of the first."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        config: ParallelConfig,
        *,
        rules: Mapping[str, str] | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.hooks = ModelHooks(model)
        self.skeleton = _skeleton(model)
        self.following = Following(model, self.skeleton)
        self.originals = memories(model)
        self.ordered = order_of(model)
        self.mesh, self.config, self.rules, self.loss_fn, self.given = mesh, config, dict(rules or {}), loss_fn, plan
        self.others = parameter_facts(model)
        self.first = dict(self.others)
        """The same as parallelize saw it."""
        self.schedule = schedule_of(mesh, config)
        self.pinned: dict[str, ParameterPlan] = {}

    def copy(self) -> Programs:
        """The same for another copy of the model, whose attributes and modes are its own."""
        new = copy.copy(self)
        new.skeleton = _skeleton(self.skeleton)
        new.following = self.following.copy(new.skeleton)
        new.others, new.pinned = dict(self.others), dict(self.pinned)
        return new

    def set_trainable(self, flags: Mapping[str, bool]) -> None:
        """From now on, programs are made for parameters of which these require gradients, or do not."""
        for name, flag in flags.items():
            self.skeleton.get_parameter(name).requires_grad_(flag)
            self.others[name] = (*self.others[name][:2], flag)

    def make(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool,
        microbatches: int = 1,
        numbers: Sequence[Place] = (),
        roots: Mapping[str, Any] | None = None,
        trainable: str = "",
    ) -> Program:
        """The program for a batch like this one, and for the state of this moment. Collective over the mesh the first time.

        `numbers`: places whose numbers become inputs, `roots`: where those begin that are not in the model. `trainable`: a name for which
        parameters require gradients.
        """
        _, signature = flatten(args, self.ordered(kwargs), training)
        ask = Ask(self.following.original, tuple(numbers), roots or {}, torch.is_grad_enabled())
        captured = self._capture(args, kwargs, microbatches, ask)
        refuse_originals(captured.constants, self.originals)
        self.originals = {}  # (the model may be gone when the next program is made, and its memory somebody else's)
        say(captured.state.notes, self.skeleton)
        signature = replace(signature, state=f"{variant(captured.state)}{trainable}")
        if microbatches == 1:
            return self._program(signature, captured)
        if captured.loss is None:
            raise BatchError(
                "a step of several microbatches needs a loss: pass labels if the model computes it from them, or loss_fn= to parallelize."
            )
        check_microbatches(captured)
        parted = split_denominators(captured, microbatches)
        counts = None
        if parted.counts is not None:
            counts = self._program(signature.counting, parted.counts, remember=False)
        program = self._program(signature, parted.captured)
        return replace(program, counts=counts, averaged=parted.averaged, within=parted.within)

    def _capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int, ask: Ask) -> Captured:
        device = torch.device(self.mesh.device_type)
        scale = data_axis(self.mesh).size
        with without_modes():
            captured = capture(
                self.skeleton,
                args,
                kwargs,
                device=device,
                scale=scale,
                divide=microbatches,
                loss_fn=self.loss_fn,
                dtype=self.config.precision.compute_dtype,
                given=self.hooks.given,
                ask=ask,
            )
        if scale > 1:
            expand_batch_norm(captured.graph)
        if any(mesh_sizes(self.mesh)[name] > 1 for name in dividing("sequence", mesh_sizes(self.mesh))):
            SimplifyAttention(windows=True)(captured.graph)  # a part of a causal mask is not causal: it is read while it is whole
        return captured

    def _program(self, signature: BatchSignature, captured: Captured, *, remember: bool = True) -> Program:
        if remember:
            self._check_experts(captured)
        plan = self._plan(captured, remember=remember)
        if remember and not self.pinned:
            self.pinned = dict(plan.parameters)
        if plan.stages:
            place(captured.graph, plan.stages, {name: p.stages for name, p in plan.parameters.items()})
        axes = typed_axes(self.mesh)
        summed = {a.name: unmanaged(plan, a.name, self.mesh, self.config) for a in axes if ROLES[a.name].sums}
        graph = lowered(captured, plan, axes, summed)
        if plan.stages and remember:
            return self._staged(signature, captured, plan, graph)
        return Program(signature, captured, replace(plan, ledger=ledger(graph)), self._reuse(graph))

    def _staged(self, signature: BatchSignature, captured: Captured, plan: Plan, graph: fx.Graph) -> Program:
        """The program of a pipeline: the graph once more by stages."""
        assert self.schedule is not None
        if self.schedule.defers(self.config.microbatches):
            graph = DeferWeightGradients(frozenset(captured.parameters))(graph)
        program = in_stages(Program(signature, captured, plan, graph))
        check_stages(program.all_stages, [stage.rank for stage in plan.stages], captured.hooks)
        for stage in (*program.all_stages, *program.stages):
            self._reuse(stage.graph)
        return self._with_ledger(program)

    @property
    def _reuse(self) -> Reuse:
        return Reuse(results=self.config.recompute != "selective")

    def _with_ledger(self, program: Program) -> Program:
        """With the communication of a pipeline as the first rank has it: where values are cut unevenly, no rank sends more."""
        ledger = staged_ledger(program.stages, [stage.rank for stage in program.plan.stages])
        if not self._decides_alone():
            ledger = _from_first_rank(self.mesh, lambda: ledger)
        return replace(program, plan=replace(program.plan, ledger=ledger))

    def _plan(self, captured: Captured, *, remember: bool) -> Plan:
        """Solved on the first rank of the mesh and sent to the others, who must have captured the same graph; or the one that was given."""
        if not self._decides_alone():
            agree_on_graph(captured, self.others, self.mesh)
            asked = f"{self.config} {sorted(self.rules.items())} {self.given and self.given.hash}"
            agree(asked, self.mesh, "the configuration, the rules or the plan that was given")
        first = remember and not self.pinned
        staged = self._stage_request() if remember and self.schedule is not None else None
        if self.given is not None and first:
            ranks = () if staged is None else staged.ranks
            check_given(self.given, captured, self.others, mesh_sizes(self.mesh), self._options, ranks, simulated=is_simulated())
        if self.given is not None and self.given.graph == fingerprint(captured):
            return self.given
        request = Decision(
            tuple(mesh_sizes(self.mesh).items()),
            tuple((a.name, a.size) for a in typed_axes(self.mesh)),
            sequence=self.config.sequence_parallel,
            context=self.config.context,
            rules=self.rules if not self.pinned else {},
            pinned=self.pinned,
            stages=staged,
            owned=not is_simulated(),
            options=self._options,
            others=self.others,
        )
        if self._decides_alone():
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
            "rules": self.rules,
        }
        if self.schedule is not None:
            stages = None if config.stages is None else list(config.stages)
            asked |= {"schedule": config.schedule, "virtual_stages": config.virtual_stages, "stages": stages}
        return asked

    def _decides_alone(self) -> bool:
        """Whether this process stands for all ranks."""
        return is_simulated() or dist.get_backend() == "fake" or self.mesh.size() == 1

    def _check_experts(self, captured: Captured) -> None:
        (name,) = dividing("experts")
        ranks = mesh_sizes(self.mesh).get(name, 1)
        if ranks > 1 and not any(node.target is torch.ops.meshpar.grouped_mm.default for node in captured.graph.nodes):
            advice = advise(captured.unrecognised)
            raise ConfigError(
                f"{name}={ranks} divides experts among ranks, and the model has none that could be divided. Use dp={ranks} instead: "
                f"outside of experts, {name} is data parallelism." + (f"\n{advice}" if advice else "")
            )

    def _stage_request(self) -> StageRequest:
        assert self.schedule is not None
        return StageRequest(self.schedule.order(1, backward=False).place, self.config.stages)


def parameter_facts(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str, bool]]:
    """The shape, the dtype and whether it is trained, of every parameter."""
    return {n: (tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad) for n, p in model.named_parameters()}


def parts_of(captured: Captured, tensors: Sequence[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    """The tensors of a batch for each of `count` microbatches: those with samples are cut, the others are the same for all."""
    if count == 1:
        return [list(tensors)]
    dims, names = captured.batch_dims, captured.inputs[: len(tensors)]
    cut = [x.chunk(count, dims[n]) if n in dims else (x,) * count for n, x in zip(names, tensors, strict=True)]
    return [list(part) for part in zip(*cut, strict=True)]


def in_stages(program: Program) -> Program:
    """The program with its graph cut into the stages of its plan, as every call is marked."""
    captured, count = program.captured, len(program.plan.stages)
    cut = partial(split, program.graph, count, parameters=frozenset(captured.parameters), mutations=captured.mutations)
    every = cut()
    return replace(program, all_stages=every, stages=every if captured.loss is None else cut(wanted=(captured.loss,)))


def lowered(captured: Captured, plan: Plan, axes: tuple[Axis, ...], summed: Mapping[str, frozenset[str]] | None = None) -> fx.Graph:
    """The captured graph as this rank runs it. `summed`: data axis -> parameters whose gradients the graph itself sums over it."""
    graph = captured.graph
    for one in axes:
        found = plan.axis(one.name)
        if found is not None:
            graph = Lower(found, one)(graph)
    if graph is captured.graph:
        graph = _copied(graph)
    graph = SimplifyAttention()(graph)
    parameters = frozenset(captured.parameters)
    for one in axes:
        names = (summed or {}).get(one.name)
        if names and one.size > 1:
            graph = ReduceGradients(one, names & parameters)(graph)
    return TallyExperts()(SeedRandom(axes)(Coalesce(parameters)(graph)))


def unmanaged(plan: Plan, axis: str, mesh: DeviceMesh, config: ParallelConfig) -> frozenset[str]:
    """The parameters whose gradients FSDP2 does not sum over a data axis, and that no rank has to itself.

    All of them where ranks are simulated; else those that two stages of one rank use (it manages every stage by itself), those without
    dims, and experts that it would have to replicate while it shares out others.
    """
    names = (n for n, p in plan.parameters.items() if not isinstance(p.placements.get(axis), (Shard, Owned)))
    if is_simulated():
        return frozenset(names)
    return frozenset(names) & left_alone(plan, mesh, config)


def left_alone(plan: Plan, mesh: DeviceMesh, config: ParallelConfig) -> frozenset[str]:
    """The parameters that data parallelism does not manage."""
    data = summing(mesh.mesh_dim_names or ())
    if not data:
        return frozenset()
    ranks = {name: [plan.stages[s].rank for s in p.stages] for name, p in plan.parameters.items() if len(p.stages) > 1}
    found = {name for name, held in ranks.items() if len(set(held)) < len(held)}
    found |= {name for name, p in plan.parameters.items() if not p.shape}  # without dims: nothing to share out
    dense = summing(data, without="experts")
    if config.data_parallel == "replicate" or set(dense) <= set(copying(dense)):
        experts = dividing("experts", data)
        found |= {name for name, p in plan.parameters.items() if any(isinstance(p.placements.get(n), (Shard, Owned)) for n in experts)}
    return frozenset(found)


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
    return new


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have no memory, so that new shapes can be captured when the model is gone."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copied(model, memo)


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


def restore(program: Program, values: Callable[[int], Any]) -> Any:
    """The model's own output structure, with `values(i)` in the place of the i-th tensor."""
    leaves = [values(int(leaf.key)) if isinstance(leaf, Slot) else leaf for leaf in program.captured.out_leaves]
    return pytree.tree_unflatten(leaves, program.captured.out_spec)
