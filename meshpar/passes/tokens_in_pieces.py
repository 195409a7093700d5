"""Experts whose matrices are cut, beside the gathering of tokens and the summing of their results: all of it becomes one call, in pieces.

before                                                     after
  x = s_to_r(x_s, 0, ...)                                    l_s = linear(x_s, router)
  l = linear(x, router)                                      l = s_to_r(l_s, 0, ...)
  w, index = topk(softmax(l))                                w, index = topk(softmax(l))
  r, e, p = dispatch(x, index, ...)
  y = grouped_mm(silu(grouped_mm(r, u, e)), v, e)
  z_s = p_to_s(combine(y, p, w), 0, ...)                     z_s = on_gathered_tokens(steps, x_s, index, w, ..., u, v)

What experts are chosen by is computed where a token is, and gathered: a few numbers for each, the same on all ranks to the last bit. Only
where nothing else reads the tokens, all that is made of them treats rows one by one, and all ranks have equally many. (Blocks that are
computed again in backward are left alone.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Change, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.ops import collectives, load, pieces, token_pieces
from meshpar.passes.again import ComputeAgain
from meshpar.passes.products import bring, can_come, constants
from meshpar.passes.rows_of_experts import between, items, joined, steps
from meshpar.sharding.types import Shard

aten = torch.ops.aten
FEW = 8
"""Of a token, this share of its bytes is few for what its experts are chosen by."""


@dataclass(frozen=True)
class _Layer:
    """The calls of one layer of experts."""

    gather: fx.Node
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

    `least_bytes`: of the tokens of all ranks; fewer are not worth their pieces.
    """

    least_bytes: int = 2**21

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        fixed = constants(graph)
        for node in list(graph.nodes):
            change = facts(node).conversion
            if node.target is not collectives.s_to_r or change is None or change.whole.nbytes < self.least_bytes:
                continue
            layer = _layer_of(node, change, fixed)
            if layer is not None and (inside := between(layer.dispatch, layer.combine)) is not None:
                ComputeAgain(within=frozenset(inside))(graph)
                for product in layer.choosing:
                    _choose_before(graph, layer.gather, product)
                _join(graph, layer)
        return graph


def _layer_of(gather: fx.Node, change: Change, fixed: frozenset[fx.Node]) -> _Layer | None:
    """The layer that tokens are gathered for, if it is one that can be computed in pieces."""
    dim, _, segments = _layout(gather)
    if dim != 0 or len(change.whole.shape) != 2 or not pieces.is_one_stretch(1, segments, change.size):
        return None
    dispatches = [user for user in gather.users if user.target in _DISPATCHES]
    choosing = tuple(user for user in gather.users if user not in dispatches)
    if len(dispatches) != 1 or dispatches[0].args[0] is not gather or not all(_chooses(gather, one, fixed) for one in choosing):
        return None
    dispatch = dispatches[0]
    combine = _combine(dispatch)
    if combine is None:
        return None
    shaped: tuple[fx.Node, ...] = ()
    (user,) = combine.users if len(combine.users) == 1 else (None,)
    if user is not None and op_name(user.target) in _VIEWS and len(user.users) == 1:
        shaped, (user,) = (user,), user.users
    if user is None or user.target is not collectives.p_to_s or user.kwargs != gather.kwargs or not _cuts_alike(gather, user):
        return None
    layer = _Layer(gather, choosing, dispatch, combine, shaped, user)
    own = (gather, *choosing, dispatch, combine, *shaped, user)
    return layer if len({facts(node).region for node in own}) == 1 else None


_DISPATCHES = (torch.ops.meshpar.dispatch.default, load.dispatch)
_VIEWS = ("view", "reshape", "_unsafe_view")


def _layout(conversion: fx.Node) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    return conversion.args[1:]  # type: ignore[return-value]


def _chooses(gather: fx.Node, node: fx.Node, fixed: frozenset[fx.Node]) -> bool:
    """Whether a reader of the tokens is a product with a parameter that gives few numbers for each, which are pending on their axis."""
    change, part = facts(gather).conversion, facts(node).part_of
    if op_name(node.target) != "linear" or node.args[0] is not gather or change is None or part is None:
        return False
    others = [n for n in node.args[1:] if n is not None]
    if not all(isinstance(n, fx.Node) and n in fixed and can_come(gather, n) for n in others):
        return False
    axes = {axis: types for axis, _, types in part.typed}
    return info_of(node).nbytes * FEW <= info_of(gather).nbytes and set(axes.get(change.axis, ())) == {change.after}


