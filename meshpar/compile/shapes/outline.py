"""What goes into a graph and what comes out, without what is between: of a program whose code was made of another one's.

sizes = sizes_of(graph)                  [6, 16, 6, 16, 6, 16, 512]
outline(graph, iter([6, 23, ...]))       the same inputs and outputs at other sizes; the calls are not there
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from torch import fx

from meshpar.graph.facts import Facts, Info, facts, gives_several, infos_of, set_facts


def sizes_of(graph: fx.Graph) -> list[int]:
    """The sizes of all inputs and outputs of a graph, in the order of `outline`."""
    return [n for node in (*_inputs(graph), *_outputs(graph)) for info in infos_of(node) if isinstance(info, Info) for n in info.shape]


def outline(graph: fx.Graph, sizes: Iterator[int]) -> fx.Graph:
    """The inputs and outputs of `graph` at other `sizes`."""
    new = fx.Graph()
    made: dict[Any, fx.Node] = {node: _resized(new.placeholder(str(node.target)), node, sizes) for node in _inputs(graph)}
    given = tuple(made.values())
    made |= {node: _resized(new.call_function(computed_elsewhere, given), node, sizes) for node in _outputs(graph)}
    new.output(fx.map_arg(graph.output_node().args[0], lambda node: made[node]))
    return new


def computed_elsewhere(*_: Any) -> NoReturn:
    """Stands for the calls of a graph that were left out."""
    raise RuntimeError("an outline of a program says what goes in and what comes out: its code computes it.")


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.output_node().all_input_nodes if node.op != "placeholder"]


def _resized(new: fx.Node, like: fx.Node, sizes: Iterator[int]) -> fx.Node:
    infos = tuple(
        replace(info, shape=tuple(next(sizes) for _ in info.shape)) if isinstance(info, Info) else info for info in infos_of(like)
    )
    return set_facts(new, Facts(infos if gives_several(like) else infos[0], extra=facts(like).extra))
