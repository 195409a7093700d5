"""What a rank keeps in memory while it trains: parameters, gradients, optimizer state, and what backward needs of the activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch
from torch import fx

from meshpar.compile.split import StageGraph
from meshpar.graph.facts import Info, facts, info_of, infos_of
from meshpar.graph.op import op_name
from meshpar.graph.operators import ARITHMETIC, operator_of
from meshpar.ops import again, expert_pieces, expert_steps, token_pieces
from meshpar.pipeline.schedule import Order
from meshpar.plan import ParameterPlan, Plan
from meshpar.report.parameters import unit_of
from meshpar.report.text import Legible, count, table
from meshpar.roles import ROLES, copying
from meshpar.sharding.types import Shard, local_shape


@dataclass(frozen=True, repr=False)
class MemoryReport(Legible):
    """Bytes on a rank during a training step: on the one that holds most; with a pipeline, of those with this rank's stages.

    `activations` is an estimate, the rest follows from shapes.
    """

    parameters: int
    """What a rank keeps between steps."""
    gathered: int
    """Parameters of other data ranks that a rank holds while it uses them."""
    gradients: int
    optimizer: int
    """Two moments per parameter element (Adam), in the parameter's dtype."""
    activations: int
    """What backward reads again: of one microbatch, or of as many as are in flight in a pipeline."""
    in_flight: Mapping[int, int] = field(default_factory=dict)
    """With a pipeline: stage of this rank -> the most microbatches that are between their forward and the end of their backward."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        rows = [
            ("parameters", self.parameters, "kept between steps"),
            ("gathered parameters", self.gathered, "of other data ranks, while they are used"),
            ("gradients", self.gradients, "at the end of backward"),
            ("optimizer state", self.optimizer, "two moments (Adam)"),
            ("activations", self.activations, f"an estimate, of {self._microbatches()}"),
            ("total", self.total, ""),
        ]
        stages = f" with stage{'s' * (len(self.in_flight) > 1)} {', '.join(map(str, self.in_flight))}" if self.in_flight else ""
        heading = f"Memory of a rank{stages} while it trains"
        return "\n".join([heading, *table([(n, count(b, "B"), t) for n, b, t in rows], right=(1,))])

    def _microbatches(self) -> str:
        if not self.in_flight:
            return "one microbatch"
        each = [f"{n} microbatch{'es' * (n > 1)} in flight" for n in self.in_flight.values()]
        return (
            each[0] if len(each) == 1 else ", ".join(f"{text} on stage {stage}" for stage, text in zip(self.in_flight, each, strict=True))
        )


def memory(plan: Plan, graph: fx.Graph, stages: Sequence[StageGraph] = (), order: Order | None = None, rank: int = 0) -> MemoryReport:
    """Memory of one rank under `plan`, whose lowered graph is `graph` (local shapes).

    With a pipeline: of `rank`, when `stages` run in `order`.
    """
    sizes = dict(plan.mesh)
    replicas = prod(s for n, s in sizes.items() if ROLES[n].sums)
    mode = str(plan.options.get("data_parallel", "zero3"))
    shares = 1 if mode == "replicate" else replicas // prod(sizes[n] for n in copying(sizes))
    own = () if order is None else order.stages_of(rank)
    held = {name: _local(p, sizes) for name, p in plan.parameters.items() if order is None or set(p.stages) & set(own)}
    whole = _twice(plan, held) if replicas > 1 else set[str]()
    shared = {name: 1 if name in whole else shares for name in held}
    trained = {name: shape for name, shape in held.items() if plan.parameters[name].trainable}
    kept, gathered = _bytes(plan, held, shared), 0
    if shares > 1:
        managed = {name: shape for name, shape in held.items() if name not in whole}
        by_unit = mode == "zero3" and not (order is not None and order.defers(rank))
        gathered = _largest_two_units(plan, managed) if by_unit else _bytes(plan, managed)
    summed_late = order is not None or mode in ("replicate", "zero1")
    most, in_flight = activations(graph, recompute := str(plan.options.get("recompute", "none"))), dict[int, int]()
    if order is not None:
        most, in_flight = _in_flight([stages[s] for s in own], order, rank, recompute)
    return MemoryReport(
        parameters=kept,
        gathered=gathered,
        gradients=_bytes(plan, trained, {} if summed_late else shared),
        optimizer=2 * _bytes(plan, trained, shared),
        activations=most,
        in_flight=in_flight,
    )


def _twice(plan: Plan, held: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Parameters that two stages of one rank use: every data rank holds them whole."""
    ranks = {name: [plan.stages[s].rank for s in plan.parameters[name].stages] for name in held if plan.stages}
    return {name for name, found in ranks.items() if len(set(found)) < len(found)}


def _in_flight(own: Sequence[StageGraph], order: Order, rank: int, recompute: str) -> tuple[int, dict[int, int]]:
    """Bytes of all microbatches in flight when they are most, and the most microbatches of each stage.

    A microbatch keeps what backward reads, and what its stage received; what is computed again is there for one at a time.
    """
    kept, again = dict[int, int](), [0]
    for stage in own:
        lasting, passing = _lasting(stage.graph, recompute)
        received = [info_of(n).nbytes for n in stage.graph.nodes if n.op == "placeholder" and n.name in stage.receives]
        kept[stage.index] = lasting + sum(received)
        again.append(passing)
    moments = order.in_flight(rank)
    most = max(sum(n * kept[stage] for stage, n in held.items()) for held in moments)
    return most + max(again), {stage: max(held[stage] for held in moments) for stage in kept}


