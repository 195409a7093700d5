"""Attention that a model writes out becomes attention: what an axis that cuts the sequence has forms for.

    before                                                after
      z = matmul(q, transpose(k, -2, -1))                   y = sdpa(q, k, v, None, 0.0, True, scale=0.125)
      z = add(mul(z, 0.125), where(causal, 0, -3e38))
      y = matmul(softmax(z, -1), v)

Between the products may be whatever works on single scores: factors, tanh, masks, biases of any shape, trained ones too; and a sink, one
score more whose weight is left out of the product. It is matched on the graph, where each value on the way has one reader. Then both are
run on drawn values, and must agree in results and gradients. What is not such is left as it is, and its softmax is told why (`explain()`
says it).

A mask of numbers alone that is causal or a window goes without a table. Where there is nothing else it is torch's own operator; anything
else is `ops/scored.py`, with the steps of the model in their order. (Torch's kernels give other gradients where a mask of -1e38 hides all.)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from meshpar._torch import OpOverload, without_modes
from meshpar.graph.facts import Info, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.graph.operators import operator_of
from meshpar.ops.halo import windowed_attention
from meshpar.ops.scored import scored_attention
from meshpar.ops.tiles import ScoreStep
from meshpar.passes.attention import ungrouped
from meshpar.passes.erase import erase_unused
from meshpar.passes.intervals import Intervals, least, shown, unseen

aten = torch.ops.aten
NEVER = -1e9
"""Added to a score, or instead of it: its weight is 0 beside any other that a softmax of a model meets."""
_PRODUCTS = ("matmul", "bmm", "baddbmm")


def recognise_attention(graph: fx.Graph) -> None:
    """Replace attention that is written out, in place."""
    tried: dict[Any, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not operator_of(node.target).weighs or op_name(node.target) not in ("softmax", "_softmax"):
            continue
        try:
            found = _matched(node)
            kind = _kind(found)
            if kind not in tried:
                tried[kind] = _difference(found)
            if tried[kind]:
                raise _No(tried[kind])
        except _No as reason:
            set_facts(node, replace(facts(node), unrecognised=str(reason) or None))
            continue
        with graph.inserting_before(found.result):
            _replace(found)


class _No(Exception):
    """Why something is not attention, for the user; nothing where it does not look like any."""


_Written = tuple[str, fx.Node | None, Any]
"""A step as the model writes it: kind, operand, and a number or a node of one element."""


@dataclass(frozen=True, eq=False)
class _Match:
    """Attention that is written out."""

    softmax: fx.Node
    query: fx.Node
    key: fx.Node
    """Transposed."""
    value: fx.Node
    result: fx.Node
    scale: float
    steps: tuple[_Written, ...]
    shape: tuple[int, int, int, int]
    """Samples, heads, queries, keys."""
    nodes: tuple[fx.Node, ...]
    """All that goes, in order."""

    @property
    def factors(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        return self.query, self.key, self.value

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """Of the steps, each once."""
        return tuple(dict.fromkeys(x for _, *rest in self.steps for x in rest if isinstance(x, fx.Node)))


# ---- matched on the graph --------------------------------------------------------------------------------------------------------------


def _matched(softmax: fx.Node) -> _Match:
    """What is around a softmax. Raises _No where that is not attention."""
    if len(info_of(softmax).shape) < 3 or softmax.args[1] not in (-1, len(info_of(softmax).shape) - 1):
        raise _No
    ahead, last, sink = _sunk(softmax.args[0])
    back, product, steps = _scores(last)
    on, result = _weights(softmax, sink)
    scale, (query, key) = 1.0, product.args[-2:]
    if op_name(product.target) == "baddbmm":
        if product.kwargs.get("beta", 1) != 1:
            raise _No("what is added to its products has a factor")
        scale, steps = float(product.kwargs.get("alpha", 1)), [("plus", product.args[0], None), *steps]  # type: ignore[arg-type, list-item]
    while steps and steps[0][0] == "times":
        scale, steps = scale * steps[0][2], steps[1:]
    shape = _shape((product, *back, *(on if sink is not None else (softmax, *on))))
    steps += [("sink", sink, None)] if sink is not None else []
    nodes = (product, *back, *ahead, softmax, *on, result)
    found = _Match(softmax, query, key, result.args[1], result, scale, tuple(steps), shape, nodes)  # type: ignore[arg-type]
    _check(found)
    return found


def _sunk(node: Any) -> tuple[list[fx.Node], Any, fx.Node | None]:
    """Where one score more is joined to those of the keys: the nodes that do so, the scores of the keys, and the one.

    The largest score may be taken off all of them, which changes no weight.
    """
    joined, nodes = node, list[fx.Node]()
    if _is(node, "sub") and (largest := _largest(node)) is not None:
        joined, nodes = node.args[0], [*largest, node]
    if not _is(joined, "cat") or len(joined.args[0]) != 2 or not _is_last(joined, joined.args[1:2]) or len(joined.users) != 1 + bool(nodes):
        return [], node, None
    scores, sink = joined.args[0]
    if info_of(sink).shape != (*info_of(scores).shape[:-1], 1):
        return [], node, None
    return [joined, *nodes], scores, sink


def _largest(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that make the second argument of a difference, if that is the largest of the first along the last dim."""
    first, second = node.args[:2]
    nodes = [second]
    if isinstance(second, fx.Node) and second.target is operator.getitem and second.args[1] == 0:
        nodes = [second.args[0], second]
    found = nodes[0]
    if not (_is(found, "amax") or _is(found, "max")) or found.args[0] is not first or found.args[2:3] != (True,):  # type: ignore[union-attr]
        return None
    return nodes if _is_last(first, found.args[1:2]) and all(len(x.users) == 1 for x in nodes) else None  # type: ignore[arg-type, union-attr, return-value]


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) == name


