"""Calls that do several things at once, taken apart: a proof reads products and conversions one by one.

qk = gathered(x, (wq, wk), (None, None), 1, ...)       x_r = s_to_r(x, 1, ...)
q  = qk[0]                                     ->      q   = linear(x_r, wq)
k  = qk[1]                                             k   = linear(x_r, wk)

y  = scattered(a, w, 1, ..., later, 0)         ->      p   = products.linear(a, w, None, later, 0)
                                                       y   = p_to_s(p, 1, ...)
    z  = reduced(a, w, ...)                                p   = linear(a, w)
                                                           z   = p_to_i(p, ...)

    y  = through_experts(steps, x, ends, w, ...)           r, e, *route = send_rows(x, ends, ...)
                                                           y   = return_rows(grouped_mm(r, w, e), *route, ...)

    z  = on_gathered_tokens(steps, x, index, w, ...)       r, e, p = dispatch(s_to_r(x, 0, ...), index, ...)
                                                           z   = p_to_s(combine(grouped_mm(r, u, e), p, w), 0, ...)

    l  = chunked_loss.cross_entropy(x, w, None, t, ...)    y   = linear(x, w)
                                                           l   = cross_entropy(y, t, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Change, Facts, Info, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.ops import (
    again,
    chunked_loss,
    collectives,
    expert_all_to_all,
    expert_pieces,
    expert_steps,
    load,
    products,
    token_pieces,
    vocab_parallel,
)
from meshpar.sharding.types import Shard

_PIECES = "meshpar.ops.pieces."
_RESHAPE, _RESHAPED = "reshape", "aten.reshape.default"
_CHUNKED, _AGAIN = op_name(chunked_loss.cross_entropy), op_name(again.computed)
_EXPERTS, _TOKENS = op_name(expert_pieces.through_experts), op_name(token_pieces.on_gathered_tokens)


def expanded(graph: fx.Graph) -> fx.Graph:
    """The graph, or one that does the same in more calls; what is known of a value stays with it."""
    if not any(
        op_name(node.target).startswith((_PIECES, _CHUNKED, _AGAIN, _EXPERTS, _TOKENS))
        for node in graph.nodes
        if node.op == "call_function"
    ):
        return graph
    new, made, rows = fx.Graph(), dict[fx.Node, Any](), set[fx.Node]()  # rows: products of rows, which calls in pieces give as they are not
    for node in graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else ""
        if name == _PIECES + "gathered":
            made[node] = _gathered(new, node, made)
            rows.update(item for item in made[node] if op_name(item.args[0].target) == _RESHAPE)
        elif name in (_PIECES + "scattered", _PIECES + "reduced"):
            made[node] = _summed(new, node, made, scattered=name.endswith("scattered"))
        elif name == _AGAIN:
            steps, *given = fx.map_arg(node.args, made.__getitem__)
            made[node] = _one_by_one(new, steps, given, (*facts(node).inside, facts(node)), rows)
        elif name == _EXPERTS:
            made[node] = _there_and_back(new, node, made)
        elif name == _TOKENS:
            made[node] = _gathered_and_summed(new, node, made)
            rows.add(made[node])
        elif name == _CHUNKED:
            made[node] = _at_once(new, node, made)
        elif node.target is operator.getitem and isinstance(made[node.args[0]], list):
            item = made[node] = made[node.args[0]][node.args[1]]
            if facts(item).conversion is None:
                set_facts(item, facts(node))
        elif name == _RESHAPE and made[node.args[0]] in rows:
            read = made[node.args[0]]
            made[node] = set_facts(read, replace(facts(node), conversion=facts(read).conversion))
        else:
            made[node] = new.node_copy(node, made.__getitem__)
    return new


def _gathered(new: fx.Graph, node: fx.Node, made: dict[fx.Node, Any]) -> list[fx.Node]:
    given: Any = fx.map_arg(node.args, made.__getitem__)
    x, weights, biases, dim, repeat, segments, *left = given
    change = facts(node).conversion
    assert change is not None
    where, info = {name: value for name, value in node.kwargs.items() if name not in ("whole", "at_once")}, info_of(x)
    shape = tuple(change.before.length if d == dim else n for d, n in enumerate(info.shape))  # type: ignore[union-attr]
    if left:
        whole = new.call_function(products.convert, (x, *left, "s_to_r", dim, repeat, segments), where)
    else:
        whole = new.call_function(collectives.s_to_r, (x, dim, repeat, segments), where)
    set_facts(whole, replace(facts(node), info=replace(info, shape=shape)))
    read = [_viewed(new, whole, about) for about in facts(node).inside]
    return [*(_linear(new, r, w, b) for r, w, b in zip(read, weights, biases, strict=True)), whole]


def _viewed(new: fx.Graph, whole: fx.Node, about: Facts) -> fx.Node:
    """What a product read of what was gathered: itself, or its rows."""
    assert isinstance(about.info, Info)
    if about.info.shape == info_of(whole).shape:
        return whole
    return set_facts(new.call_function(torch.ops.aten.reshape.default, (whole, list(about.info.shape))), about)


def _linear(new: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    return new.call_function(torch.ops.aten.linear.default, (x, weight) if bias is None else (x, weight, bias))


def _summed(new: fx.Graph, node: fx.Node, made: dict[fx.Node, Any], *, scattered: bool) -> fx.Node:
    given: Any = fx.map_arg(node.args, made.__getitem__)
    known = facts(node)
    assert known.conversion is not None
    a, weight, *rest = given
    layout, left = (rest[:3], rest[3:]) if scattered else ([], rest)
    later, helped = left[:2], left[2:]
    leaves = later and later[0] is not None
    pending = new.call_function(products.linear, (a, weight, None, *later)) if leaves else _linear(new, a, weight, None)
    set_facts(pending, _before(known, known.conversion))
    to: Any = collectives.p_to_s if scattered else collectives.p_to_i
    args = (pending, *layout)
    if helped:
        to, args = products.convert, (pending, *helped, to.__name__, *layout)
    return set_facts(new.call_function(to, args, dict(node.kwargs)), known)


def _at_once(new: fx.Graph, node: fx.Node, made: dict[fx.Node, Any]) -> fx.Node:
    given: Any = fx.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
    (x, weight, bias, target, weights, _, _, segments), named = given
    steps, repeat, known = named["steps"], named["repeat"], facts(node).inside
    logits = set_facts(_linear(new, x, weight, bias), known[0])
    for step, about in zip(steps, known[1:], strict=True):
        logits = set_facts(_step(new, step, [logits]), about)
    if "group" in named:
        rest = {name: value for name, value in named.items() if name not in ("steps", "repeat")}
        found = new.call_function(vocab_parallel.cross_entropy, (logits, target, weights, 1, repeat, segments), rest)
    else:
        reduction = {"none": 0, "sum": 2}[named["reduction"]]
        args = (logits, target, weights, reduction, named["ignore_index"], named["label_smoothing"])
        found = new.call_function(torch.ops.aten.cross_entropy_loss.default, args)
    return set_facts(found, facts(node))


def _one_by_one(new: fx.Graph, steps: Any, given: Sequence[fx.Node], known: Sequence[Facts], rows: Collection[fx.Node] = ()) -> fx.Node:
    """The last of several calls. `rows`: products of rows, which are as a step makes them again."""
    values = list(given)
    for step, about in zip(steps, known, strict=True):
        name, args, _ = step
        if name == _RESHAPED and (read := again.values(args[0], values)) in rows:
            values.append(set_facts(read, about))
            continue
        if name == _AGAIN:
            values.append(_one_by_one(new, args[0], again.values(args[1:], values), (*about.inside, about)))
        else:
            values.append(set_facts(_step(new, step, values), about))
    return values[-1]


def _there_and_back(new: fx.Graph, node: fx.Node, made: dict[fx.Node, Any]) -> fx.Node:
    arguments: Any = fx.map_arg(node.args, made.__getitem__)
    steps, x, ends, *given = arguments
    there, *items = facts(node).inside[:6]
    sent = set_facts(new.call_function(expert_all_to_all.send_rows, (x, ends), dict(node.kwargs)), there)
    rows, here, *route = (set_facts(new.call_function(operator.getitem, (sent, k)), about) for k, about in enumerate(items))
    result = _one_by_one(new, steps, [rows, here, *given], facts(node).inside[6:])
    return set_facts(new.call_function(expert_all_to_all.return_rows, (result, *route), dict(node.kwargs)), facts(node))


def _gathered_and_summed(new: fx.Graph, node: fx.Node, made: dict[fx.Node, Any]) -> fx.Node:
    given: Any = fx.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
    (steps, x, index, weights, at, *operands), named = given
    known, count = facts(node).inside, len(steps)
    where, layout = {name: named[name] for name in ("group", "size", "rank")}, (0, named["repeat"], named["segments"])
    whole = set_facts(new.call_function(collectives.s_to_r, (x, *layout), where), known[0])
    target: Any = torch.ops.meshpar.dispatch.default if at is None else load.dispatch
    more = () if at is None else (at,)
    sorted_ = set_facts(new.call_function(target, (whole, index, named["num_experts"], *more, named["dropping"])), known[1])
    rows, ends, perm = (set_facts(new.call_function(operator.getitem, (sorted_, k)), known[2 + k]) for k in range(3))
    made_of = _one_by_one(new, steps, [rows, ends, *operands], known[5 : 5 + count])
    combine, *shaped, summed = known[5 + count :]
    found = set_facts(new.call_function(torch.ops.meshpar.combine.default, (made_of, perm, weights)), combine)
    for about in shaped:
        found = set_facts(new.call_function(torch.ops.aten.reshape.default, (found, list(about.info.shape))), about)  # type: ignore[union-attr]
    change = summed.conversion
    assert change is not None and isinstance(change.after, Shard)
    after = change.after
    return set_facts(new.call_function(collectives.p_to_s, (found, after.dim, after.repeat, after.segments), where), summed)


def _step(new: fx.Graph, step: again.CheapStep, values: Sequence[fx.Node]) -> fx.Node:
    name, args, kwargs = step
    if name == expert_steps.ITEM:
        return new.call_function(operator.getitem, tuple(again.values(args, values)))
    return new.call_function(again.operator(name), tuple(again.values(args, values)), dict(again.values(kwargs, values)))


def _before(known: Facts, change: Change) -> Facts:
    """Of the value before it was converted."""
    turned = replace(change, before=change.after, after=change.before)
    info: Any = known.info
    cut = change.after.dim if isinstance(change.after, Shard) else None
    shape = tuple(n * change.size if d == cut else n for d, n in enumerate(info.shape))
    return replace(known, info=replace(info, shape=shape), part_of=known.part_of and known.part_of.converted(turned), conversion=None)


def separated(graph: fx.Graph) -> fx.Graph:
    """The same, and every product computes the gradient of its own weight: as if nothing ran beside anything."""
    graph = expanded(graph)
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.target is products.beside:
            continue
        apart = _APART.get(node.target)
        if apart is None:
            made[node] = new.node_copy(node, made.__getitem__)
            continue
        target, args = apart(node)
        args, kwargs = fx.map_arg((args, dict(node.kwargs)), made.__getitem__)
        made[node] = set_facts(new.call_function(target, args, kwargs), facts(node))
    return new


def _matmul(args: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    x, weight, added = args[:3]
    return (torch.ops.aten.matmul.default, (x, weight)) if added is None else (torch.ops.aten.addmm.default, (added, x, weight))


_APART: Mapping[Any, Callable[[fx.Node], tuple[Any, tuple[Any, ...]]]] = {
    products.i_to_r: lambda node: (collectives.i_to_r, node.args[:1]),
    products.convert: lambda node: (getattr(collectives, str(node.args[3])), (node.args[0], *node.args[4:])),
    products.send_rows: lambda node: (expert_all_to_all.send_rows, node.args[:2]),
    products.linear: lambda node: (torch.ops.aten.linear.default, node.args[: 3 if node.args[2] is not None else 2]),
    products.matmul: lambda node: _matmul(node.args),
    products.grouped_mm: lambda node: (torch.ops.meshpar.grouped_mm.default, node.args[:3]),
}
"""Calls that leave or compute weight gradients -> the same calls that do not."""
