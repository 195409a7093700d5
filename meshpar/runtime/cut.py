"""Cuts a lowered graph into one graph per block and a root graph that calls them: pure, graphs in, graphs out.

before                                      after
a = embedding(w, ids)                       root(w, v, ids):     a = embedding(w, ids)
b = linear(a, layers.0.w)     layers.0                           c = layers.0(key, a)
c = relu(b)                   layers.0                           d = layers.1(key, c)
d = relu(linear(c, ...))      layers.1                           return linear(d, v)
e = linear(d, v)                            block(weight, x0):   return relu(linear(x0, weight))
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from meshpar.graph.facts import facts, set_facts
from meshpar.ops.expect import EXPECT
from meshpar.runtime.recompute import is_random

CutUnit = str | fx.Node
"""What the root runs as one step: a block (its path) or a single node."""


@dataclass(frozen=True)
class Piece:
    """One block's share of the graph.

    `graph` has one placeholder per entry of `parameters`, `buffers` and `constants`, then one per entry of `arguments` (nodes of the graph
    that was cut). Names in it depend on structure alone, so that blocks of one structure print the same code.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    arguments: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Cut:
    """The root's graph, its blocks by path, and the groups of blocks that share parameters (each must be sharded as one unit)."""

    root: Piece
    blocks: Mapping[str, Piece]
    inlined: Mapping[str, str] = field(default_factory=dict)
    """Regions that are no block of their own, and why."""

    def piece(self, path: str) -> Piece:
        """That of a block, or of the root ("")."""
        return self.blocks[path] if path else self.root


def cut(
    graph: fx.Graph,
    parameters: Collection[str],
    buffers: Collection[str] = (),
    *,
    aliases: Mapping[str, str] | None = None,
    mutated: Collection[str] = (),
    key: str = "",
) -> Cut:
    """Cut `graph` by the `region` of its nodes.

    `aliases` maps every other name of a tied parameter to the name the graph uses; buffers in `mutated` are read by the root alone, before
    anything runs. A region that cannot be a block (its nodes do not lie together, or it holds a parameter that the root needs) is inlined.

    Raises ValueError for a `get_attr` that is neither a parameter nor a buffer nor named as a constant (a name with a dot).
    """
    return _Cutter(graph, parameters, buffers, aliases or {}, mutated, key).run()