def _is_last(node: fx.Node, dim: tuple[Any, ...]) -> bool:
    """Whether an argument says the last dim of a value."""
    return len(dim) == 1 and (dim[0][0] if isinstance(dim[0], list | tuple) else dim[0]) in (-1, len(info_of(node).shape) - 1)


def _scores(node: Any) -> tuple[list[fx.Node], fx.Node, list[_Written]]:
    """The nodes between the products and the last of the scores, the product, and the steps."""
    like = node
    nodes: list[fx.Node] = []
    steps: list[_Written] = []
    while True:
        if not isinstance(node, fx.Node) or node.op != "call_function" or not isinstance(facts(node).info, Info):
            raise _No
        if not _is_product_of(node, like):
            raise _No
        if len(node.users) != 1:
            raise _No("its scores are read elsewhere too")
        if op_name(node.target) in _PRODUCTS:
            return nodes[::-1], node, steps[::-1]
        nodes.append(node)
        step, node = _step(node, like)
        steps += [step] if step is not None else []


def _step(node: fx.Node, like: fx.Node) -> tuple[_Written | None, Any]:
    """What a node does to scores, and the scores that it does it to."""
    name, args = op_name(node.target), node.args
    if not _is_plain(node):
        raise _No(f"its scores go through {name}, with a backward of its own")
    if name in ("_to_copy", "reshape") and info_of(node).dtype.is_floating_point:
        return None, args[0]
    if name == "tanh":
        return ("tanh", None, None), args[0]
    if name in ("mul", "div") and isinstance(args[1], int | float):
        return ("times", None, float(args[1]) if name == "mul" else 1 / float(args[1])), args[0]
    if name in ("add", "mul") and node.kwargs.get("alpha", 1) == 1 and all(isinstance(a, fx.Node) for a in args[:2]):
        at = 0 if _is_product_of(args[0], like) else 1
        return ("plus" if name == "add" else "by", args[1 - at], None), args[at]  # type: ignore[return-value]
    if name == "where" and len(args) == 3:
        at = 1 if _is_product_of(args[1], like) else 2
        return ("keep" if at == 1 else "fill", args[0], args[3 - at]), args[at]  # type: ignore[return-value]
    if name == "masked_fill":
        return ("fill", args[1], args[2]), args[0]  # type: ignore[return-value]
    raise _No(f"its scores go through {name}")


