"""A graph read for one axis: the units it is solved in, what crosses between them, which factors of dims are samples or hidden sizes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod

from torch import fx

from meshpar.graph.facts import Info, facts, info_of
from meshpar.graph.op import Value, operands, value_info, value_of
from meshpar.graph.operators import ARITHMETIC, operator_of
from meshpar.sharding.extents import shard
from meshpar.sharding.infer import Inference
from meshpar.sharding.types import Shard


class Reading:
    """What solver and policies know of a graph. Read once, then only asked."""

    def __init__(
        self, graph: fx.Graph, inference: Inference, *, size: int, even: bool, inputs: Mapping[str, int], parameters: frozenset[str]
    ) -> None:
        self.graph, self.inference, self.size, self.even = graph, inference, size, even
        self.inputs, self.parameters = inputs, parameters
        self.units = _units(graph, parameters)
        self.crossing = self._crossing()
        self.batch = self._batch_factors()
        self.depends = self._depends_on_batch()
        self.hidden = self._contracted_with_parameters()
        self.taken = self._cut_already()
        self.chunks: Mapping[int, int] = {}
        """Factors along which work is uneven -> how many pieces each rank gets, dealt out back and forth."""

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
            if node.op == "placeholder" and node.target in self.inputs:
                one = self.inference.dims[node, 0][self.inputs[str(node.target)]]
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
            kind = operator_of(call.op.node.target).kind
            factors = call.op.operands[:3] if kind == "attention" else call.op.operands  # not what is added to scores
            if call.signature is None or kind not in ARITHMETIC or not any(n.op == "get_attr" for n in factors):
                continue
            kept = {n for dims in call.signature.outputs for dim in dims for segment in dim for n in segment}
            of_parameters = {
                name
                for operand, dims in zip(factors, call.signature.inputs)
                if operand.op == "get_attr"
                for dim in dims
                for segment in dim
                for name in segment
            }
            for name, one in call.names.items():
                if name in of_parameters and name not in kept:
                    found.update((self.inference.extents.find(one), *self.inference.extents.leaves(one)))
        return found

    def _cut_already(self) -> set[int]:
        """The factors that conversions of outer axes deal out over their own ranks."""
        found: set[int] = set()
        for call in self.inference.calls.values():
            if call.signature is not None and call.op.name.startswith("meshpar.ops.collectives."):
                found.update(self.inference.extents.find(one) for name, one in call.names.items() if name in call.signature.fixed)
        return found

    def is_hidden(self, one: int) -> bool:
        """Whether a dim is, or holds, a size that a matrix of the model sums over."""
        return self.inference.extents.find(one) in self.hidden or any(leaf in self.hidden for leaf in self.inference.extents.leaves(one))

    def along_sequence(self, axes: Sequence[int | None]) -> Shard | None:
        """A cut along positions: of the dims that are neither samples nor summed over by a matrix, the last one that can be cut."""
        found = self.sequence(axes)
        return None if found is None else found[1]

    def sequence(self, axes: Sequence[int | None]) -> tuple[int, Shard] | None:
        """The same, with the factor that is cut."""
        for d, one, factor in self._positions(axes):
            if (cut := self.shard(d, one, factor)) is not None:
                return self.inference.extents.find(factor), cut
        return None

    def sequences(self) -> tuple[int, ...]:
        """The factors along which `along_sequence` cuts any value of the graph."""
        found: dict[int, None] = {}
        for value, axes in self.inference.dims.items():
            if value[0].op == "call_function" and value_info(value).requires_grad:
                cuts = (f for d, one, f in self._positions(axes) if self.shard(d, one, f) is not None)
                found.update(dict.fromkeys([*cuts][:1]))
        return tuple(found)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest value that is made."""
        infos = (facts(n).info for n in self.graph.nodes if n.op == "call_function")
        return max((i.nbytes for i in infos if isinstance(i, Info)), default=0)

    @cached_property
    def elements(self) -> Mapping[str | None, int]:
        """Elements of the parameters of every unit."""
        found: Counter[str | None] = Counter()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in self.parameters:
                found[self.units[node]] += prod(info_of(node).shape)
        return found

    @cached_property
    def positions(self) -> frozenset[int]:
        """The factors along which values that cross would be cut if their number were right."""
        found: dict[int, None] = {}
        for value in self.crossing:
            if value_info(value).requires_grad:
                found.update(dict.fromkeys([f for _, _, f in self._positions(self.inference.dims[value])][:1]))
        return frozenset(found)

    def _positions(self, axes: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
        """(dim, extent, factor) of what may be positions, the likeliest first."""
        find, leaves = self.inference.extents.find, self.inference.extents.leaves
        if not any(one is not None and self.is_hidden(one) for one in axes):
            return
        for d in reversed(range(len(axes))):
            one = axes[d]
            if one is None or self.is_hidden(one):
                continue
            for factor in (*reversed(leaves(one)), find(one)):
                if factor not in self.batch and factor not in self.hidden:
                    yield d, one, factor

    def shard(self, dim: int, one: int | None, factor: int) -> Shard | None:
        """The cut of a dim along one of its factors, if it can be cut so."""
        pattern = None if one is None else self.inference.extents.pattern(one, factor)
        return None if pattern is None else shard(dim, pattern, self.size, even=self.even, chunks=self.chunks.get(factor, 1))

    def units_using(self, node: fx.Node) -> set[str | None]:
        """The units in which a node is used."""
        return {self.units[u] for u in node.users if u in self.units}


def _units(graph: fx.Graph, parameters: frozenset[str]) -> dict[fx.Node, str | None]:
    """The unit each node is solved with: its block when that holds at least two matrices, else the root (None)."""
    matrices: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in parameters and len(info_of(node).shape) >= 2:
            for region in {facts(u).region for u in node.users}:
                if region is not None:
                    matrices[region] += 1
    units: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            region = facts(node).region
            units[node] = region if region is not None and matrices[region] >= 2 else None
    for node in graph.nodes:
        if node.op == "get_attr":
            users = {units.get(u) for u in node.users}
            units[node] = users.pop() if len(users) == 1 else next((units[u] for u in node.users if units.get(u) is not None), None)
    return units
