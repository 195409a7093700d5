"""A graph read for one axis: the units it is solved in, what crosses between them, which factors of dims are samples or hidden sizes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping

from torch import fx

from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import Value, operands, value_of
from meshpar.sharding.extents import shard
from meshpar.sharding.infer import Inference
from meshpar.sharding.types import Shard

MATRIX = frozenset(
    "linear mm bmm addmm baddbmm matmul einsum convolution conv1d conv2d conv3d scaled_dot_product_attention meshpar.grouped_mm".split()
)
"""Operators bound by arithmetic."""


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
            if call.signature is None or call.op.name not in MATRIX:
                continue
            if not any(n.op == "get_attr" for n in call.op.operands):
                continue
            kept = {n for dims in call.signature.outputs for dim in dims for segment in dim for n in segment}
            for name, one in call.names.items():
                if name not in kept:
                    found.update((self.inference.extents.find(one), *self.inference.extents.leaves(one)))
        return found

    def is_hidden(self, one: int) -> bool:
        """Whether a dim is, or holds, a size that a matrix of the model sums over."""
        return self.inference.extents.find(one) in self.hidden or any(leaf in self.hidden for leaf in self.inference.extents.leaves(one))

    def shard(self, dim: int, one: int | None, factor: int) -> Shard | None:
        """The cut of a dim along one of its factors, if it can be cut so."""
        pattern = None if one is None else self.inference.extents.pattern(one, factor)
        return None if pattern is None else shard(dim, pattern, self.size, even=self.even)

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