def _is_product_of(node: Any, like: fx.Node) -> bool:
    """Whether a value comes from a product, and has as many elements on the way as the scores."""
    todo, seen, count = [node], set[fx.Node](), prod(info_of(like).shape)
    while todo:
        one = todo.pop()
        if not isinstance(one, fx.Node) or one in seen or one.op != "call_function" or not isinstance(facts(one).info, Info):
            continue
        seen.add(one)
        if prod(info_of(one).shape) == count:
            if op_name(one.target) in _PRODUCTS:
                return True
            todo += one.all_input_nodes
    return False


def _weights(softmax: fx.Node, sink: fx.Node | None) -> tuple[list[fx.Node], fx.Node]:
    """The nodes between the softmax and the product with the values, and that product. With a `sink`, its weight is left out first."""
    node, nodes = softmax, list[fx.Node]()
    if sink is not None:
        node, wanted = next(iter(softmax.users)), (*info_of(softmax).shape[:-1], info_of(softmax).shape[-1] - 1)
        first = _is(node, "slice") and _is_last(softmax, node.args[1:2]) and node.args[2] == 0
        if len(softmax.users) != 1 or not first or info_of(node).shape != wanted:
            raise _No("the weight of one score more than there are keys is read too")
        nodes.append(node)
    while True:
        if len(node.users) != 1:
            raise _No("its weights are read elsewhere too")
        reader = next(iter(node.users))
        name = op_name(reader.target) if reader.op == "call_function" else "what leaves the model"
        if name in ("matmul", "bmm") and reader.args[0] is node:
            return nodes, reader
        if name not in ("_to_copy", "reshape") or not _is_plain(reader):
            raise _No("it drops weights at random" if "dropout" in name else f"its weights go through {name}")
        nodes.append(reader)
        node = reader


