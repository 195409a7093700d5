"""From a captured graph to a Plan: solve one mesh axis after the other, lowering in between so that the next one sees local shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

from torch import fx

from meshpar.compile.balance import ExampleBatch, as_asked, as_before, in_pieces
from meshpar.compile.ground import Staging
from meshpar.compile.place import place
from meshpar.compile.samples import of_own_samples
from meshpar.compile.split import mark, split, updaters
from meshpar.compile.stages import choose
from meshpar.errors import PlanError, near_pattern, raise_all
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info
from meshpar.graph.op import op_name
from meshpar.graph.operators import operator_of
from meshpar.graph.text import fingerprint, inputs_of
from meshpar.mesh import Axis
from meshpar.passes.lower import Lower
from meshpar.plan import AxisPlan, ParameterPlan, Plan, StagePlan
from meshpar.roles import ROLES, dividing
from meshpar.sharding.infer import Inference, infer
from meshpar.sharding.policy import Request, expert_stacks
from meshpar.sharding.price import Price
from meshpar.sharding.solve import solved
from meshpar.sharding.types import I, Owned, R, Shard, Type


@dataclass(frozen=True)
class StageRequest:
    """A pipeline: `ranks` says which rank of `pp` runs each stage; `cuts` where stages begin, if the user said so."""

    ranks: tuple[int, ...]
    cuts: Sequence[int] | Sequence[str] | None = None
    chosen: Staging | None = None
    """Where stages begin, if that has been chosen already."""


@dataclass(frozen=True)
class Decision:
    """What is asked of the solver besides the graph."""

    mesh: tuple[tuple[str, int], ...]
    """All axes of the mesh, outermost first."""
    axes: tuple[tuple[str, int], ...]
    """The axes to type, in order: ("dp", 2) for all data axes but `ep` together, then ("ep", 2), then ("tp", 2)."""
    sequence: bool | Literal["auto"] = True
    context: str = "auto"
    """How attention is computed where an axis cuts the sequence."""
    chunks: int | None = None
    """How many pieces of it each rank gets; None leaves it to what attention computes."""
    before: int = 0
    """How many an earlier program has, for which an example told; else 0."""
    example: ExampleBatch | None = None
    """A batch that tells what masks hide."""
    rules: Mapping[str, str] = field(default_factory=dict)
    """The user's: pattern of parameter names -> "tp:DIM" or "replicate"."""
    pinned: Mapping[str, ParameterPlan] = field(default_factory=dict)
    """What an earlier plan said of parameters: it never changes."""
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What an earlier plan said of buffers: the stages that keep them."""
    stages: StageRequest | None = None
    earlier: tuple[StagePlan, ...] = ()
    """The stages of an earlier plan, if its graph had the same calls."""
    owned: bool = False
    """Whether parameters may lie on one rank of `ep` alone: not where ranks are simulated, which all run one program."""
    ordered: bool = True
    """Whether outputs that are cut leave in global order."""
    options: Mapping[str, Any] = field(default_factory=dict)
    price: Price = field(default_factory=Price)
    others: Mapping[str, tuple[tuple[int, ...], str, bool]] = field(default_factory=dict)
    """All parameters of the model: shape, dtype, trainable; those the graph does not use stay whole."""


def decide(captured: Captured, request: Decision) -> Plan:
    """The plan for one graph. Deterministic: equal arguments give equal plans.

    Raises PlanError when a rule matches nothing or cannot be met.
    """
    wanted = _rules(request.rules, captured, request)
    graph, axes = captured.graph, list[AxisPlan]()
    whole = infer(graph)
    outputs = _pinned_outputs(captured)
    stages, held, kept = _stages(captured, request)
    if stages:
        place(graph, stages, held, kept)
    for at, (name, size) in enumerate(request.axes):
        if size == 1:
            continue
        role = ROLES[name]
        plan = _solved(
            graph,
            Request(
                name,
                size,
                role.divides,
                inputs=captured.batch_dims if role.own_batches else {},
                parameters=frozenset(captured.parameters),
                price=request.price,
                pinned=_pinned(request, name),
                wanted=wanted.get(name, {}),
                owned=request.owned,
                sequence=request.sequence,
                outputs=outputs,
                ordered=request.ordered,
                context=request.context,
                chunks=request.chunks,
                inner=prod(n for other, n in request.axes[at + 1 :] if ROLES[other].divides == "weights"),
                samples=captured.batch_dims,
                sharing=prod(n for other, n in request.axes[at + 1 :] if ROLES[other].own_batches),
            ),
            whole if graph is captured.graph else None,
            request,
        )
        if role.own_batches:
            plan = replace(plan, samples=of_own_samples(graph, plan))
        axes.append(_for_all_owners(plan, captured.graph, axes))
        if name != request.axes[-1][0]:
            graph = Lower(plan, Axis(name, size, 0, name))(graph)
    return Plan(
        request.mesh,
        fingerprint(captured),
        tuple(axes),
        _parameters(captured, axes, request, held),
        stages,
        dict(request.options),
        notes=_notes(whole, axes),
        inputs=inputs_of(captured),
        buffers=kept,
    )


def _solved(graph: fx.Graph, request: Request, inference: Inference | None, asked: Decision) -> AxisPlan:
    """The types on one axis; where it cuts sequences, in as many pieces as were asked for, an earlier program has, or an example tells."""
    if request.divides != "sequence":
        return solved(graph, request, inference).plan
    if request.chunks is not None:
        return as_asked(solved(graph, request, inference).plan, graph, request.chunks)
    if asked.before:
        found = solved(graph, as_before(graph, request, asked.before), inference).plan
        return replace(
            found, chunks=asked.before, pieces="Positions are dealt out as those of the first batch, or in as many pieces as divide them"
        )
    first = solved(graph, request, inference)
    return (first if asked.example is None else in_pieces(graph, request, first, asked.example)).plan


def place_as_before(captured: Captured, request: Decision) -> None:
    """Mark the stage of every call where stages are those of an earlier plan."""
    stages, held, kept = _stages(captured, request)
    place(captured.graph, stages, held, kept)


def _for_all_owners(plan: AxisPlan, graph: fx.Graph, before: Sequence[AxisPlan]) -> AxisPlan:
    """What was decided for the parameters that the first rank of an earlier axis owns holds for those of the others."""
    found = dict(plan.nodes)
    for parts in expert_stacks(graph):
        names = [part.name for part in parts]
        for k, name in enumerate(names):
            first = next((names[k % (len(names) // a.size)] for a in before if isinstance(a.nodes[name].outs[0], Owned)), name)
            found.setdefault(name, plan.nodes[first])
    return replace(plan, nodes=found)


_Held = Mapping[str, tuple[int, ...]]


def _stages(captured: Captured, request: Decision) -> tuple[tuple[StagePlan, ...], _Held, _Held]:
    """The stages; which hold each parameter (those that read it, or those of its neighbours if none does); which keep each buffer."""
    if request.stages is None:
        return (), {}, {}
    ranks = request.stages.ranks
    if request.pinned:
        before = request.earlier or tuple(StagePlan("", rank, "as before") for rank in ranks)
        return before, {n: p.stages for n, p in request.pinned.items()}, request.buffers
    chosen = request.stages.chosen or choose(captured, len(ranks), where=request.stages.cuts)
    mark(captured.graph, chosen.starts, frozenset(captured.parameters))
    held: dict[str, tuple[int, ...]] = {}
    cut = split(captured.graph, len(ranks), parameters=captured.parameters, mutations=captured.mutations)
    for stage in cut:
        for name in dict.fromkeys(str(n.target) for n in stage.graph.nodes if n.op == "get_attr"):
            held[name] = (*held.get(name, ()), stage.index)
    found = {name: held[name] if name in held else _of_nearest(name, held) for name in request.others}
    share = [seconds / sum(chosen.seconds) for seconds in chosen.seconds]
    stages = zip(("", *chosen.starts), ranks, chosen.begins, share, strict=True)
    plans = tuple(StagePlan(start, rank, chosen.why, begins, part) for start, rank, begins, part in stages)
    return plans, found, {name: held[name] for name in captured.buffers if len(held.get(name, ())) == 1} | updaters(cut)


def _of_nearest(name: str, held: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The first stage of the tensor whose name begins most like this one."""
    best = max(held, key=lambda other: _alike(name.split("."), other.split(".")), default=None)
    return (0,) if best is None else held[best][:1]


