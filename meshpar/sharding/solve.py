"""Choose the type of every value on one mesh axis.

    graph ── rules ──> extents ── seeds ──> typings per operator ── one 0-1 program per unique block ──> AxisPlan

Tensor axis: what may be cut is what the model's matrices are made of (heads, MLP width, vocabulary, ...), and the sequence of the residual
stream. Data axis: samples are cut, parameters stay whole and their gradients are pending sums. Blocks meet in values whose type a policy
sets, so each block is solved alone, and equal blocks are solved once.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import fx

from meshpar.errors import PlanError
from meshpar.graph.captured import Info
from meshpar.graph.op import Value, info_of, op_name, operands, value_of
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.conversions import ALL_GATHER, wire_bytes
from meshpar.sharding.extents import shard
from meshpar.sharding.infer import BoundOp, Inference, infer
from meshpar.sharding.milp import Problem, ProgramStep, choose
from meshpar.sharding.price import Price
from meshpar.sharding.types import I, Owned, R, Shard, Type, plain
from meshpar.sharding.typings import Choice, E, at_rest, choices

_MATRIX = frozenset(
    "linear mm bmm addmm baddbmm matmul einsum convolution conv1d conv2d conv3d scaled_dot_product_attention meshpar.grouped_mm".split()
)
"""Operators bound by arithmetic."""
_FREE = frozenset(
    "view reshape _unsafe_view transpose permute expand unsqueeze squeeze t slice select split split_with_sizes chunk unbind".split()
    + ["detach", "alias"]
)
"""Operators that touch no memory."""

_WHOLE = 300.0
"""Leaving all matrices of a block whole costs as much as gathering its largest activation this many times."""
_MATTERS = 0.01
"""The share of its block's parameters from which on a matrix matters (a router does not)."""


