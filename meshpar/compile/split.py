"""Cuts a graph into one graph per pipeline stage: decides nothing, every call says by its `stage` where it wants to run.

    before                               after, marked at "b"
      mask = triu(ids)                     stage 0 (ids):      mask = triu(ids);  a = embed(w, ids, mask)     -> a
      a = embed(w, ids, mask)              stage 1 (a, ids):   mask = triu(ids);  b = linear(a, v)
      b = linear(a, v)                                         c = mul(b, mask)                               -> c
      c = mul(b, mask)

What depends on no parameter (masks, position ids) is made again in every stage that needs it; everything else goes from hand to hand, from
the stage that makes it to the last one that uses it. Works on captured graphs and on lowered ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from torch import fx

from meshpar.errors import PlanError, near, raise_all
from meshpar.graph.facts import Info, facts, info_of, infos_of, set_facts
from meshpar.graph.operators import draws
from meshpar.ops.expect import EXPECT
from meshpar.passes.inputs import ExtraInputs, extra_inputs


@dataclass(frozen=True)
class StageGraph:
    """One stage's share of a graph.

    `graph` has one placeholder per entry of `receives`, then one per entry of `inputs`. Its output is a flat tuple: the values of `sends`,
    then of `outputs`, then of `mutations`. Names of nodes are those of the whole graph.
    """

    index: int
    graph: fx.Graph
    receives: tuple[str, ...]
    """Names of the values handed over by the stage before; equal to its `sends`."""
    inputs: tuple[str, ...]
    """Which placeholders of the whole graph this stage reads, in their order."""
    sends: tuple[str, ...]
    """Names of the values handed to the next stage."""
    outputs: tuple[int, ...]
    """Which values of the whole graph's output this stage returns: the last stage all that are wanted, the others none."""
    mutations: tuple[str, ...]
    """The buffers whose new values this stage computes or is handed."""

    @cached_property
    def extra(self) -> ExtraInputs:
        """Which of the inputs are no tensors of the batch."""
        return extra_inputs(self.graph)

    @property
    def received(self) -> tuple[Info, ...]:
        """What the values of `receives` look like."""
        return tuple(info_of(node) for node in self._placeholders()[: len(self.receives)])

    @property
    def given(self) -> dict[str, Info]:
        """What the values of `inputs` look like, by name."""
        infos = [info_of(node) for node in self._placeholders()[len(self.receives) :]]
        return dict(zip(self.inputs, infos, strict=True))

    @property
    def sent(self) -> tuple[Info, ...]:
        """What the values of `sends` look like."""
        return tuple(info_of(node) for node in self._values()[: len(self.sends)])

    @property
    def returned(self) -> tuple[Info, ...]:
        """What the values of `outputs` look like."""
        return tuple(info_of(node) for node in self._values()[len(self.sends) : len(self.sends) + len(self.outputs)])

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def _values(self) -> Sequence[Any]:
        """What the graph returns: nodes, or None where the model returned none."""
        values: Any = self.graph.output_node().args[0]
        return values


def calls_in_order(graph: fx.Graph, parameters: Collection[str]) -> list[fx.Node]:
    """The calls. Terms of `parameters` alone, outside of blocks, come behind the first call that reads these, their sums behind the last.

    A penalty of weights, computed where the loss is, would have the stage of the loss hold them, too.
    """
    everywhere, calls = remade(graph, parameters), [node for node in graph.nodes if node.op == "call_function"]
    terms, names = terms_of(graph, parameters)
    others = [node for node in calls if node not in terms]
    at = {node: place for place, node in enumerate(others)}
    used: dict[str, int] = {}
    for source, found in names.items():
        for place in (at[user] for user in source.users if user in at and user not in everywhere):
            used |= {name: min(place, used.get(name, place)) for name in found}
    before: dict[fx.Node, int] = {}  # the first call that reads what comes of it
    for node in reversed(calls):
        if node in terms:
            before[node] = min((before.get(user, at.get(user, len(others))) for user in node.users), default=len(others))
    behind: dict[fx.Node, int] = {}
    here = -1
    for node in calls:
        if node in at:
            here = at[node]
            continue
        read = frozenset[str]().union(*(names[source] for source in node.all_input_nodes if source in names))
        made = max((behind[source] for source in node.all_input_nodes if source in terms), default=-1)
        homes = [used[name] for name in read if name in used]
        place = max([made, *homes]) if len(homes) == len(read) else here
        behind[node] = max(made, place if place < before[node] else here)
    places = {node: number for number, node in enumerate(calls)}
    return sorted(calls, key=lambda node: (at[node], False, 0) if node in at else (behind[node], True, places[node]))