def _is_plain(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten" and facts(node).nature is None


def _shape(nodes: tuple[fx.Node, ...]) -> tuple[int, int, int, int]:
    """Samples, heads, queries and keys of the scores, which may be joined into three dims on the way."""
    shapes = dict.fromkeys(info_of(node).shape for node in nodes)
    four = [shape for shape in shapes if len(shape) == 4]
    if len(four) != 1 or any(shape not in (four[0], (four[0][0] * four[0][1], *four[0][2:])) for shape in shapes):
        raise _No("its scores are not of samples, heads, queries and keys")
    b, h, s, t = four[0]
    return b, h, s, t


def _check(found: _Match) -> None:
    """Raises _No where factors or operands are not of the dims of the scores."""
    b, h, s, t = found.shape
    if not all(isinstance(x, fx.Node) for x in found.factors) or len({info_of(x).dtype for x in found.factors}) != 1:
        raise _No("its queries, keys and values are not of one dtype")
    query, key, value = (_four(found, x) for x in found.factors)
    if None in (query, key, value) or query[:3] != (b, h, s) or key[3] != t or value[2] != t or key[:2] != value[:2]:  # type: ignore[index]
        raise _No("its queries, keys and values are not of the same samples, heads and positions")
    if key[0] != b or key[1] not in (1, h):  # type: ignore[index]
        raise _No("its keys and values are not of its samples and heads")
    for kind, operand, other in found.steps:
        shape = _four(found, operand) if operand is not None else (1,) * 4
        if shape is None or any(n not in (1, whole) for n, whole in zip(shape, found.shape, strict=True)):
            raise _No("what is added to its scores is not of their dims")
        if operand is not None and (info_of(operand).dtype == torch.bool) != (kind in ("keep", "fill")):
            raise _No("a mask is not of booleans, or what is added is")
        if isinstance(other, fx.Node) and (prod(info_of(other).shape) != 1 or info_of(other).requires_grad):
            raise _No("other numbers stand instead of scores")


def _four(found: _Match, node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a value with samples and heads apart."""
    (b, h, *_), shape = found.shape, info_of(node).shape
    if len(shape) == 3 and shape[0] == b * h:
        return (b, h, *shape[1:])
    return (*(1,) * (4 - len(shape)), *shape) if len(shape) <= 4 else None


# ---- both on drawn values --------------------------------------------------------------------------------------------------------------


def _kind(found: _Match) -> Any:
    """Equal for matches of which one trial is enough."""
    places = {node: i for i, node in enumerate((*found.factors, *found.operands, *found.nodes))}
    calls = tuple((op_name(n.target), str(fx.map_arg((n.args, n.kwargs), lambda x: f"%{places[x]}"))) for n in found.nodes)
    return calls, tuple(facts(n).info for n in places)


def _difference(found: _Match) -> str:
    """What differs between what the model writes and the steps that were read, on a few samples and positions; "" for nothing."""
    with without_modes(), torch.enable_grad():
        values = _drawn(found)
        right, got = _as_written(found, values), _as_read(found, values)
        grad = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        learnt = [x for x in values.values() if x.requires_grad]
        pairs = [(right, got)]
        if right.requires_grad:
            pairs += zip(*(torch.autograd.grad(y, learnt, grad.to(y.dtype), materialize_grads=True) for y in (right, got)), strict=True)
    alike = all(bool(((a - b).abs() <= 1e-4 * (1 + a.abs().max())).all()) for a, b in pairs)
    return "" if alike else "attention gives something else for drawn values"


def _small(found: _Match) -> tuple[int, int, int, int]:
    """Samples, heads, queries and keys of a trial."""
    b, h, s, t = found.shape
    return min(b, 2), h, min(s, 6), min(t, 6) if s == t else min(t, 5)


def _drawn(found: _Match) -> dict[fx.Node, Tensor]:
    """Factors and operands. Masks show more than they hide, and one key always: of a query that sees none the model gives no number."""
    generator, (b, _, s, t) = torch.Generator().manual_seed(0), _small(found)
    filling = {operand for kind, operand, _ in found.steps if kind == "fill"}
    values: dict[fx.Node, Tensor] = {}
    for node in (*found.factors, *found.operands):
        info, shape = info_of(node), _four(found, node)
        assert shape is not None
        ends = {found.query: (s, shape[3]), found.key: (shape[2], t), found.value: (t, shape[3])}.get(node)
        rows, columns = ends or (min(shape[2], s), min(shape[3], t))
        small = (min(shape[0], b), shape[1], rows, columns)
        if info.dtype == torch.bool:
            shows = torch.rand(small, generator=generator) < 0.7
            shows[..., :1] |= columns > 1
            drawn = ~shows if node in filling else shows
        else:
            drawn = torch.randn(small, dtype=torch.float64, generator=generator)
        joined = len(info.shape) == 3 and info.shape[0] == found.shape[0] * found.shape[1]
        drawn = drawn.flatten(0, 1) if joined else drawn.reshape(small[4 - len(info.shape) :])
        values[node] = drawn.requires_grad_(info.requires_grad or node in found.factors)
    return values


def _as_written(found: _Match, values: dict[fx.Node, Tensor]) -> Tensor:
    (b, h, s, t), known = _small(found), dict(values)
    for node in found.nodes:
        args: Any
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        if node.target is aten.reshape.default:
            known[node] = args[0].reshape((b, h, s, t) if len(info_of(node).shape) == 4 else (b * h, s, t))
        elif node.target is aten._to_copy.default:
            known[node] = args[0]
        elif node.target is aten.softmax.int:
            known[node] = args[0].softmax(-1)
        elif node.target is aten.slice.Tensor:
            known[node] = args[0][..., :-1]
        else:
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[found.result]


def _as_read(found: _Match, values: dict[fx.Node, Tensor]) -> Tensor:
    b, h, *_ = _small(found)

    def four(node: fx.Node) -> Tensor:
        x = values[node]
        joined = x.dim() == 3 and info_of(node).shape[0] == found.shape[0] * found.shape[1]
        return x.unflatten(0, (b, h)) if joined else x[(None,) * (4 - x.dim())]

    query, key, value = (four(node) for node in found.factors)
    added = [four(node) for node in found.operands]
    result = scored_attention(query, key.transpose(-1, -2), value, added, steps=_told(found.steps, found.operands), scale=found.scale)
    return result if len(info_of(found.result).shape) == 4 else result.flatten(0, 1)


# ---- attention in its place ------------------------------------------------------------------------------------------------------------


def _replace(found: _Match) -> None:
    """Put attention in the place of what is written out."""
    query, key, value = (_apart(found, node) for node in found.factors)
    key = _transposed(key)
    short = ungrouped(key), ungrouped(value)
    if short[0] is not None and short[1] is not None and info_of(short[0]).shape[1] == info_of(short[1]).shape[1]:
        key, value = short  # type: ignore[assignment]
    causal, window, steps = _without_tables(found)
    operands = list(dict.fromkeys(x for _, *rest in steps for x in rest if isinstance(x, fx.Node)))
    apart = [_apart(found, node) for node in operands]
    graph = found.softmax.graph
    how: dict[str, Any] = {"scale": found.scale, "enable_gqa": info_of(key).shape[1] != info_of(query).shape[1]}
    if not steps and window is not None:
        new = graph.call_function(windowed_attention, (query, key, value), {"window": window, **how})
    elif not steps:
        new = graph.call_function(aten.scaled_dot_product_attention.default, (query, key, value, None, 0.0, causal), how)
    else:
        told = _told(steps, operands)
        new = graph.call_function(
            scored_attention, (query, key, value, apart), {"steps": told, "is_causal": causal, "window": window, **how}
        )
    info = info_of(found.result)
    shape = (*found.shape[:3], info.shape[-1])
    set_facts(new, replace(facts(found.result), info=replace(info, shape=shape)))
    instead = new if info.shape == shape else _emit(new, aten.reshape.default, list(info.shape), shape=info.shape)
    found.result.replace_all_uses_with(instead)
    erase_unused(found.result)


def _told(steps: Sequence[_Written], operands: Sequence[fx.Node]) -> tuple[ScoreStep, ...]:
    """The steps by the places of their operands."""
    places = {node: i for i, node in enumerate(operands)}
    return tuple((kind, *(places[x] if isinstance(x, fx.Node) else x for x in rest if x is not None)) for kind, *rest in steps)


def _apart(found: _Match, node: fx.Node) -> fx.Node:
    """A value of samples, heads and two more dims, where they are joined."""
    shape, wide = info_of(node).shape, _four(found, node)
    if len(shape) != 3 or wide is None or wide[:2] != found.shape[:2] or shape[0] != wide[0] * wide[1]:
        return node
    before = node.args[0] if node.target is aten.reshape.default else None
    return (
        before
        if isinstance(before, fx.Node) and info_of(before).shape == wide
        else _emit(node, aten.reshape.default, list(wide), shape=wide)
    )


def _transposed(node: fx.Node) -> fx.Node:
    if node.target is aten.transpose.int and {int(d) % 4 for d in node.args[1:3]} == {2, 3}:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    *lead, rows, columns = info_of(node).shape
    return _emit(node, aten.transpose.int, 2, 3, shape=(*lead, columns, rows))


def _emit(node: fx.Node, target: Any, *rest: Any, shape: tuple[int, ...]) -> fx.Node:
    new = node.graph.call_function(target, (node, *rest))
    return set_facts(new, facts(node).beside(replace(info_of(node), shape=shape)))


def _without_tables(found: _Match) -> tuple[bool, int | None, list[_Written]]:
    """Masks that are causal or a window become words: whether it is causal, the window, and the steps that are left.

    Each query sees a key then, beside which what is hidden has no weight. Not so where another step may hide all that a query sees: what
    this mask hides may then be no lower.
    """
    causal, window, left = False, None, list[_Written]()
    for at, step in enumerate(found.steps):
        interval = _interval(step) if all(kind in ("plus", "sink") for kind, *_ in found.steps[at + 1 :]) else None
        if interval is None or (len(interval.stop), interval.keys) != found.shape[2:] or interval.window is None:
            left.append(step)
            continue
        causal = True
        if not interval.is_causal:
            window = interval.window if window is None else min(window, interval.window)
    return (False, None, list(found.steps)) if any(_may_hide(step) for step in left) else (causal, window, left)


def _may_hide(step: _Written) -> bool:
    """Whether a step may leave keys without weight. (What is trained is as large as scores are.)"""
    kind, operand, _ = step
    if kind == "plus" and operand is not None:
        return not info_of(operand).requires_grad and ((number := least(operand)) is None or number < NEVER / 2)
    return kind in ("keep", "fill")


def _interval(step: _Written) -> Intervals | None:
    match step:
        case ("plus", fx.Node() as operand, _):
            return shown(operand, NEVER)
        case ("keep", fx.Node() as operand, float(x)) if x <= NEVER:
            return shown(operand, NEVER)
        case ("fill", fx.Node() as operand, float(x)) if x <= NEVER:
            return unseen(operand)
    return None
