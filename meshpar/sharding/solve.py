"""Choose the type of every value on one mesh axis.

    graph ── rules ──> extents ── seeds ──> typings per operator ── one 0-1 program per unique block ──> AxisPlan

What may be cut, and how values cross between blocks, is the policy of the axis (`policy`). Blocks meet in values whose type the policy
sets, so each block is solved alone, and equal blocks are solved once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from meshpar.errors import PlanError
from meshpar.graph.facts import Info, facts, info_of, infos_of
from meshpar.graph.op import Value, op_name, operands, value_info, value_of
from meshpar.graph.operators import operator_of
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.conversions import ALL_GATHER, wire_bytes
from meshpar.sharding.infer import BoundOp, Inference, infer
from meshpar.sharding.milp import Choices, Problem, ProgramStep, choose, possible
from meshpar.sharding.policy import POLICIES, Policy, Request
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import I, Shard, Type
from meshpar.sharding.typings import Choice, E, choices

_WHOLE = 300.0
"""Leaving all matrices of a block whole costs as much as gathering its largest activation this many times."""
_MATTERS = 0.01
"""The share of its block's parameters from which on a matrix matters (a router does not)."""
_DEARER = 1e-4
"""The share of its cost by which a plan must be cheaper to be preferred: programs are not solved more closely."""


@dataclass(frozen=True)
class Solved:
    """A typing of a graph on one axis."""

    plan: AxisPlan
    seconds: float
    """What everything costs, as far as it was for the solver to choose."""


def solve(graph: fx.Graph, request: Request, inference: Inference | None = None) -> AxisPlan:
    """The plan of `solved`."""
    return solved(graph, request, inference).plan


def solved(graph: fx.Graph, request: Request, inference: Inference | None = None) -> Solved:
    """The cheapest consistent typing of `graph` on one axis under the house's policies. `inference`: what `infer` says, if it was asked.

    Streams that the policy would cut, and need not, are left whole one after the other where that is cheaper.

    Raises PlanError when what was pinned cannot be met.
    """
    inference, make = inference or infer(graph), POLICIES[request.divides]
    reading = Reading(graph, inference, size=request.size, even=make.even, inputs=request.inputs, parameters=request.parameters)
    solver = _Solver(request, reading, make(request, reading))
    best = solver.run()
    for stream in solver.policy.streams():
        other = _Solver(request, reading, solver.policy.leaving_whole([stream]), solver)
        plan = other.run()
        if other.seconds < solver.seconds * (1.0 - _DEARER):
            solver, best = other, plan
    return Solved(best, solver.seconds)


