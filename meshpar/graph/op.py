"""An operator call as the rules see it: its tensor operands and results, and its plain arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import fx

from meshpar.graph.facts import Info, facts, info_of, infos_of
from meshpar.ops.nature import Nature

Value = tuple[fx.Node, int]
"""One tensor of the graph: the node that makes it and which of its results it is."""


@dataclass(frozen=True)
class Op:
    """One `call_function` node, read once."""

    node: fx.Node
    name: str
    """The operator without its overload, e.g. "add" or "meshpar.dispatch"."""
    operands: tuple[fx.Node, ...]
    infos: tuple[Info, ...]
    outs: tuple[Info | None, ...]
    arguments: dict[str, Any]
    """Every argument by its schema name, defaults filled in."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the operands."""
        return [i.shape for i in self.infos]

    @property
    def nature(self) -> Nature | None:
        """What is known of its backward, where that is its own."""
        return facts(self.node).nature

    @property
    def out(self) -> Info:
        """The first result."""
        assert self.outs[0] is not None
        return self.outs[0]

    def dim(self, name: str = "dim", operand: int = 0) -> int:
        """A dim argument, counted from the front."""
        return int(self.arguments[name]) % max(1, len(self.infos[operand].shape))

    def dims(self, name: str = "dim", operand: int = 0) -> tuple[int, ...]:
        """A list of dims, counted from the front; all of them when none is given."""
        rank = len(self.infos[operand].shape)
        given = self.arguments.get(name)
        if given is None or given == []:
            return tuple(range(rank))
        return tuple(sorted(d % max(1, rank) for d in (given if isinstance(given, (list, tuple)) else [given])))


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes among a node's arguments, in order and with repetitions."""
    return tuple(_nodes((node.args, node.kwargs)))


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _nodes(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _nodes(one)


@lru_cache(maxsize=4096)  # asked for every operator that runs under selective recompute
def op_name(target: Any) -> str:
    """The operator's name without namespace "aten" and without overload."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    namespace, _, name = schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def read(node: fx.Node) -> Op:
    """Read a `call_function` node whose values are described; what it is handed beside tensors is no operand."""
    nodes = tuple(n for n in operands(node) if facts(n).info is not None)
    return Op(
        node,
        op_name(node.target),
        nodes,
        tuple(info_of(n) for n in nodes),
        infos_of(node),
        _arguments(node),
    )


def kind_of(node: fx.Node) -> tuple[Any, ...]:
    """What a call is, whatever the values it is given: equal for calls that obey the same rule in the same way."""
    places: dict[fx.Node, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return fx.Node, places.setdefault(value, len(places))
        if isinstance(value, (tuple, list)):
            return tuple(plain(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, plain(v)) for k, v in value.items())
        return value

    written = plain(node.args), plain(node.kwargs)
    return node.target, written, tuple(facts(n).info for n in places), facts(node).info


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    found.update(node.kwargs)
    return found


def value_of(node: fx.Node) -> Value:
    """The value a node stands for: `getitem` names a result of its producer."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
    return node, 0


def value_info(value: Value) -> Info:
    """Shape and dtype of a value."""
    node, index = value
    info = infos_of(node)[index]
    assert info is not None
    return info
