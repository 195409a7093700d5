"""A collective in a lowered graph: that it takes what is there, on the axis of its group, and in the layout that it is told."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from meshpar.graph.facts import facts
from meshpar.graph.op import operands
from meshpar.proof.static import beside
from meshpar.proof.static.claims import Claims, LocalValue
from meshpar.proof.static.exchanges import EXCHANGES
from meshpar.proof.static.forms import told
from meshpar.proof.static.layout import layout_of, normal, of_layout
from meshpar.proof.static.reader import PASS, GradientEdge, GradientStep, LocalKey, Made, ProgramReading, key_of
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.sharding.types import I, P, Partial, Shard, Type


def exchange(claims: Claims, level: Mapping[str, int], reading: ProgramReading, node: fx.Node) -> Made:
    """What a conversion makes of what it reads."""
    name, _ = beside.conversion_of(node)
    group = str(node.kwargs["group"])
    if group not in level:
        raise Contradiction("it runs in a group of ranks that is no axis of values")
    k = level[group]
    axis = claims.axes[k]
    if node.kwargs["size"] != axis.size or node.kwargs["rank"] != axis.rank:
        raise Contradiction(f"on {axis.name}: it is told {node.kwargs['size']} ranks and rank {node.kwargs['rank']}")
    keys = [key_of(a) for a in (operands(node)[:1] if beside.computes(node) else operands(node))]
    one = "i_to_r" if name == "i_to_r_many" else name
    if one not in EXCHANGES:
        raise Unproved("a collective that is not known")
    made = [_one(claims, reading, node, one, key, k) for key in keys]
    return Made(tuple(held for held, _ in made), tuple((edge,) for _, edge in made))


def _one(claims: Claims, reading: ProgramReading, node: fx.Node, name: str, key: LocalKey, k: int) -> tuple[LocalValue, GradientEdge]:
    held, row, axis = reading.held.get(key), EXCHANGES[name], claims.axes[k]
    if held is None:
        raise Unproved("it reads a value of which nothing is known")
    has = held.types[k]
    wrong = {"same": has != I, "part": not isinstance(has, Shard), "sum": not isinstance(has, Partial)}[row.takes]
    if wrong:
        raise Contradiction(f"on {axis.name}: it takes {_WORDS[row.takes]}, and is handed what is {told(has)}")
    _, said = beside.conversion_of(node)
    layouts = [Shard(*said[at : at + 3]) for at in range(0, len(said) - 2, 3)]
    told_before = layouts.pop(0) if row.takes == "part" else None
    told_after = layouts.pop(0) if row.gives == "part" else None
    shapes = claims.shapes(held.value, held.types)
    if told_before is not None:
        assert isinstance(has, Shard)
        _check_layout(claims, held, k, has, told_before, shapes[k])
    gives: Type = P if row.gives == "sum" else I
    if told_after is not None:
        gives = _given(claims, held, k, told_after, shapes[k])
    _check_rows(held, has, gives)
    after = _nested(claims, held, k, has, gives)
    steps = [PASS] * len(claims.axes)
    steps[k] = GradientStep(row.handed, row.returned)
    return after, GradientEdge(key, tuple(steps))


_WORDS = {"same": "what is the same on all ranks", "part": "parts", "sum": "a pending sum"}


def _check_layout(claims: Claims, held: LocalValue, k: int, has: Shard, said: Shard, shape: tuple[int, ...]) -> None:
    ranks = claims.axes[k].size
    if said.dim != has.dim:
        raise Contradiction(f"on {claims.axes[k].name}: it puts dim {said.dim} together, dim {has.dim} is cut")
    later = _later(claims, held, k, has.dim)
    if layout_of(said, ranks) == layout_of(_seen(has, shape[has.dim], later), ranks):
        return
    raise Contradiction(f"on {claims.axes[k].name}: it is told that ranks have {said}, they have {_seen(has, shape[has.dim], later)}")


def _later(claims: Claims, held: LocalValue, k: int, dim: int) -> int:
    """In how many parts later axes cut a dim."""
    found = 1
    for axis, type_ in zip(claims.axes[k + 1 :], held.types[k + 1 :], strict=True):
        if isinstance(type_, Shard) and type_.dim == dim:
            if not type_.is_even(axis.size):
                raise Unproved("a dim that several axes cut, unevenly, is exchanged")
            found *= axis.size
    return found


def _seen(shard: Shard, length: int, later: int) -> Shard:
    """A shard of what later axes leave of a dim."""
    return shard if later == 1 else Shard(shard.dim, shard.repeat, tuple(_fewer(u, s, later) for u, s in shard.segments))


def _fewer(units: int, size: int, later: int) -> tuple[int, int]:
    if size % later == 0:
        return units, size // later
    if units * size % later:
        raise Unproved("a dim that several axes cut, unevenly, is exchanged")
    return units * size // later, 1


def _given(claims: Claims, held: LocalValue, k: int, said: Shard, shape: tuple[int, ...]) -> Shard:
    later = _later(claims, held, k, said.dim)
    axis = claims.axes[k]
    if said.length * later != shape[said.dim]:
        raise Contradiction(f"on {axis.name}: it deals out {said.length} elements of dim {said.dim}, there are {shape[said.dim] // later}")
    if later == 1:
        return said
    return of_layout(said.dim, normal((said.repeat, tuple((u, s * later) for u, s in said.segments)), axis.size))


def _check_rows(held: LocalValue, has: Type, gives: Type) -> None:
    info = facts(held.value[0]).info
    one = info[held.value[1]] if isinstance(info, tuple) else info
    if getattr(one, "rows", False) and any(isinstance(t, Shard) and t.dim == 0 for t in (has, gives)):
        raise Contradiction("rows in the order of experts are exchanged as if they were in the order of samples")


def _nested(claims: Claims, held: LocalValue, k: int, has: Type, gives: Type) -> LocalValue:
    """The value after its type on one axis changed: parts that later axes have of the same dim are others then."""
    types = list(held.at(k, gives).types)
    for at in range(k + 1, len(types)):
        inner = types[at]
        if not isinstance(inner, Shard):
            continue
        before, after = (isinstance(t, Shard) and t.dim == inner.dim for t in (has, gives))
        if before == after:
            continue
        types[at] = _joined_parts(inner, claims.axes[k].size, claims.axes[at].size) if before else _parted(inner, claims.axes[k].size)
    return LocalValue(held.value, tuple(types))


def _joined_parts(inner: Shard, outer: int, ranks: int) -> Shard:
    """Each of `outer` parts of a dim is cut; put together, the whole is cut in as many stretches."""
    return of_layout(inner.dim, normal((inner.repeat * outer, inner.segments), ranks))


def _parted(inner: Shard, outer: int) -> Shard:
    if inner.repeat % outer:
        raise Unproved("a dim that an inner axis cuts is dealt out on an outer one")
    return Shard(inner.dim, inner.repeat // outer, inner.segments)