class _Solver:
    def __init__(self, request: Request, reading: Reading, policy: Policy, before: _Solver | None = None) -> None:
        self.graph, self.request, self.inference = reading.graph, request, reading.inference
        self.size, self.price = request.size, request.price.at_scale(reading.largest)
        self.reading, self.policy = reading, policy
        self.unit = self.price.collective(wire_bytes(ALL_GATHER, reading.largest, self.size))
        self.residual = {value: policy.crosses(value, len(users)) for value, users in reading.crossing.items()}
        self.seeds = policy.seeds(self.residual)
        self.found: dict[str, NodePlan] = {}
        self.types: dict[Value, Type] = {}
        self.seconds = 0.0
        """What everything costs, as far as it is solved."""
        self.solved: dict[Problem, Choices] = {} if before is None else before.solved
        self.made: dict[tuple[object, ...], tuple[Choice, ...]] = {} if before is None else before.made

    def run(self) -> AxisPlan:
        groups: dict[str | None, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr" and node.target not in self.request.parameters:
                self._settle(node, (), (I,), "buffer")
            elif node.op in ("call_function", "get_attr") and node.target is not operator.getitem:
                groups.setdefault(self.reading.units[node], []).append(node)
        pins = self._outputs()
        # The root comes last: parameters shared with a block follow the block.
        for unit in sorted(groups, key=lambda u: u is None):
            self._solve_unit(unit, groups[unit], pins)
        if self.policy.slices_early:
            self._slice_early(pins)
        outputs = tuple(self._output_type(v, pins) for v in self._output_values())
        return AxisPlan(self.request.axis, self.size, self.found, outputs)

    def _slice_early(self, pins: Mapping[Value, Type]) -> None:
        """Make values without gradients as the part that all who use them want; then what those are made of, and so on."""
        returned = {value for value in self._output_values() if value is not None}
        for node in reversed(self.graph.nodes):
            value, info = (node, 0), facts(node).info
            if node.op != "call_function" or not isinstance(info, Info) or info.requires_grad or value in pins or value in returned:
                continue
            wanted = {type_ for user in node.users for type_ in self._used(user, node)}
            if node.target is operator.getitem or self.types[value] != I or len(wanted) != 1:
                continue
            (part,) = wanted
            if isinstance(part, Shard) and (option := self._made_as(node, part)) is not None:
                if value in self.residual:
                    self.residual[value] = part
                self._settle(node, option.uses, option.outs, option.why)

    def _used(self, user: fx.Node, node: fx.Node) -> list[Type]:
        """The types in which a node uses another one."""
        plan = self.found.get(user.name)
        return [I] if plan is None else [type_ for type_, one in zip(plan.uses, operands(user), strict=True) if one is node]

    def _made_as(self, node: fx.Node, part: Shard) -> Choice | None:
        """The typing that makes a part of parts, or of whole values."""
        for option in self._options(node, self.reading.units[node], {}):
            types = zip(option.uses, operands(node), strict=True)
            if option.outs == (part,) and all(use == self.types[value_of(one)] or self._sliced(use, one) for use, one in types):
                return option
        return None

    def _sliced(self, use: Type, operand: fx.Node) -> bool:
        """Whether a use takes a part of what is whole, which costs nothing."""
        return isinstance(use, Shard) and self.types[value_of(operand)] == I and possible(I, use, value_info(value_of(operand)))

    def _input(self, node: fx.Node) -> None:
        type_: Type = I
        if node.target in self.request.inputs:
            dim = self.request.inputs[str(node.target)]
            type_ = Shard(dim, 1, ((info_of(node).shape[dim], 1),))
        self._settle(node, (), (type_,), "input")

    def _settle(self, node: fx.Node, uses: tuple[Type, ...], outs: tuple[Type, ...], why: str) -> None:
        handed = tuple(self.residual.get((node, k)) for k in range(len(outs)))
        self.found[node.name] = NodePlan(uses, outs, why, handed if any(handed) else ())
        for index, type_ in enumerate(outs):
            self.types[node, index] = type_

    def _output_values(self) -> list[Value | None]:
        last = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return [value_of(v) if isinstance(v, fx.Node) else None for v in last.args[0]]

    def _outputs(self) -> dict[Value, Type]:
        given = list(self.request.outputs)
        values = self._output_values()
        given += [None] * (len(values) - len(given))
        return {v: t for v, t in zip(values, given, strict=True) if v is not None and t is not None}

    def _output_type(self, value: Value | None, pins: Mapping[Value, Type]) -> Type:
        """What is cut leaves cut; if asked so in global order, for a DTensor cannot say more."""
        if value is None:
            return I
        found = pins.get(value) or self.residual.get(value) or self.types[value]
        if not isinstance(found, Shard):
            return I
        return found.in_order(self.size) if self.request.ordered else found

    def _solve_unit(self, unit: str | None, nodes: list[fx.Node], pins: Mapping[Value, Type]) -> None:
        problem = self._problem(unit, nodes, pins)
        if problem not in self.solved:
            try:
                self.solved[problem] = choose(problem, self.price)
            except PlanError as error:
                raise self._explained(error, nodes, problem) from error
        found = self.solved[problem]
        self.seconds += found.seconds
        for node, step, picked in zip(nodes, problem.steps, found.picks, strict=True):
            option = step.options[picked]
            self._settle(node, option.uses, option.outs, option.why)

    def _explained(self, error: PlanError, nodes: Sequence[fx.Node], problem: Problem) -> PlanError:
        """Between dispatch and combine, what does not treat every row alike stands in the way of sending rows to their experts."""
        for node, step in zip(nodes, problem.steps, strict=True):
            rows = any(o is not None and o.rows for o in step.outs)
            if self.policy.experts and rows and not any(E in option.outs for option in step.options):
                where = f"{facts(node).module or 'the model'} ({facts(node).source or node.name})"
                return PlanError(
                    f"{self.request.axis}={self.size}: {op_name(node.target)} in {where} works on the rows of experts and needs all of "
                    f"them at once, or has no rule (mp.add_rule): rows cannot be sent to the ranks of their experts. Rewrite it row by "
                    f"row, or use dp instead of ep."
                )
        return error

    def _problem(self, unit: str | None, nodes: Sequence[fx.Node], pins: Mapping[Value, Type]) -> Problem:
        index = {n: i for i, n in enumerate(nodes)}
        given: dict[Value, int] = {}
        steps = []
        whole = self._whole_prices(nodes)
        for node in nodes:
            places: list[tuple[int, int] | int] = []
            if node.op == "call_function":
                for operand in operands(node):
                    value = value_of(operand)
                    places.append((index[value[0]], value[1]) if value[0] in index else given.setdefault(value, len(given)))
            steps.append(ProgramStep(self._options(node, unit, whole), tuple(places), infos_of(node)))
        wanted = tuple(
            (i, result, type_)
            for node, i in index.items()
            for result in range(len(steps[i].outs))
            for type_ in self._needed((node, result), pins)
        )
        # Other results cross in the type the policy set; inputs, buffers and shared parameters are settled by now.
        outside = tuple((value_info(v), self.residual.get(v) or self.types[v]) for v in given)
        return Problem(tuple(steps), outside, wanted, self.size)

    def _needed(self, value: Value, pins: Mapping[Value, Type]) -> Iterable[Type]:
        if value in self.residual:
            yield self.residual[value]
        if value in pins:
            yield pins[value]

    def _options(self, node: fx.Node, unit: str | None, whole: Mapping[fx.Node, float]) -> tuple[Choice, ...]:
        if node.op == "get_attr":
            return self._placements(node, whole[node])
        call = self.inference.calls[node]
        if (given := self.policy.fixed(call)) is not None:
            return (given,)
        factors = self.seeds[unit]
        # All that tells one call of a kind from another is how the factors lie in its names.
        patterns = tuple(tuple(self.inference.extents.pattern(one, factor) for one in call.names.values()) for factor in factors)
        held = tuple(operand.op == "get_attr" for operand in call.op.operands)
        of_experts = facts(node).expert_stack
        key = call.kind, tuple(p for p in patterns if any(p)), held, of_experts
        if key not in self.made:
            found = choices(
                call,
                self.inference,
                factors,
                self.size,
                self.price,
                self._work(call),
                experts=self.policy.experts,
                even=self.policy.even,
                chunks=self.reading.chunks,
            )
            if of_experts and self.request.divides != "weights":
                found = tuple(one for one in found if self._rests(one, call))
            self.made[key] = tuple(self.policy.revised(call, found, self._work(call), self.unit))
        return self.made[key]

    def _rests(self, option: Choice, call: BoundOp) -> bool:
        """Whether it uses parameters as they lie: nothing stands between a list of experts and its stack, so each may have an owner."""
        parts = zip(option.uses, call.op.operands, strict=True)
        return all(part.op != "get_attr" or use == self._placements(part, 0.0)[0].outs[0] for use, part in parts)

    def _work(self, call: BoundOp) -> float:
        infos = [i for i in (*call.op.infos, *call.op.outs) if i is not None]
        grad = 3.0 if any(i.requires_grad for i in infos) else 1.0
        row = operator_of(call.op.node.target)
        if row.view:
            return 0.0
        flops = row.flops(call.op) if row.flops else 0.0
        if row.kind == "convolution" and call.signature:  # more than it does, so that none is repeated to save a message
            flops = 2.0 * prod(call.signature.sizes.values())
        return grad * self.price.compute(flops, sum(i.nbytes for i in infos))

    def _whole_prices(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, float]:
        """What leaving each parameter whole costs: its memory; and for a matrix that matters, so much that it is the last resort."""
        mine = [n for n in nodes if n.op == "get_attr"]
        total = sum(prod(info_of(n).shape) for n in mine)
        largest = max((i.nbytes for n in nodes if n.op == "call_function" for i in _infos(n)), default=0)
        unit = self.price.collective(wire_bytes(ALL_GATHER, largest, self.size))
        found = {}
        for node in mine:
            info = info_of(node)
            share = prod(info.shape) / total
            matters = len(info.shape) >= 2 and share >= _MATTERS
            found[node] = self.price.touch(2.0 * info.nbytes) + (_WHOLE * share * unit if matters else 0.0)
        return found

    def _placements(self, node: fx.Node, whole: float) -> tuple[Choice, ...]:
        """Where a parameter may lie."""
        if node.target in self.request.pinned:
            return (Choice((), (self.request.pinned[str(node.target)],), 0.0, "rule"),)
        seeds = dict.fromkeys(f for unit in sorted(self.reading.units_using(node), key=str) for f in self.seeds[unit])
        return self.policy.placements(node, whole, seeds)


def _infos(node: fx.Node) -> list[Info]:
    return [i for i in infos_of(node) if i is not None]
