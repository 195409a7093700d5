"""Experts whose matrices are cut, beside the gathering of tokens and the summing of their results: all of it becomes one call, in pieces.

before                                                     after
  x = s_to_r(x_s, 0, ...)                                    l_s = linear(x_s, router)
  l = linear(x, router)                                      l = s_to_r(l_s, 0, ...)
  w, index = topk(softmax(l))                                w, index = topk(softmax(l))
  r, e, p = dispatch(x, index, ...)
  y = grouped_mm(silu(grouped_mm(r, u, e)), v, e)
  z_s = p_to_s(combine(y, p, w), 0, ...)                     z_s = on_gathered_tokens(steps, x_s, index, w, ..., u, v)

What experts are chosen by is computed where a token is, and gathered: a few numbers for each, the same on all ranks to the last bit. (A
router whose matrix is cut over the axis, and whose numbers were gathered already, is gathered itself.) Only where nothing else reads the
tokens, all that is made of them treats rows one by one, and all ranks have equally many. (Blocks that are computed again in backward are
left alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Change, Facts, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.ops import collectives, load, pieces, token_pieces
from meshpar.passes import worth
from meshpar.passes.again import ComputeAgain
from meshpar.passes.products import bring, can_come, constants
from meshpar.passes.rows_of_experts import between, items, joined, steps
from meshpar.sharding.price import Price
from meshpar.sharding.types import Shard, Type

aten = torch.ops.aten
FEW = 8
"""Of a token, this share of its bytes is few for what its experts are chosen by."""


@dataclass(frozen=True)
class _Layer:
    """The calls of one layer of experts."""

    gather: fx.Node
    tokens: fx.Node
    """What was gathered, or its rows."""
    cut: Shard
    """How a rank has its own rows of them."""
    choosing: tuple[fx.Node, ...]
    """Products of tokens with parameters."""
    dispatch: fx.Node
    combine: fx.Node
    shaped: tuple[fx.Node, ...]
    """A view of the results, before they are summed."""
    summed: fx.Node


@dataclass(frozen=True)
class CutTokensIntoPieces:
    """Compute experts while tokens and results travel. Changes the graph in place.

    `price`: the constants of the machine that will run, which tell where it takes less (`passes/worth.py`). Without them, `least_bytes`: of
    the tokens of all ranks; fewer are not worth their pieces.
    """

    least_bytes: int = 2**21
    price: Price | None = None

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        fixed = constants(graph)
        for node in list(graph.nodes):
            change = facts(node).conversion
            if node.target is not collectives.s_to_r or change is None:
                continue
            layer = _layer_of(node, change, fixed)
            inside = between(layer.dispatch, layer.combine) if layer is not None else None
            if layer is not None and inside is not None and self._is_worth(change, layer, inside):
                ComputeAgain(within=frozenset(inside))(graph)
                own = _own_rows(graph, layer)
                for product in layer.choosing:
                    _choose_before(graph, layer, own, product)
                _join(graph, layer, own)
        return graph

    def _is_worth(self, change: Change, layer: _Layer, inside: Sequence[fx.Node]) -> bool:
        summed = facts(layer.summed).conversion
        if self.price is None or summed is None:
            return change.whole.nbytes >= self.least_bytes
        return worth.on_gathered_tokens(change, summed, worth.products_of(inside), self.price)


def _layer_of(gather: fx.Node, change: Change, fixed: frozenset[fx.Node]) -> _Layer | None:
    """The layer that tokens are gathered for, if it is one that can be computed in pieces."""
    dim, repeat, segments = _layout(gather)
    shape, tokens = change.whole.shape, gather
    if len(gather.users) == 1 and op_name((viewed := next(iter(gather.users))).target) in _VIEWS:
        tokens = viewed
    rows = info_of(tokens).shape
    if dim != len(shape) - 2 or len(rows) != 2 or rows[1] != shape[-1] or not pieces.is_one_stretch(1, segments, change.size):
        return None
    cut = Shard(0, prod(shape[:dim]) * repeat, segments)
    dispatches = [user for user in tokens.users if user.target in _DISPATCHES]
    choosing = tuple(user for user in tokens.users if user not in dispatches)
    if len(dispatches) != 1 or dispatches[0].args[0] is not tokens or not all(_chooses(gather, tokens, one, fixed) for one in choosing):
        return None
    dispatch = dispatches[0]
    combine = _combine(dispatch)
    if combine is None:
        return None
    shaped: tuple[fx.Node, ...] = ()
    (user,) = combine.users if len(combine.users) == 1 else (None,)
    if user is not None and op_name(user.target) in _VIEWS and len(user.users) == 1:
        shaped, (user,) = (user,), user.users
    if user is None or user.target is not collectives.p_to_s or user.kwargs != gather.kwargs or not _cuts_alike(cut, user):
        return None
    layer = _Layer(gather, tokens, cut, choosing, dispatch, combine, shaped, user)
    own = (gather, tokens, *choosing, dispatch, combine, *shaped, user)
    return layer if len({facts(node).region for node in own}) == 1 else None


_DISPATCHES = (torch.ops.meshpar.dispatch.default, load.dispatch)
_VIEWS = ("view", "reshape", "_unsafe_view")


def _layout(conversion: fx.Node) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    return conversion.args[1:]  # type: ignore[return-value]


def _chooses(gather: fx.Node, tokens: fx.Node, node: fx.Node, fixed: frozenset[fx.Node]) -> bool:
    """Whether a reader of the tokens is a product with a parameter that gives few numbers for each, all of them or, cut, gathered next."""
    change = facts(gather).conversion
    if op_name(node.target) != "linear" or node.args[0] is not tokens or node.kwargs or change is None:
        return False
    others = [n for n in node.args[1:] if n is not None]
    if not all(isinstance(n, fx.Node) and n in fixed and can_come(gather, n) for n in others):
        return False
    given = _gathered(node, change)
    whole = info_of(node if given is None else given)
    type_ = _type_of(node, change.axis)
    known = type_ == change.after if given is None else type_ == Shard(*_layout(given)) and given.kwargs == gather.kwargs
    return known and whole.nbytes * FEW <= info_of(tokens).nbytes


def _gathered(product: fx.Node, change: Change) -> fx.Node | None:
    """What gathers the columns of a product over the axis, if that is all that reads them."""
    (user,) = product.users if len(product.users) == 1 else (None,)
    if user is None or user.target not in (collectives.s_to_r, collectives.s_to_i):
        return None
    found = facts(user).conversion
    columns = _layout(user)[0] == len(info_of(product).shape) - 1
    return user if columns and found is not None and found.axis == change.axis else None


def _type_of(node: fx.Node, axis: str) -> Type | None:
    """The one type of all results of a node on an axis."""
    part = facts(node).part_of
    found = {one for name, _, types in (part.typed if part is not None else ()) if name == axis for one in types}
    return found.pop() if len(found) == 1 else None


def _combine(dispatch: fx.Node) -> fx.Node | None:
    """The call that takes the rows back, if it alone reads where they came from."""
    results = items(dispatch)
    if set(results) != {0, 1, 2} or len(results) != len(dispatch.users) or len(results[2].users) != 1:
        return None
    (combine,) = results[2].users
    return combine if op_name(combine.target) == "meshpar.combine" and combine.args[1] is results[2] else None


def _cuts_alike(cut: Shard, summed: fx.Node) -> bool:
    """Whether results are cut as the tokens are, which are rows, whatever the dims of the results are."""
    dim, repeat, segments = _layout(summed)
    shape = info_of(summed.args[0]).shape  # type: ignore[arg-type]
    return dim == len(shape) - 2 and prod(shape[:dim]) * repeat == cut.repeat and segments == cut.segments


def _own_rows(graph: fx.Graph, layer: _Layer) -> fx.Node:
    """A rank's own tokens, as rows."""
    own: fx.Node = layer.gather.args[0]  # type: ignore[assignment]
    if layer.tokens is layer.gather:
        return own
    change, whole = facts(layer.gather).conversion, info_of(layer.tokens)
    assert change is not None
    local = replace(whole, shape=(whole.shape[0] // change.size, whole.shape[1]))
    back = replace(change, before=change.after, after=layer.cut, whole=whole)
    with graph.inserting_before(layer.gather):
        made = graph.call_function(aten.reshape.default, (own, list(local.shape)))
    known = facts(layer.tokens).converted(back, local, at=facts(layer.tokens))
    return set_facts(made, replace(known, conversion=None, cut=tuple(sorted({*known.cut, change.axis}))))


def _choose_before(graph: fx.Graph, layer: _Layer, own: fx.Node, product: fx.Node) -> None:
    """Compute what experts are chosen by of a rank's own tokens, and gather that. A parameter that is cut is gathered: it is small."""
    change = facts(layer.gather).conversion
    assert change is not None
    given = _gathered(product, change)
    old = product if given is None else given
    known, info, where = facts(old), info_of(old), dict(layer.gather.kwargs)
    factors: list[Any] = []
    for other in product.args[1:]:
        if isinstance(other, fx.Node):
            bring(layer.gather, other)
            factors.append(other if given is None else _whole(graph, layer, other, Shard(*_layout(given)), change, known))
        else:
            factors.append(other)
    to: Any = collectives.s_to_r if given is None else given.target
    rows = replace(known.conversion or change, before=layer.cut, whole=info)
    local = replace(info, shape=(info.shape[0] // change.size, *info.shape[1:]))
    with graph.inserting_before(layer.gather):
        made = graph.call_function(product.target, (own, *factors))  # type: ignore[arg-type]
        of_own = known.part_of and known.part_of.converted(replace(rows, before=rows.after, after=rows.before))
        cut = tuple(sorted({*known.cut, change.axis}))
        set_facts(made, replace(known, info=local, part_of=of_own, cut=cut, conversion=None))
        whole = graph.call_function(to, (made, 0, layer.cut.repeat, layer.cut.segments), where)
        set_facts(whole, replace(known, conversion=rows))
    old.replace_all_uses_with(whole)
    for node in dict.fromkeys((old, product)):
        graph.erase_node(node)


def _whole(graph: fx.Graph, layer: _Layer, factor: fx.Node, columns: Shard, change: Change, at: Facts) -> fx.Node:
    """A parameter whose rows are cut as `columns` of its product are, whole on every rank; its gradient is a sum again, cut."""
    cut, info = replace(columns, dim=0), info_of(factor)
    rows = cut.repeat * sum(abs(units) * size for units, size in cut.segments)
    whole = replace(info, shape=(rows, *info.shape[1:]))
    with graph.inserting_before(layer.gather):
        made = graph.call_function(collectives.s_to_r, (factor, 0, cut.repeat, cut.segments), dict(layer.gather.kwargs))
    return set_facts(made, facts(factor).converted(replace(change, before=cut, whole=whole), whole, at=at))


def _join(graph: fx.Graph, layer: _Layer, own: fx.Node) -> None:
    inside = joined(layer.dispatch, layer.combine)
    done, given = steps(layer.dispatch, inside)
    _, index, count, *rest = layer.dispatch.args
    at = rest.pop(0) if layer.dispatch.target is load.dispatch else None
    dropping = bool(rest and rest[0]) or bool(layer.dispatch.kwargs.get("dropping"))
    results, known, last = items(layer.dispatch), facts(layer.summed), layer.summed
    viewed = () if layer.tokens is layer.gather else (layer.tokens,)
    gone = (layer.dispatch, *(results[k] for k in range(3)), *inside, layer.combine, *layer.shaped)
    change = facts(layer.gather).conversion
    assert change is not None
    first = replace(facts(layer.tokens), conversion=replace(change, before=layer.cut, whole=info_of(layer.tokens)))
    about = (first, *(facts(node) for node in gone), known)
    named = {"num_experts": count, "dropping": dropping, "repeat": layer.cut.repeat, "segments": layer.cut.segments, **layer.gather.kwargs}
    with graph.inserting_before(last):
        made = graph.call_function(token_pieces.on_gathered_tokens, (done, own, index, layer.combine.args[2], at, *given), named)
        if layer.shaped:
            set_facts(made, replace(_of_rows(layer), inside=about))
            shaped = graph.call_function(aten.reshape.default, (made, list(info_of(last).shape)))
            set_facts(shaped, replace(known, conversion=None))
        else:
            shaped = set_facts(made, replace(known, conversion=None, inside=about))
    last.replace_all_uses_with(shaped)
    for node in (last, *reversed(gone), *viewed, layer.gather):
        graph.erase_node(node)


def _of_rows(layer: _Layer) -> Any:
    """What is known of the summed results as rows."""
    change, whole = facts(layer.summed).conversion, info_of(layer.combine)
    assert change is not None
    local = replace(whole, shape=(whole.shape[0] // change.size, *whole.shape[1:]))
    found = facts(layer.combine).converted(replace(change, after=layer.cut, whole=whole), local, at=facts(layer.summed))
    return replace(found, conversion=None)