@dataclass(frozen=True)
class Request:
    """What is to be solved: the axis, and what the user or an earlier solution already fixed."""

    axis: str
    size: int
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Placeholders cut along the axis -> the dim that is cut (data axes only)."""
    parameters: frozenset[str] = frozenset()
    """Names of parameters, among the get_attr targets."""
    pinned: Mapping[str, Type] = field(default_factory=dict)
    """Parameters whose type is given."""
    wanted: Mapping[str, int | None] = field(default_factory=dict)
    """Parameters the user has rules for -> the dim to cut, None for whole."""
    shard_parameters: bool = True
    experts: bool = False
    """Whether the axis splits experts, so that every rank gets the rows of its own."""
    owned: bool = False
    """Whether a parameter may lie on one rank alone: experts kept as a list of modules are then divided too."""
    sequence: bool = True
    """Whether the residual stream is cut along its sequence where that is possible."""
    outputs: Sequence[Type | None] = ()
    """Types the outputs must have; None leaves it to the solver."""
    price: Price = field(default_factory=Price)


def solve(graph: fx.Graph, request: Request, inference: Inference | None = None) -> AxisPlan:
    """The cheapest consistent typing of `graph` on one axis under the house's policies. `inference`: what `infer` says, if it was asked.

    Raises PlanError when what was pinned cannot be met.
    """
    return _Solver(graph, request, inference or infer(graph)).run()


class _Solver:
    def __init__(self, graph: fx.Graph, request: Request, inference: Inference) -> None:
        self.graph, self.request, self.inference = graph, request, inference
        self.size, self.price = request.size, request.price.at_scale(_largest(graph))
        self.even = not request.shard_parameters
        """Data ranks hold equal parts: what is decided for the next axis, on the shapes of one of them, holds for all."""
        self.units = _units(graph, request.parameters)
        self.crossing = self._crossing()
        self.batch = self._batch_factors()
        self.depends = self._depends_on_batch()
        self.hidden = self._contracted_with_parameters()
        self.residual = self._residual_types()
        self.experts = self._expert_factors() if request.experts else frozenset()
        self.owners = self._owners() if request.experts and request.owned else {}
        self.seeds = self._seeds()
        self.found: dict[str, NodePlan] = {}
        self.types: dict[Value, Type] = {}
        self.solved: dict[Problem, tuple[int, ...]] = {}
        self.made: dict[tuple[object, ...], tuple[Choice, ...]] = {}

    # -- reading the graph ---------------------------------------------------------------------------------------------------------------

    def _crossing(self) -> dict[Value, set[str | None]]:
        """Values used in another unit than they are made in -> the units that use them."""
        found: dict[Value, set[str | None]] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            for operand in operands(node):
                value = value_of(operand)
                if value[0].op == "call_function" and self.units[value[0]] != self.units[node]:
                    found.setdefault(value, set()).add(self.units[node])
        return found

    def _batch_factors(self) -> tuple[int, ...]:
        found: dict[int, None] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.target in self.request.inputs:
                one = self.inference.dims[node, 0][self.request.inputs[str(node.target)]]
                if one is not None:
                    found.update(dict.fromkeys((self.inference.extents.find(one), *self.inference.extents.leaves(one))))
        return tuple(found)

    def _depends_on_batch(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" or (node.op == "call_function" and any(o in found for o in operands(node))):
                found.add(node)
        return found

    def _contracted_with_parameters(self) -> set[int]:
        """Factors a matrix of the model sums over: the hidden size of the residual stream is one of them."""
        found: set[int] = set()
        for call in self.inference.calls.values():
            if call.signature is None or call.op.name not in _MATRIX:
                continue
            if not any(n.op == "get_attr" for n in call.op.operands):
                continue
            kept = {n for dims in call.signature.outputs for dim in dims for segment in dim for n in segment}
            for name, one in call.names.items():
                if name not in kept:
                    found.update((self.inference.extents.find(one), *self.inference.extents.leaves(one)))
        return found

    def _residual_types(self) -> dict[Value, Type]:
        """The type in which each value that crosses between units is handed over."""
        users = {v: len(u) for v, u in self.crossing.items()}
        return {value: self._crossing_type(value, users[value]) for value in self.crossing}

    def _crossing_type(self, value: Value, users: int) -> Type:
        info = info_of(value)
        axes = self.inference.dims[value]
        if not self.request.shard_parameters:
            for factor in self.batch:
                for d, one in enumerate(axes):
                    cut = self._shard(d, one, factor)
                    if cut is not None:
                        return cut
            return I if value[0] in self.depends or not info.requires_grad else at_rest(info, R)
        if not (self.request.sequence and info.requires_grad and users <= 3):
            return I
        return self._sequence_type(axes) or I

    def _sequence_type(self, axes: Sequence[int | None]) -> Shard | None:
        """A cut along positions: of the dims that are neither samples nor summed over by a matrix, the last one."""
        find, leaves = self.inference.extents.find, self.inference.extents.leaves
        if not any(one is not None and self._is_hidden(one) for one in axes):
            return None
        for d in reversed(range(len(axes))):
            one = axes[d]
            if one is None or self._is_hidden(one):
                continue
            for factor in (*reversed(leaves(one)), find(one)):
                if factor in self.batch or factor in self.hidden:
                    continue
                cut = self._shard(d, one, factor)
                if cut is not None:
                    return cut
        return None

    def _is_hidden(self, one: int) -> bool:
        return self.inference.extents.find(one) in self.hidden or any(leaf in self.hidden for leaf in self.inference.extents.leaves(one))

    def _shard(self, dim: int, one: int | None, factor: int) -> Shard | None:
        pattern = None if one is None else self.inference.extents.pattern(one, factor)
        return None if pattern is None else shard(dim, pattern, self.size, even=self.even)

    def _seeds(self) -> dict[str | None, tuple[int, ...]]:
        """Per unit, the factors that may be cut: those of its matrices that are not the residual's, and the residual's sequence."""
        if not self.request.shard_parameters:
            return dict.fromkeys(set(self.units.values()), (*self.batch, *sorted(self.experts)))
        carried, sequence = self._residual_factors()
        found: dict[str | None, dict[int, None]] = {}
        for node in self.graph.nodes:
            if node.op != "get_attr" or node.target not in self.request.parameters or len(node.meta["info"].shape) < 2:
                continue
            for one in self.inference.dims[node, 0]:
                if one is not None:
                    for unit in self._units_using(node):
                        found.setdefault(unit, {}).update(dict.fromkeys(self._outermost(one, carried)))
        units = set(self.units.values())
        return {u: tuple(dict.fromkeys([*found.get(u, {}), *sequence])) for u in units}

    def _expert_factors(self) -> frozenset[int]:
        """What stands for the experts: the first dim of their matrices, and of tables looked up by the expert of a row."""
        found: set[int] = set()
        for node, call in self.inference.calls.items():
            infos, table = call.op.infos, -1
            if call.op.name == "meshpar.grouped_mm":
                table = 1
            elif call.op.name == "index" and len(infos) == 2 and infos[1].rows and not infos[0].rows:
                table = 0
            if table >= 0 and (one := self.inference.dims[value_of(operands(node)[table])][0]) is not None:
                found.add(self.inference.extents.find(one))
        return frozenset(found)

    def _owners(self) -> dict[fx.Node, int]:
        """The parameters of experts kept as a list of modules -> the rank that has them."""
        found: dict[fx.Node, int] = {}
        for parts in expert_stacks(self.graph):
            if len(parts) % self.size:
                raise PlanError(f"{self.request.axis}={self.size} does not divide the {len(parts)} experts of {parts[0].target}.")
            found.update({part: k // (len(parts) // self.size) for k, part in enumerate(parts)})
        return found

    def _residual_factors(self) -> tuple[set[int], list[int]]:
        """The factors of the residual's hidden size, and those of its sequence that are cut."""
        find, leaves = self.inference.extents.find, self.inference.extents.leaves
        carried: set[int] = set()
        sequence: dict[int, None] = {}
        for value, type_ in self.residual.items():
            if not info_of(value).requires_grad:
                continue
            for d, one in enumerate(self.inference.dims[value]):
                if one is None:
                    continue
                if self._is_hidden(one):
                    carried.update((find(one), *leaves(one)))
                if isinstance(type_, Shard) and type_.dim == d:
                    factors = (*reversed(leaves(one)), find(one))
                    sequence.update(dict.fromkeys([f for f in factors if self._shard(d, one, f) == type_][:1]))
        return carried, list(sequence)

    def _outermost(self, one: int, carried: set[int]) -> list[int]:
        """The outermost factor along which a parameter's dim can be cut: heads rather than what is inside a head."""
        factors = (f for f in self.inference.extents.cuttable(one) if f not in carried)
        return [f for f in factors if self._shard(0, one, f) is not None][:1]

    def _units_using(self, node: fx.Node) -> set[str | None]:
        return {self.units[u] for u in node.users if u in self.units}

    # -- solving -------------------------------------------------------------------------------------------------------------------------

    def run(self) -> AxisPlan:
        groups: dict[str | None, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr" and node.target not in self.request.parameters:
                self._settle(node, (), (I,), "buffer")
            elif node.op in ("call_function", "get_attr") and node.target is not operator.getitem:
                groups.setdefault(self.units[node], []).append(node)
        pins = self._outputs()
        # The root comes last: parameters shared with a block follow the block.
        for unit in sorted(groups, key=lambda u: u is None):
            self._solve_unit(unit, groups[unit], pins)
        outputs = tuple(self._output_type(v, pins) for v in self._output_values())
        return AxisPlan(self.request.axis, self.size, self.found, outputs)

    def _input(self, node: fx.Node) -> None:
        type_: Type = I
        if node.target in self.request.inputs:
            dim = self.request.inputs[str(node.target)]
            type_ = Shard(dim, 1, ((node.meta["info"].shape[dim], 1),))
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
        if value is None:
            return I
        found = pins.get(value) or self.residual.get(value) or self.types[value]
        return found if isinstance(found, Shard) else I

    def _solve_unit(self, unit: str | None, nodes: list[fx.Node], pins: Mapping[Value, Type]) -> None:
        problem = self._problem(unit, nodes, pins)
        if problem not in self.solved:
            try:
                self.solved[problem] = choose(problem, self.price)
            except PlanError as error:
                raise self._explained(error, nodes, problem) from error
        for node, step, picked in zip(nodes, problem.steps, self.solved[problem], strict=True):
            option = step.options[picked]
            self._settle(node, option.uses, option.outs, option.why)

    def _explained(self, error: PlanError, nodes: Sequence[fx.Node], problem: Problem) -> PlanError:
        """Between dispatch and combine, what does not treat every row alike stands in the way of sending rows to their experts."""
        for node, step in zip(nodes, problem.steps, strict=True):
            rows = any(o is not None and o.rows for o in step.outs)
            if self.experts and rows and not any(E in option.outs for option in step.options):
                where = f"{node.meta.get('module') or 'the model'} ({node.meta.get('source') or node.name})"
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
            info = node.meta["info"]
            steps.append(ProgramStep(self._options(node, unit, whole), tuple(places), info if isinstance(info, tuple) else (info,)))
        wanted = tuple(
            (i, result, type_)
            for node, i in index.items()
            for result in range(len(steps[i].outs))
            for type_ in self._needed((node, result), pins)
        )
        # Other results cross in the type the policy set; inputs, buffers and shared parameters are settled by now.
        outside = tuple((info_of(v), self.residual.get(v) or self.types[v]) for v in given)
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
        if self.owners and call.op.operands and call.op.operands[0] in self.owners:
            uses = tuple(Owned(self.owners[part]) for part in call.op.operands)
            return (Choice(uses, (plain(0, len(uses)),), 0.0, "experts"),)
        factors = self.seeds[unit]
        # All that tells one call of a kind from another is how the factors lie in its names.
        patterns = tuple(tuple(self.inference.extents.pattern(one, factor) for one in call.names.values()) for factor in factors)
        key = call.kind, tuple(p for p in patterns if any(p))
        if key not in self.made:
            self.made[key] = choices(
                call, self.inference, factors, self.size, self.price, self._work(call), experts=self.experts, even=self.even
            )
        return self.made[key]

    def _work(self, call: BoundOp) -> float:
        infos = [i for i in (*call.op.infos, *call.op.outs) if i is not None]
        grad = 3.0 if any(i.requires_grad for i in infos) else 1.0
        if call.op.name in _FREE:
            return 0.0
        flops = 2.0 * prod(call.signature.sizes.values()) if call.signature and call.op.name in _MATRIX else 0.0
        return grad * self.price.compute(flops, sum(i.nbytes for i in infos))

    def _whole_prices(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, float]:
        """What leaving each parameter whole costs: its memory; and for a matrix that matters, so much that it is the last resort."""
        mine = [n for n in nodes if n.op == "get_attr"]
        total = sum(prod(n.meta["info"].shape) for n in mine)
        largest = max((i.nbytes for n in nodes if n.op == "call_function" for i in _infos(n)), default=0)
        unit = self.price.collective(wire_bytes(ALL_GATHER, largest, self.size))
        found = {}
        for node in mine:
            info: Info = node.meta["info"]
            share = prod(info.shape) / total
            matters = len(info.shape) >= 2 and share >= _MATTERS
            found[node] = self.price.touch(2.0 * info.nbytes) + (_WHOLE * share * unit if matters else 0.0)
        return found

    def _placements(self, node: fx.Node, whole: float) -> tuple[Choice, ...]:
        """Where a parameter may lie."""
        info: Info = node.meta["info"]
        if node.target in self.request.pinned:
            return (Choice((), (self.request.pinned[str(node.target)],), 0.0, "rule"),)
        if not self.request.shard_parameters:
            if node in self.owners:
                return (Choice((), (Owned(self.owners[node]),), 0.0, "experts"),)
            return (self._of_experts(node) or Choice((), (at_rest(info, R),), 0.0, "data"),)
        found = [Choice((), (I,), whole, "whole")]
        seen: set[Type] = set()
        seeds = dict.fromkeys(f for unit in sorted(self._units_using(node), key=str) for f in self.seeds[unit])
        for factor in seeds:
            for d, one in enumerate(self.inference.dims[node, 0]):
                cut = self._shard(d, one, factor)
                if cut is not None and cut not in seen:
                    seen.add(cut)
                    found.append(Choice((), (cut,), 0.0 if cut.is_contiguous else 1e-11, "matrix"))
        return self._ruled(node, found) if node.target in self.request.wanted else tuple(found)

    def _of_experts(self, node: fx.Node) -> Choice | None:
        """A parameter with one part for each expert is divided among the ranks."""
        shape = node.meta["info"].shape
        for d, one in enumerate(self.inference.dims[node, 0]):
            if one is not None and self.inference.extents.find(one) in self.experts:
                if shape[d] % self.size:
                    divisors = ", ".join(str(n) for n in range(1, shape[d] + 1) if shape[d] % n == 0)
                    raise PlanError(
                        f"{self.request.axis}={self.size} does not divide the {shape[d]} experts of {node.target} {list(shape)}. "
                        f"Valid {self.request.axis}: {divisors}."
                    )
                return Choice((), (plain(d, shape[d]),), 0.0, "experts")
            for cut in filter(None, (self._shard(d, one, factor) for factor in self.experts)):  # joined with another dim
                return Choice((), (cut,), 0.0, "experts")
        return None

    def _ruled(self, node: fx.Node, found: Iterable[Choice]) -> tuple[Choice, ...]:
        """The placements a user's rule allows."""
        dim, shape = self.request.wanted[str(node.target)], node.meta["info"].shape
        if dim is None:
            return (Choice((), (I,), 0.0, "rule"),)
        fitting = [Choice((), c.outs, c.cost, "rule") for c in found if isinstance(c.outs[0], Shard) and c.outs[0].dim == dim]
        if not fitting:
            cut = shard(dim, (1, ((shape[dim], 1),)), self.size)
            if cut is None:
                raise PlanError(
                    f"rule: {self.request.axis}={self.size} cannot cut dim {dim} of {node.target} {list(shape)}; "
                    f"valid {self.request.axis}: {', '.join(str(d) for d in range(1, shape[dim] + 1) if shape[dim] % d == 0)}."
                )
            fitting = [Choice((), (cut,), 0.0, "rule")]
        return tuple(fitting)


def expert_stacks(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """The parameters of experts that are kept as a list of modules and used as a stack: those of one role together, in order."""
    found = []
    for node in graph.nodes:
        parts = operands(node) if node.meta.get("expert_stack") else ()
        if parts and all(part.op == "get_attr" and len(part.users) == 1 for part in parts) and len(set(parts)) == len(parts):
            found.append(parts)
    return found


def _infos(node: fx.Node) -> list[Info]:
    info = node.meta["info"]
    return [i for i in (info if isinstance(info, tuple) else (info,)) if i is not None]


def _largest(graph: fx.Graph) -> int:
    infos = (n.meta.get("info") for n in graph.nodes if n.op == "call_function")
    return max((i.nbytes for i in infos if isinstance(i, Info)), default=0)


def _units(graph: fx.Graph, parameters: frozenset[str]) -> dict[fx.Node, str | None]:
    """The unit each node is solved with: its block when that holds at least two matrices, else the root (None)."""
    matrices: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in parameters and len(node.meta["info"].shape) >= 2:
            for region in {u.meta.get("region") for u in node.users}:
                if region is not None:
                    matrices[region] += 1
    units: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            region = node.meta.get("region")
            units[node] = region if matrices[region] >= 2 else None
    for node in graph.nodes:
        if node.op == "get_attr":
            users = {units.get(u) for u in node.users}
            units[node] = users.pop() if len(users) == 1 else next((units[u] for u in node.users if units.get(u) is not None), None)
    return units