def terms_of(graph: fx.Graph, parameters: Collection[str]) -> tuple[set[fx.Node], dict[fx.Node, frozenset[str]]]:
    """The calls on parameters alone that are outside of blocks; and parameters on their way to a use, with their names."""
    everywhere = remade(graph, parameters)
    names: dict[fx.Node, frozenset[str]] = {}
    terms, varies = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" and str(node.target) in parameters:
            names[node] = frozenset([str(node.target)])
        elif node in everywhere and any(source in names for source in sources):
            names[node] = frozenset().union(*(names[source] for source in sources))
        elif node.op == "placeholder" or not varies.isdisjoint(sources):
            varies.add(node)
        elif node.op == "call_function" and any(source in names or source in terms for source in sources):
            (varies if facts(node).region else terms).add(node)
    return terms, names


def mark(graph: fx.Graph, starts: Sequence[str], parameters: Collection[str]) -> None:
    """Set the `stage` of every call to the number of `starts` (names of calls) at or before it, in the order of `calls_in_order`.

    Raises PlanError for names that are no call of the graph, or that are given twice.

    >>> mark(captured.graph, ["layer_norm_4", "layer_norm_8"], captured.parameters)      # doctest: +SKIP
    """
    calls = calls_in_order(graph, frozenset(parameters))
    names = [node.name for node in calls]
    known, seen, complaints = set(names), set[str](), list[str]()
    for start in starts:
        if start not in known:
            complaints.append(f"{start!r} is no call of the graph.{near(start, names)}")
        elif start in seen:
            complaints.append(f"{start!r} begins two stages.")
        seen.add(start)
    raise_all(PlanError, "stages:", complaints)
    stage = 0
    for node in calls:
        stage += node.name in seen
        set_facts(node, replace(facts(node), stage=stage))


def split(
    graph: fx.Graph,
    stages: int,
    *,
    parameters: Collection[str],
    mutations: Sequence[str] = (),
    wanted: Collection[int] | None = None,
) -> tuple[StageGraph, ...]:
    """Cut `graph` by the `stage` of its calls into `stages` graphs; the given graph is left alone.

    `parameters` holds the `get_attr` targets that are trained; every stage that uses one reads it itself. `mutations` names the buffers
    whose new values are the last outputs of the graph. `wanted`: which of the outputs before them the last stage returns (None: all);
    what only the others need is dropped. Calls without a mark (made by passes) go to the stage that gives
    them their operand, or to the one that uses them where the result is larger.

    Run `Coalesce` after it or before, but `SeedRandom` before: random numbers follow from a node's place in the whole graph.

    Raises PlanError when a mark is outside `stages`, or when a buffer is read on an earlier stage than it is updated on.
    """
    return _Splitter(graph, stages, frozenset(parameters), tuple(mutations), wanted).run()


