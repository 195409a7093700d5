"""A graph as two lists: what it is, and its numbers. Graphs of two shapes are alike if the first are equal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from meshpar.compile.shapes.numbers import Number
from meshpar.graph.facts import Facts, Info, facts, infos_of, set_facts


def _all(known: Facts) -> Hashable:
    return replace(known, info=None)


def written(graph: fx.Graph, about: Callable[[Facts], Hashable] = _all) -> tuple[list[Any], list[Number], list[Number]]:
    """What a graph is but for its numbers, the numbers of its arguments, the sizes of its values; all in its order.

    `about`: what counts of the facts of a node.
    """
    what: list[Any] = []
    arguments: list[Number] = []
    sizes: list[Number] = []
    for node in graph.nodes:
        known = facts(node)
        kinds = tuple(_kind(info, sizes) for info in infos_of(node))
        what.append((node.op, node.name, node.target, plain((node.args, node.kwargs), arguments), kinds, about(known)))
    return what, arguments, sizes


def plain(value: Any, numbers: list[Number]) -> Any:
    """An argument without its numbers, which are put into `numbers`."""
    kind = type(value)
    if kind is int or (kind is float and value == value):
        numbers.append(value)
        return kind
    if isinstance(value, fx.Node):
        return fx.Node, value.name
    if isinstance(value, (list, tuple)):
        return tuple([plain(one, numbers) for one in value])
    if isinstance(value, Mapping):
        return tuple([(key, plain(one, numbers)) for key, one in value.items()])
    return kind, value if isinstance(value, _PLAIN) else repr(value)


_PLAIN = (bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _kind(info: Any, sizes: list[Number]) -> Any:
    if not isinstance(info, Info):
        return info
    sizes.extend(info.shape)
    return len(info.shape), info.dtype, info.requires_grad, info.rows


def with_numbers(graph: fx.Graph, numbers: Iterator[Number]) -> fx.Graph:
    """The same graph with other numbers as arguments, in the order of `written`; the facts of its nodes are as they were."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}

    def changed(value: Any) -> Any:
        kind = type(value)
        if kind is int or (kind is float and value == value):
            return next(numbers)
        if isinstance(value, fx.Node):
            return made[value]
        if isinstance(value, (list, tuple)):
            return type(value)([changed(one) for one in value])
        if isinstance(value, Mapping):
            return {key: changed(one) for key, one in value.items()}
        return value

    for node in graph.nodes:
        args, kwargs = changed((node.args, dict(node.kwargs)))
        made[node] = set_facts(new.create_node(node.op, node.target, args, kwargs, node.name, node.type), facts(node))
    return new