def _combine(dispatch: fx.Node) -> fx.Node | None:
    """The call that takes the rows back, if it alone reads where they came from."""
    results = items(dispatch)
    if set(results) != {0, 1, 2} or len(results) != len(dispatch.users) or len(results[2].users) != 1:
        return None
    (combine,) = results[2].users
    return combine if op_name(combine.target) == "meshpar.combine" and combine.args[1] is results[2] else None


def _cuts_alike(gather: fx.Node, summed: fx.Node) -> bool:
    """Whether results are cut as the tokens were, which are rows, whatever the dims of the results are."""
    (_, repeat, segments), (dim, again, others) = _layout(gather), _layout(summed)
    shape = info_of(summed.args[0]).shape  # type: ignore[arg-type]
    return dim == len(shape) - 2 and prod(shape[:dim]) * again == repeat and segments == others


def _choose_before(graph: fx.Graph, gather: fx.Node, product: fx.Node) -> None:
    """Compute what experts are chosen by of a rank's own tokens, and gather that."""
    change, known = facts(gather).conversion, facts(product)
    assert change is not None
    info = info_of(product)
    local = replace(info, shape=(info.shape[0] // change.size, *info.shape[1:]))
    own = Change(change.axis, change.size, change.before, change.after, info)
    for other in product.args[1:]:
        if isinstance(other, fx.Node):
            bring(gather, other)
    with graph.inserting_before(gather):
        made = graph.call_function(product.target, (gather.args[0], *product.args[1:]), dict(product.kwargs))  # type: ignore[arg-type]
        of_own = known.part_of and known.part_of.converted(replace(own, before=change.after, after=change.before))
        set_facts(made, replace(known, info=local, part_of=of_own, cut=tuple(sorted({*known.cut, change.axis}))))
        whole = graph.call_function(collectives.s_to_r, (made, *gather.args[1:]), dict(gather.kwargs))
        set_facts(whole, replace(known, conversion=own))
    product.replace_all_uses_with(whole)
    graph.erase_node(product)


def _join(graph: fx.Graph, layer: _Layer) -> None:
    inside = joined(layer.dispatch, layer.combine)
    done, given = steps(layer.dispatch, inside)
    _, index, count, *rest = layer.dispatch.args
    at = rest.pop(0) if layer.dispatch.target is load.dispatch else None
    dropping = bool(rest and rest[0]) or bool(layer.dispatch.kwargs.get("dropping"))
    results, (_, repeat, segments) = items(layer.dispatch), _layout(layer.gather)
    gone = (layer.gather, layer.dispatch, *(results[k] for k in range(3)), *inside, layer.combine, *layer.shaped)
    known, last = facts(layer.summed), layer.summed
    about = (*(facts(node) for node in gone), known)
    args = (done, layer.gather.args[0], index, layer.combine.args[2], at, *given)
    named = {"num_experts": count, "dropping": dropping, "repeat": repeat, "segments": segments, **layer.gather.kwargs}
    with graph.inserting_before(last):
        made = graph.call_function(token_pieces.on_gathered_tokens, args, named)
        if layer.shaped:
            set_facts(made, replace(_of_rows(layer), inside=about))
            shaped = graph.call_function(aten.reshape.default, (made, list(info_of(last).shape)))
            set_facts(shaped, replace(known, conversion=None))
        else:
            shaped = set_facts(made, replace(known, conversion=None, inside=about))
    last.replace_all_uses_with(shaped)
    for node in (last, *reversed(gone)):
        graph.erase_node(node)


def _of_rows(layer: _Layer) -> Any:
    """What is known of the summed results as rows."""
    change, whole = facts(layer.summed).conversion, info_of(layer.combine)
    cut = Shard(*_layout(layer.gather))
    assert change is not None
    local = replace(whole, shape=(whole.shape[0] // change.size, *whole.shape[1:]))
    found = facts(layer.combine).converted(replace(change, after=cut, whole=whole), local, at=facts(layer.summed))
    return replace(found, conversion=None)