def shared_parameters(stages: Sequence[StageGraph], parameters: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The parameters that several stages read -> these stages: their gradients must be summed over them."""
    readers: dict[str, list[int]] = {}
    known = frozenset(parameters)
    for stage in stages:
        for name in dict.fromkeys(str(node.target) for node in stage.graph.nodes if node.op == "get_attr"):
            if name in known:
                readers.setdefault(name, []).append(stage.index)
    return {name: tuple(found) for name, found in readers.items() if len(found) > 1}


def updaters(stages: Sequence[StageGraph]) -> dict[str, tuple[int, ...]]:
    """The buffers that change -> the stages that write their new values."""
    names = dict.fromkeys(name for stage in stages for name in stage.mutations)
    return {name: tuple(stage.index for stage in stages if name in stage.mutations) for name in names}


def remade(graph: fx.Graph, parameters: Collection[str]) -> set[fx.Node]:
    """The nodes that every stage makes for itself.

    Those that depend on no parameter, and parameters on the way to their use (converted, cast, transposed). Random draws without a key
    are neither.
    """
    fixed: set[fx.Node] = set()
    dressed: set[fx.Node] = set()
    known = frozenset(parameters)
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" and str(node.target) in known:
            dressed.add(node)
        elif node.op in ("placeholder", "get_attr"):
            fixed.add(node)
        elif node.op == "call_function" and not _draws(node) and node.target is not EXPECT:
            if all(source in fixed for source in sources):
                fixed.add(node)
            elif all(source in dressed for source in sources) and _dresses(node):
                dressed.add(node)
    return fixed | dressed


def needed(graph: fx.Graph, values: Iterable[Any]) -> set[fx.Node]:
    """What these values and the checks of `graph` depend on, themselves included: functional graphs have no other effect."""
    checks = [node for node in graph.nodes if node.target is EXPECT]
    return _closure([*checks, *(value for value in values if isinstance(value, fx.Node))], _sources)


class _Splitter:
    """The graph while it is being split.

    Nodes in `copied` are made in every stage that needs them. All others have one stage, `stage`, and a last one that needs them, `last`.
    """

    def __init__(
        self, graph: fx.Graph, stages: int, parameters: frozenset[str], mutations: tuple[str, ...], wanted: Collection[int] | None
    ) -> None:
        self.stages, self.parameters, self.mutations = stages, parameters, mutations
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        values: Any = self.nodes[-1].args[0]
        count = len(values) - len(mutations)
        self.values = values[:count]
        self.updates: dict[str, Any] = dict(zip(mutations, values[count:]))
        self.wanted = tuple(range(count)) if wanted is None else tuple(sorted(wanted))
        self.alive = needed(graph, (*(self.values[i] for i in self.wanted), *self.updates.values()))
        self.copied = remade(graph, parameters)
        self.stage: dict[fx.Node, int] = {}
        self.last: dict[fx.Node, int] = {}
        self.own: list[list[fx.Node]] = [[] for _ in range(stages)]

    def run(self) -> tuple[StageGraph, ...]:
        self._place()
        needs = [self._needs(s) for s in range(self.stages)]
        updated = self._update_buffers(needs)
        self._forward(needs)
        handed = self._handed()
        return tuple(self._build(s, needs[s], handed, updated[s]) for s in range(self.stages))

    # -- what there is -------------------------------------------------------------------------------------------------------------------

    def _calls(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.op == "call_function" and node in self.alive]

    def _place(self) -> None:
        """A stage for every node that is not copied: its mark, but never before what it depends on."""
        calls = self._calls()
        wishes = _wishes(calls)
        for node in calls:
            if node in self.copied:
                continue
            sources = [source for source in node.all_input_nodes if source not in self.copied]
            least = max((self.stage[source] for source in sources), default=0)
            marked = facts(node).stage
            if node.target is operator.getitem or (marked is None and sources and not _grows(node, sources)):
                place = least
            else:
                place = max(least, wishes.get(node, 0))
            if not 0 <= place < self.stages:
                raise PlanError(f"{node.name} is marked for stage {place} of {self.stages}: stages are numbered from 0.")
            self.stage[node] = self.last[node] = place
            self.own[place].append(node)

    def _needs(self, stage: int) -> set[fx.Node]:
        """All nodes a stage has to have: its own, what it returns, and what these read."""
        read = [source for node in self.own[stage] for source in _sources(node)]
        if stage == self.stages - 1:
            read += [v for i in self.wanted if isinstance(v := self.values[i], fx.Node)]
        return {*self.own[stage], *self._with_sources(read)}

    def _with_sources(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """`nodes`, and what those of them that are copied are made from."""
        return _closure(nodes, lambda node: _sources(node) if node in self.copied else ())

    def _update_buffers(self, needs: list[set[fx.Node]]) -> list[list[str]]:
        """Every stage that reads a buffer that changes writes its new value too. `needs` grows by that."""
        reads = {str(node.target): node for node in self.nodes if node.op == "get_attr" and str(node.target) in self.updates}
        updated: list[dict[str, None]] = [{} for _ in range(self.stages)]
        waiting = [(name, stage) for name in self.mutations for stage in self._homes(name, reads, needs)]
        while waiting:
            name, stage = waiting.pop()
            if name in updated[stage]:
                continue
            updated[stage][name] = None
            value = self.updates[name]
            if isinstance(value, fx.Node) and value in self.copied:
                needs[stage] |= self._with_sources([value])
            elif isinstance(value, fx.Node):
                self._check_order(name, stage, self.stage[value])
                needs[stage].add(value)
            waiting += [(n, stage) for n, node in reads.items() if node in needs[stage] and n not in updated[stage]]
        return [[name for name in self.mutations if name in found] for found in updated]

    def _homes(self, name: str, reads: Mapping[str, fx.Node], needs: Sequence[set[fx.Node]]) -> list[int]:
        value = self.updates[name]
        readers = [s for s in range(self.stages) if name in reads and reads[name] in needs[s]]
        if isinstance(value, fx.Node) and value in self.stage:
            return [*readers, self.stage[value]]
        marked = facts(value).stage if isinstance(value, fx.Node) else None
        return readers or [marked or 0]

    def _check_order(self, name: str, reader: int, home: int) -> None:
        if reader < home:
            raise PlanError(
                f"buffer {name} is read on stage {reader} and gets its new value on stage {home}: "
                "the next microbatch would read the old one. Choose stages that keep the modules that use it together."
            )

    def _forward(self, needs: Sequence[set[fx.Node]]) -> None:
        """The last stage that needs each value."""
        for stage, nodes in enumerate(needs):
            for node in nodes:
                if node in self.last:
                    self.last[node] = max(self.last[node], stage)

    def _handed(self) -> list[list[fx.Node]]:
        """Per stage, what the stage before hands to it, in the order of the graph."""
        handed: list[list[fx.Node]] = [[] for _ in range(self.stages + 1)]
        for node, made in self.stage.items():
            for stage in range(made + 1, self.last[node] + 1):
                handed[stage].append(node)
        return handed

    # -- building ------------------------------------------------------------------------------------------------------------------------

    def _build(self, stage: int, needs: set[fx.Node], handed: Sequence[Sequence[fx.Node]], updated: Sequence[str]) -> StageGraph:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in handed[stage]:
            made[node] = set_facts(graph.create_node("placeholder", node.name, name=node.name), facts(node))
        ordered = sorted((node for node in needs if node not in made), key=self.index.__getitem__)
        inputs = [node for node in ordered if node.op == "placeholder"]
        for node in (*inputs, *(node for node in ordered if node.op != "placeholder")):
            made[node] = _copy(graph, node, needs, made)
        returned = self.wanted if stage == self.stages - 1 else ()
        values = [*handed[stage + 1], *(self.values[i] for i in returned), *(self.updates[name] for name in updated)]
        graph.output(tuple(made[v] if isinstance(v, fx.Node) else v for v in values))
        return StageGraph(
            stage,
            graph,
            tuple(node.name for node in handed[stage]),
            tuple(str(node.target) for node in inputs),
            tuple(node.name for node in handed[stage + 1]),
            tuple(returned),
            tuple(updated),
        )


def _closure(start: Sequence[fx.Node], sources: Callable[[fx.Node], Sequence[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += sources(node)
    return found


def _draws(node: fx.Node) -> bool:
    """Whether a node draws other numbers every time it runs: not once it has a key."""
    return "key" not in node.kwargs and (facts(node).seed is not None or draws(node))


def _dresses(node: fx.Node) -> bool:
    """Whether a call on parameters alone only prepares one for its use, and makes it no smaller."""
    if facts(node).conversion is not None or facts(node).joined or node.target is operator.getitem:
        return True
    info, sources = facts(node).info, node.all_input_nodes
    if len(sources) != 1 or not isinstance(info, Info) or not isinstance(before := facts(sources[0]).info, Info):
        return False
    return prod(info.shape) >= prod(before.shape)


def _wishes(calls: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Every call's mark, or else the earliest one among those that use it."""
    found: dict[fx.Node, int] = {}
    for node in reversed(calls):
        marked = facts(node).stage
        wishes = [found[user] for user in node.users if user in found] if marked is None else [marked]
        if wishes:
            found[node] = min(wishes)
    return found


def _grows(node: fx.Node, sources: Sequence[fx.Node]) -> bool:
    return _nbytes(node) > max(_nbytes(source) for source in sources)


def _nbytes(node: fx.Node) -> int:
    return sum(i.nbytes for i in infos_of(node) if i is not None)


def _sources(node: fx.Node) -> Sequence[fx.Node]:
    """What a node reads. One result of a joined conversion is made from one of its operands alone."""
    if facts(node).joined:
        return ()
    if node.target is operator.getitem and facts(joined := node.all_input_nodes[0]).joined:
        return (joined, joined.args[int(node.args[1])])  # type: ignore[arg-type, return-value]
    return node.all_input_nodes


def _copy(graph: fx.Graph, node: fx.Node, needs: Collection[fx.Node], made: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node in a stage's graph. A joined conversion keeps only the parameters that this stage uses."""
    joined = node if facts(node).joined else node.all_input_nodes[0] if node.target is operator.getitem else None
    if joined is None or not facts(joined).joined:
        return graph.node_copy(node, made.__getitem__)
    items = sorted({int(user.args[1]) for user in joined.users if user in needs})  # type: ignore[arg-type]
    args: tuple[Any, ...] = tuple(made[joined.args[i]] for i in items)  # type: ignore[index]
    if node is not joined:
        args = (made[joined], items.index(int(node.args[1])))  # type: ignore[arg-type]
    new = graph.create_node("call_function", node.target, args, dict(node.kwargs), node.name)
    known = facts(node)
    if node is joined:
        infos = infos_of(node)
        known = replace(known, info=tuple(infos[i] for i in items), joined=tuple(known.joined[i] for i in items))
    return set_facts(new, known)
