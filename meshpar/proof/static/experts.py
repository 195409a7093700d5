"""Rows of experts: sorted by expert, sent to the ranks of the experts, multiplied there by their matrices, and sent back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from meshpar.graph.facts import infos_of
from meshpar.graph.op import Op, Value, operands, value_of
from meshpar.proof.static.claims import Claims, LocalValue
from meshpar.proof.static.forms import WHOLE, Outcome, told
from meshpar.proof.static.reader import PASS, GradientEdge, GradientStep, Made, ProgramReading, key_of
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.sharding.types import Owned, Partial, Ragged, Shard, Type, plain


@dataclass(frozen=True, slots=True)
class RowsRoute:
    """The way that rows went: which call of the model sorted them, on which axis they went, and how they lay before."""

    dispatch: fx.Node
    level: int
    home: Type


Movement = Callable[[Claims, Mapping[str, int], dict[fx.Node, RowsRoute], ProgramReading, fx.Node], Made]


def _sent(claims: Claims, level: Mapping[str, int], routes: dict[fx.Node, RowsRoute], reading: ProgramReading, node: fx.Node) -> Made:
    k = _level(claims, level, node)
    keys = [key_of(a) for a in operands(node)[:2]]
    held = [reading.held.get(key) for key in keys]
    x, ends = held
    if x is None or ends is None:
        raise Unproved("it reads a value of which nothing is known")
    source = claims.dispatches.get(x.value)
    if source is None or x.value != (source, 0) or ends.value != (source, 1):
        raise Contradiction("what it sends are not the rows that one dispatch sorted, with their ends")
    if not isinstance(x.types[k], Shard) or x.types[k].dim != 0:  # type: ignore[union-attr]
        raise Contradiction(f"on {claims.axes[k].name}: it sends rows that are {told(x.types[k])}: experts would get them several times")
    if not isinstance(ends.types[k], Partial):
        raise Contradiction(f"on {claims.axes[k].name}: the ends are not those of the rows that a rank has")
    routes[node] = RowsRoute(source, k, x.types[k])
    steps = [PASS] * len(claims.axes)
    steps[k] = GradientStep(WHOLE, WHOLE)
    results: list[LocalValue | None] = [x.at(k, Ragged()), ends.at(k, Ragged())]
    count = len(infos_of(node))
    edges = ((GradientEdge(keys[0], tuple(steps)),), *((),) * (count - 1))
    return Made((*results, *(None,) * (count - 2)), edges)


def _returned(claims: Claims, level: Mapping[str, int], routes: dict[fx.Node, RowsRoute], reading: ProgramReading, node: fx.Node) -> Made:
    k = _level(claims, level, node)
    y, *way = (key_of(a) for a in operands(node))
    held = reading.held.get(y)
    if held is None:
        raise Unproved("it reads a value of which nothing is known")
    senders = {key[0] for key in way}
    route = routes.get(next(iter(senders))) if len(senders) == 1 else None
    if route is None or [key[1] for key in way] != [2, 3, 4]:
        raise Contradiction("the way back is not one that rows went")
    if route.level != k or not isinstance(held.types[k], Ragged):
        raise Contradiction(f"on {claims.axes[k].name}: it sends back what is {told(held.types[k])}")
    if claims.dispatches.get(held.value) is not route.dispatch:
        raise Contradiction("rows go back the way that those of another layer went")
    steps = [PASS] * len(claims.axes)
    steps[k] = GradientStep(WHOLE, WHOLE)
    return Made((held.at(k, route.home),), ((GradientEdge(y, tuple(steps)),),))


def _level(claims: Claims, level: Mapping[str, int], node: fx.Node) -> int:
    group = str(node.kwargs["group"])
    if group not in level:
        raise Contradiction("it runs in a group of ranks that is no axis of values")
    axis = claims.axes[level[group]]
    if node.kwargs["size"] != axis.size or node.kwargs["rank"] != axis.rank:
        raise Contradiction(f"on {axis.name}: it is told {node.kwargs['size']} ranks and rank {node.kwargs['rank']}")
    return level[group]


MOVEMENTS: Mapping[str, Movement] = {
    "meshpar.ops.expert_all_to_all.send_rows": _sent,
    "meshpar.ops.products.send_rows": _sent,
    "meshpar.ops.expert_all_to_all.return_rows": _returned,
}


def on_rows(op: Op, types: Sequence[Type]) -> Outcome | None:
    """What meets matrices or tables of which each rank has those of its experts; None for another call."""
    table = {"meshpar.grouped_mm": 1, "index": 0, "meshpar.row_expert": -1}.get(op.name)
    if table is None or not any(isinstance(t, Ragged) for t in types):
        return None
    if op.name == "meshpar.row_expert":
        if not all(isinstance(t, Ragged) for t in types):
            raise Contradiction("rows and their ends are not of the same ranks")
        return Outcome((Ragged(),), (WHOLE,) * len(types))
    if not isinstance(types[table], Shard) or types[table].dim != 0:  # type: ignore[union-attr]
        raise Contradiction(f"rows of a rank's experts meet a table that is {told(types[table])}")
    if not all(isinstance(t, Ragged) for i, t in enumerate(types) if i != table):
        raise Contradiction("rows of a rank's experts meet what is not of its experts")
    return Outcome((Ragged(),), (WHOLE,) * len(types))


def own_part(op: Op, values: Sequence[Value], claims: Claims) -> Op:
    """The stack of what a rank owns: of the model's stack, the operands that lie on this rank, in their order. Raises Contradiction."""

    def here(part: fx.Node) -> bool:
        types = claims.parameters.get(str(part.target), ())
        return all(not isinstance(t, Owned) or t.rank == max(a.rank, 0) for a, t in zip(claims.axes, types, strict=False))

    own = [i for i, part in enumerate(op.operands) if here(part)]
    if [value_of(op.operands[i]) for i in own] != list(values):
        raise Contradiction("the parameters that are stacked are not those of the experts of this rank, in their order")
    return replace(op, operands=tuple(op.operands[i] for i in own), infos=tuple(op.infos[i] for i in own))


def stacked(op: Op, types: Sequence[Type]) -> Outcome | None:
    """The parameters of experts that are kept as a list, of which a rank has its own, or a part of each; None where it stacks sums."""
    if not any(isinstance(t, (Owned, Shard)) for t in types):
        return None
    if all(isinstance(t, Owned) for t in types):
        return Outcome((plain(0, op.out.shape[0]),), (WHOLE,) * len(types))
    if any(isinstance(t, Owned) for t in types):
        raise Contradiction("parameters of one rank are stacked with those of others")
    dims = {t for t in types}
    if len(dims) == 1 and isinstance(one := next(iter(dims)), Shard):
        return Outcome((Shard(one.dim + 1, one.repeat, one.segments),), (WHOLE,) * len(types))
    raise Contradiction("parameters that lie in different ways are stacked")