def _alike(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two names begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _pinned(request: Decision, name: str) -> dict[str, Type]:
    """Where parameters lie on an axis. Where it feeds batches of their own to its ranks, what is whole may be so in either way.

    What no program has used so far is held whole, and stays so.
    """
    role, found = ROLES[name], dict[str, Type]()
    for parameter, plan in request.pinned.items():
        placed = plan.placements.get(name)
        if placed is None and role.cuts_parameters:
            found[parameter] = R if role.own_batches and plan.trainable else I
        elif placed is not None and (not role.own_batches or isinstance(placed, (Owned, Shard))):
            found[parameter] = placed
    return found


def _pinned_outputs(captured: Captured) -> list[Type | None]:
    """The loss and new buffer values are the same everywhere; other outputs stay as they come out."""
    count = len(next(n for n in reversed(captured.graph.nodes) if n.op == "output").args[0])
    found: list[Type | None] = [None] * count
    if captured.loss is not None:
        found[captured.loss] = I
    for index in range(count - len(captured.mutations), count):
        found[index] = I
    return found


def _rules(rules: Mapping[str, str], captured: Captured, request: Decision) -> dict[str, dict[str, int | None]]:
    """User rules as axis -> parameter -> dim to cut, None for whole."""
    names = [*request.others] or list(captured.parameters)
    weights = dividing("weights")
    complaints, found = [], {axis: dict[str, int | None]() for axis in weights}
    for pattern, where in rules.items():
        hits = [n for n in (*names, *captured.aliases) if fnmatchcase(n, pattern)]
        if not hits:
            complaints.append(f"rule {pattern!r} matches no parameter.{near_pattern(pattern, names)}")
        axis, _, dim = where.partition(":")
        if where != "replicate" and (axis not in weights or not dim.lstrip("-").isdigit()):
            complaints.append(f'rule {pattern!r}: {where!r} is not "tp:DIM" (as in "tp:0") or "replicate".')
            continue
        for hit in hits:
            name = captured.aliases.get(hit, hit)
            shape = request.others[name][0] if name in request.others else None
            if where == "replicate":
                found |= {one: {**found[one], name: None} for one in weights}
            elif shape is not None and not -len(shape) <= int(dim) < len(shape):
                complaints.append(f"rule {pattern!r}: {hit} has shape {list(shape)}, it has no dim {dim}.")
            else:
                found[axis][name] = int(dim) % len(shape or (1,))
    raise_all(PlanError, "rules:", complaints)
    return found


def _parameters(
    captured: Captured, axes: Sequence[AxisPlan], request: Decision, held: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterPlan]:
    nodes = {str(n.target): n for n in captured.graph.nodes if n.op == "get_attr"}
    found = {}
    for name, (shape, dtype, trainable) in request.others.items():
        placements: dict[str, Type] = {}
        why = "not used by the graph"
        if name in nodes:
            why = "data"
            for axis in axes:
                plan = axis.nodes[nodes[name].name]
                placements[axis.axis] = plan.outs[0]
                why = plan.why if ROLES[axis.axis].divides == "weights" else why
        elif name in request.pinned:
            placements.update(request.pinned[name].placements)
        found[name] = ParameterPlan(shape, dtype, trainable, placements, why, held.get(name, (0,)))
    return found


def _notes(inference: Inference, axes: Sequence[AxisPlan]) -> tuple[str, ...]:
    """Operators without a rule that touch trainable values, or whose rule does not fit a call: they run whole on every rank."""
    found = Counter[str]()
    for node, call in inference.calls.items():
        if call.signature is None and call.op.infos and any(isinstance(i, Info) and i.requires_grad for i in call.op.outs):
            found[f"{op_name(node.target)} has no rule{'' if operator_of(node.target).rule is None else ' that fits'}"] += 1
    return tuple(f"{what}: {count} calls run on whole values." for what, count in sorted(found.items())) if axes else ()