class _Cutter:
    """The graph while it is being cut: `owner` says which block every node belongs to."""

    def __init__(
        self,
        graph: fx.Graph,
        parameters: Collection[str],
        buffers: Collection[str],
        aliases: Mapping[str, str],
        mutated: Collection[str],
        key: str,
    ) -> None:
        self.graph, self.key = graph, key
        self.parameters, self.buffers, self.mutated = set(parameters), set(buffers), set(mutated)
        self.names = _names(aliases)
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.calls = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.owner: dict[fx.Node, str | None] = {n: facts(n).region for n in self.calls if n.target is not EXPECT}
        self.owner |= {n: None for n in self.calls if n.target is EXPECT}  # a block is run for its results alone
        self.inlined: dict[str, str] = {}

    def run(self) -> Cut:
        self._settle_constants()
        self._keep_shared_parameters_out()
        order = self._order()
        blocks: dict[str, Piece] = {}
        members: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.calls:
            if (owner := self.owner[node]) is not None:
                members[owner].append(node)
        outputs = {path: self._outputs(path, nodes) for path, nodes in members.items()}
        for path, nodes in members.items():
            if outputs[path]:
                blocks[path] = self._piece(path, nodes, outputs[path])
        return Cut(self._root(order, blocks, outputs), blocks, self.inlined)

    def _settle_constants(self) -> None:
        """Nodes that depend on no parameter move into the one block that uses them, or else to the root."""
        varying: set[fx.Node] = set()
        for node in self.calls:
            if is_random(node) or any(i in varying or self._is_parameter(i) for i in node.all_input_nodes):
                varying.add(node)
        for node in reversed(self.calls):
            if node not in varying:
                users = {self.owner.get(user) for user in node.users}
                self.owner[node] = users.pop() if len(users) == 1 else None

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and str(node.target) in self.parameters

    def _local_name(self, fqn: str, path: str) -> str | None:
        """The name under `path` of a parameter or buffer, if it has one there."""
        return next((name for name in self.names.get(fqn, (fqn,)) if name.startswith(path + ".")), None)

    def _keep_shared_parameters_out(self) -> None:
        """A parameter that the root reads must not belong to a block: such blocks are inlined."""
        while True:
            paths = {owner for owner in self.owner.values() if owner is not None}
            readers = self._root_reads(paths)
            guilty = next(((p, fqn) for p in sorted(paths) for fqn in readers if self._local_name(fqn, p)), None)
            if guilty is None:
                return
            self._inline(guilty[0], f"its parameter {guilty[1]} is also used outside it")

    def _root_reads(self, paths: Collection[str]) -> list[str]:
        """The parameters that the root reads, for itself or for a block that has no name of its own for it."""
        reads: dict[str, None] = {}
        for node in self.graph.nodes:
            if self._is_parameter(node):
                fqn = str(node.target)
                for user in node.users:
                    owner = self.owner.get(user)
                    if owner is None or self._local_name(fqn, owner) is None:
                        reads[fqn] = None
        return list(reads)

    def _inline(self, path: str, reason: str) -> None:
        self.inlined[path] = reason
        for node, owner in self.owner.items():
            if owner == path:
                self.owner[node] = None
        self._settle_constants()

    def _order(self) -> list[CutUnit]:
        """The units in an order that runs, as near to the graph's own as can be; regions in the way of one are inlined."""
        while True:
            order, stuck = self._try_order()
            if stuck is None:
                return order
            self._inline(stuck, "its nodes do not lie together: something outside stands between them")
            self._keep_shared_parameters_out()

    def _try_order(self) -> tuple[list[CutUnit], str | None]:
        needs: dict[CutUnit, set[CutUnit]] = {}
        first: dict[CutUnit, int] = {}
        for node in self.calls:
            unit = self._unit(node)
            first.setdefault(unit, self.index[node])
            inputs = {self._unit(i) for i in node.all_input_nodes if i in self.owner}
            needs.setdefault(unit, set()).update(inputs - {unit})
        feeds: dict[CutUnit, list[CutUnit]] = defaultdict(list)
        for unit, inputs in needs.items():
            for i in inputs:
                feeds[i].append(unit)
        waiting = {unit: len(inputs) for unit, inputs in needs.items()}
        ready = [(first[unit], _Item(unit)) for unit, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        order: list[CutUnit] = []
        while ready:
            unit = heapq.heappop(ready)[1].unit
            order.append(unit)
            for user in feeds[unit]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    heapq.heappush(ready, (first[user], _Item(user)))
        if len(order) == len(needs):
            return order, None
        done = set(order)
        left = sorted((u for u in needs if u not in done and isinstance(u, str)), key=lambda u: first[u])
        return order, next(u for u in left if _reaches(u, feeds))

    def _unit(self, node: fx.Node) -> CutUnit:
        owner = self.owner[node]
        return node if owner is None else owner

    def _outputs(self, path: str, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(n for n in nodes if any(self.owner.get(user) != path for user in n.users))

    def _piece(self, path: str, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Piece:
        reads = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if self.owner.get(i) != path))
        build = _Build()
        tensors: dict[str, list[str]] = {"parameters": [], "buffers": [], "constants": []}
        attributes = {node: self._attribute(node, path) for node in reads}
        for kind, names in tensors.items():
            for node, found in attributes.items():
                if found is not None and found[0] == kind:
                    names.append(found[1])
                    build.placeholder(node, found[1].removeprefix(path + ".") if kind != "constants" else "constant")
        arguments = tuple(node for node, found in attributes.items() if found is None)
        for i, node in enumerate(arguments):
            build.placeholder(node, f"x{i}")
        for node in nodes:
            build.copy(node)
        values = [build.made[n] for n in outputs]
        build.graph.output(values[0] if len(values) == 1 else tuple(values))
        parameters, buffers, constants = map(tuple, tensors.values())
        return Piece(build.graph, parameters, buffers, constants, arguments)

    def _attribute(self, node: fx.Node, path: str) -> tuple[str, str] | None:
        """What a block reads by itself: kind and name. None for what the root passes to it."""
        if node.op != "get_attr":
            return None
        fqn = str(node.target)
        if fqn in self.parameters:
            local = self._local_name(fqn, path)
            return None if local is None else ("parameters", local)
        if fqn in self.buffers:
            return None if fqn in self.mutated else ("buffers", fqn)
        return "constants", fqn

    def _root(self, order: Sequence[CutUnit], blocks: Mapping[str, Piece], outputs: Mapping[str, Sequence[fx.Node]]) -> Piece:
        passed = {a for piece in blocks.values() for a in piece.arguments}
        reads = [
            n for n in self.graph.nodes if n.op == "get_attr" and (n in passed or any(self.owner.get(user) is None for user in n.users))
        ]
        build = _Build()
        kinds = {n: _kind(str(n.target), self.parameters, self.buffers) for n in reads}
        tensors = {kind: [n for n in reads if kinds[n] == kind] for kind in ("parameters", "buffers", "constants")}
        for nodes in tensors.values():
            for node in nodes:
                build.placeholder(node, str(node.target))
        inputs = tuple(n for n in self.graph.nodes if n.op == "placeholder")
        for node in inputs:
            build.placeholder(node, node.name)
        for unit in order:
            if isinstance(unit, fx.Node):
                build.copy(unit)
            elif unit in blocks:
                build.call(unit, self.key, blocks[unit].arguments, outputs[unit])
        build.graph.output(fx.map_arg(self.output.args[0], build.made.__getitem__))
        parameters, buffers, constants = (tuple(str(n.target) for n in nodes) for nodes in tensors.values())
        return Piece(build.graph, parameters, buffers, constants, inputs)


class _Build:
    """A new graph with its own names, filled with copies of nodes."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}

    def placeholder(self, node: fx.Node, name: str) -> None:
        new = self.graph.create_node("placeholder", name, name=name.replace(".", "_"))
        new.target = new.name
        self.made[node] = set_facts(new, facts(node))

    def copy(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.made.__getitem__)
        new = self.graph.create_node(node.op, node.target, args, kwargs)
        self.made[node] = set_facts(new, facts(node))

    def call(self, path: str, key: str, arguments: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        called = self.graph.call_module(path, (key, *(self.made[a] for a in arguments)))
        if len(outputs) == 1:
            self.made[outputs[0]] = called
            return
        for i, node in enumerate(outputs):
            self.made[node] = self.graph.call_function(operator.getitem, (called, i))


@dataclass(frozen=True)
class _Item:
    """Lets a unit stand in a heap beside another of the same index (there is none, but tuples compare their ends)."""

    unit: CutUnit

    def __lt__(self, other: _Item) -> bool:
        return False


def _kind(fqn: str, parameters: Collection[str], buffers: Collection[str]) -> str:
    return "parameters" if fqn in parameters else "buffers" if fqn in buffers else "constants"


def _names(aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Name the graph uses -> all names of that tensor."""
    names: dict[str, list[str]] = {}
    for other, canonical in aliases.items():
        names.setdefault(canonical, [canonical]).append(other)
    return {canonical: tuple(all_names) for canonical, all_names in names.items()}


def _reaches(start: str, feeds: Mapping[CutUnit, Sequence[CutUnit]]) -> bool:
    """Whether a unit is fed by what it feeds."""
    seen: set[CutUnit] = set()
    stack = list(feeds.get(start, ()))
    while stack:
        unit = stack.pop()
        if unit == start:
            return True
        if unit not in seen:
            seen.add(unit)
            stack += feeds.get(unit, ())
    return False