def _local(plan: ParameterPlan, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape on the first rank: none holds more."""
    shape = plan.shape
    for axis, type_ in plan.placements.items():
        if isinstance(type_, Shard):
            shape = local_shape(shape, type_, sizes.get(axis, 1), 0)
    return shape


def _bytes(plan: Plan, held: Mapping[str, tuple[int, ...]], shares: Mapping[str, int] | None = None) -> int:
    """Bytes when dim 0 of everything is shared out among `shares` (none: whole), unevenly where it does not divide."""
    return sum(_one(plan, name, shape, (shares or {}).get(name, 1)) for name, shape in held.items())


def _one(plan: Plan, name: str, shape: tuple[int, ...], shares: int) -> int:
    rows = ceil(shape[0] / shares) if shape else 1
    return rows * prod(shape[1:]) * getattr(torch, plan.parameters[name].dtype).itemsize


def _largest_two_units(plan: Plan, held: Mapping[str, tuple[int, ...]]) -> int:
    """Under zero3 a unit (a block, or all that is outside of blocks) is whole while it runs, and the next one is being gathered."""
    units: dict[str, int] = {}
    for name, shape in held.items():
        unit = unit_of(name)
        units[unit] = units.get(unit, 0) + _one(plan, name, shape, 1)
    outside = units.pop("", 0)
    return outside + sum(sorted(units.values())[-2:])


# ---- activations -----------------------------------------------------------------------------------------------------------------------


def activations(graph: fx.Graph, recompute: str = "none") -> int:
    """Bytes that backward reads again: each tensor once, however many views and operators share it; parameters and inputs not counted."""
    return sum(_lasting(graph, recompute))


def _lasting(graph: fx.Graph, recompute: str) -> tuple[int, int]:
    """What is kept from forward to backward, and what the block that is computed again takes meanwhile."""
    if recompute == "none":
        return sum(_saved(graph.nodes).values()), 0
    nodes = list(graph.nodes)
    saved = _saved([n for n in nodes if not facts(n).region])
    blocks: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if region := facts(node).region:
            blocks.setdefault(region, []).append(node)
    most = 0
    for block, own in blocks.items():
        for node in own:
            for source in node.all_input_nodes:
                if facts(source).region != block:
                    _add(saved, source)
            if recompute == "selective" and operator_of(node.target).kind in ARITHMETIC:
                _add(saved, node)
        most = max(most, sum(_saved(own).values()))  # one block at a time is computed again
    return sum(saved.values()), most


def _saved(nodes: Any) -> dict[tuple[fx.Node, int], int]:
    saved: dict[tuple[fx.Node, int], int] = {}
    for node in nodes:
        if node.op == "call_function" and not operator_of(node.target).view and _is_trained(node):
            for kept in _reads(node):
                _add(saved, kept)
            if op_name(node.target) in _IN_PIECES:
                saved.update({(node, 1 + slot): nbytes for slot, nbytes in _kept_inside(node).items()})
    return saved


@dataclass(frozen=True)
class _InPieces:
    """Where a call of experts in pieces has what: matrices, from which argument on; of the facts inside, rows, and results of steps."""

    matrices: int
    rows: int
    results: int
    weighed: bool
    """Whether it weighs the last result, and keeps it for that."""


_IN_PIECES: Mapping[str, _InPieces] = {
    op_name(expert_pieces.through_experts): _InPieces(3, 1, 6, weighed=False),
    op_name(token_pieces.on_gathered_tokens): _InPieces(5, 2, 5, weighed=True),
}


def _kept_inside(node: fx.Node) -> dict[int, int]:
    """What backward reads of the rows of experts and of what steps make of them: number of the value -> bytes."""
    place, about = _IN_PIECES[op_name(node.target)], facts(node).inside
    steps: Any = node.args[0]
    infos: list[Any] = [about[place.rows].info, about[place.rows + 1].info, *(None for _ in node.args[place.matrices :])]
    owner, kept = list(range(len(infos))), set[int]()  # owner: of each value, the one in whose memory it lies
    for (name, args, _), made in zip(steps, about[place.results :], strict=False):
        read = [owner[slot] for slot in _slots(args[1:] if name == expert_steps.JOINED else args)]
        row = None if name in (expert_steps.ITEM, expert_steps.JOINED) else operator_of(again.operator(name))
        view = name == expert_steps.ITEM or (row is not None and row.view)
        saves = "operands" if row is None else row.saves
        infos.append(made.info)
        owner.append(read[0] if view else len(owner))
        if not view and (saves in ("operands", "operands and results") or (saves == "others" and len(read) > 1)):
            kept.update(read)
        if not view and saves in ("results", "operands and results"):
            kept.add(owner[-1])
    if place.weighed:
        kept.add(owner[-1])
    return {slot: infos[slot].nbytes for slot in kept if isinstance(infos[slot], Info)}


def _slots(args: Any) -> Iterator[int]:
    if isinstance(args, (list, tuple)):
        for one in args:
            yield from _slots(one)
    elif isinstance(args, str) and args.startswith("%"):
        yield int(args[1:])


def _reads(node: fx.Node) -> Iterator[fx.Node]:
    what, given = operator_of(node.target).saves, node.all_input_nodes
    if what in ("operands", "operands and results") or (what == "others" and len(given) > 1):
        yield from given
    if what in ("results", "operands and results"):
        yield node
    if what == "indices":
        yield from (n for n in given if not _is_trained(n))


def _add(saved: dict[tuple[fx.Node, int], int], node: fx.Node) -> None:
    """Count the memory behind a value once."""
    while node.op == "call_function" and operator_of(node.target).view and node.all_input_nodes:
        node = node.all_input_nodes[0]
    for index, one in enumerate(infos_of(node) if node.op == "call_function" else ()):
        if isinstance(one, Info):
            saved[node, index] = one.nbytes


def _is_trained(node: fx.Node) -> bool:
    return any(isinstance(i, Info) and i.requires_grad for i in infos_of(node))
