"""Keys and values stay on the ranks that made them: taken as shards, given back as shards, on the stage of their layer.

before                                                       after
  cache: I, whole on every rank of tp
  part  = i_to_s(cache, 1)        this rank's heads          keys  = cat(cache, k)        cache is this rank's heads
  keys  = cat(part, k)
  stage 0 -- k --> stage 1 -- k --> output                   stage 0 -- k --> output of stage 0
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import fx

from meshpar.compile.program import Program
from meshpar.compile.split import StageGraph
from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.mesh import Axis
from meshpar.ops import collectives
from meshpar.sharding.types import I, Shard, Type

APART = {1: "heads", 3: "width"}
"""The dims along which a cache is kept in shards. (Samples are reordered, and positions written one by one: these are whole.)"""
AxisTypes = Mapping[str, Type]
"""The type of a value on each axis whose ranks share a batch."""


@dataclass(frozen=True)
class Settled:
    """A program, the types at which it takes the inputs of its cache, and which outputs its cache consists of, that stay on their stage."""

    program: Program
    taken: Mapping[str, AxisTypes]
    outputs: tuple[int | None, ...]
    """In the order of the leaves; None for one that is no tensor."""

    @cached_property
    def stay(self) -> frozenset[int]:
        """Those that are tensors."""
        return frozenset(i for i in self.outputs if i is not None)


def settled(program: Program, inputs: Collection[str], outputs: Sequence[int | None], axes: Collection[Axis]) -> Settled:
    """`program` taking `inputs` as shards where its first deed is to cut them, and keeping `outputs` on the stages that make them."""
    graphs = list(dict.fromkeys(stage.graph for stage in program.all_stages)) or [program.graph]
    taken = {name: _taken([n for graph in graphs for n in _inputs(graph, name)], axes) for name in inputs}
    stay = [i for i in outputs if i is not None]
    return Settled(replace(program, all_stages=_at_home(program.all_stages, stay)), taken, tuple(outputs))


def _inputs(graph: fx.Graph, name: str) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder" and node.target == name)


def _taken(inputs: list[fx.Node], axes: Collection[Axis]) -> AxisTypes:
    """The types of an input, after the cuts that all its uses begin with are done outside."""
    types: dict[str, Type] = {axis.name: I for axis in axes}
    names = {axis.group: axis.name for axis in axes}
    while cuts := _cuts(inputs, names):
        dim, repeat, segments = cast(Any, cuts[0].args[1:])
        types[names[str(cuts[0].kwargs["group"])]] = Shard(dim, repeat, tuple(tuple(one) for one in segments))
        for node in inputs:
            for cut in list(node.users):
                set_facts(node, replace(facts(node), info=info_of(cut)))
                cut.replace_all_uses_with(node)
                node.graph.erase_node(cut)
    return types


def _cuts(inputs: list[fx.Node], groups: Collection[str]) -> list[fx.Node]:
    """All uses of an input, if each cuts its heads or their width in the same way over one of `groups`."""
    users = [user for node in inputs for user in node.users]
    if any(user.target is not collectives.i_to_s or user.kwargs["group"] not in groups or user.args[1] not in APART for user in users):
        return []
    return users if len({repr((user.args[1:], user.kwargs["group"])) for user in users}) == 1 else []


def _at_home(stages: tuple[StageGraph, ...], outputs: Collection[int]) -> tuple[StageGraph, ...]:
    """Stages that return `outputs` where they are computed, instead of handing them to the last stage."""
    if not stages:
        return stages
    found, last = list(stages), stages[-1]
    returned: Any = last.graph.output_node().args[0]
    values = dict(zip(last.outputs, returned[len(last.sends) :], strict=False))
    for index in outputs:
        name, at = values[index].name, len(stages) - 1
        while name in found[at].receives:
            at -= 1
        if at < len(stages) - 1:
            found[-1] = _without(found[-1], index)
            found[at] = _returning(found[at], index, name)
            for one in range(len(stages) - 1, at, -1):
                found[one - 1], found[one] = _unsent(found[one - 1], found[one], name)
    return tuple(found)


def _without(stage: StageGraph, index: int) -> StageGraph:
    """A stage that does not return an output any more."""
    at = len(stage.sends) + stage.outputs.index(index)
    _return(stage, lambda values: values[:at] + values[at + 1 :])
    return replace(stage, outputs=tuple(i for i in stage.outputs if i != index))


def _returning(stage: StageGraph, index: int, name: str) -> StageGraph:
    """A stage that returns one output more."""
    node = next(n for n in stage.graph.nodes if n.name == name)
    at = len(stage.sends) + len(stage.outputs)
    _return(stage, lambda values: (*values[:at], node, *values[at:]))
    return replace(stage, outputs=(*stage.outputs, index))


def _unsent(stage: StageGraph, after: StageGraph, name: str) -> tuple[StageGraph, StageGraph]:
    """Two stages of which the second is not handed a value any more, unless it has a use for it."""
    (node,) = (n for n in after.graph.nodes if n.name == name)
    if node.users:
        return stage, after
    after.graph.erase_node(node)
    at = stage.sends.index(name)
    _return(stage, lambda values: values[:at] + values[at + 1 :])
    return (
        replace(stage, sends=tuple(n for n in stage.sends if n != name)),
        replace(after, receives=tuple(n for n in after.receives if n != name)),
    )


def _return(stage: StageGraph, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    output = stage.graph.output_node()
    output.args = (change(tuple(cast(Any, output.args[0]))),)
