"""simplify(): a captured graph without what says nothing, and with every operator in the one form that rules know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from meshpar._torch import OpOverload
from meshpar.graph.facts import Info, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.graph.operators import OperatorKind, operator_of

aten = torch.ops.aten

Cleanup = Callable[[fx.Node], fx.Node | None]
"""Looks at one node; returns what to use instead (an older node, or new ones it put before this one), or None for "not mine"."""


def simplify(graph: fx.Graph) -> None:
    """Run every cleanup of the table over every node, in order; then drop what nobody uses.

    view(clone(expand(x, s)), t)      ->   reshape(expand(x, s), t)
    cat([empty, y]), add(y, 0)        ->   y
    cross_entropy_loss(x, t)          ->   div(cross_entropy_loss(x, t, sum), sum(t != -100))
    """
    for cleanup in CLEANUPS:
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            instead = cleanup(node)
            if instead is not None:
                node.replace_all_uses_with(instead)
                graph.erase_node(node)
    forget_device_numbers(graph)
    graph.eliminate_dead_code()


def prune(graph: fx.Graph) -> None:
    """Drop the checks that export wrote down (this graph knows its shapes and types), and what nobody uses."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith(("aten._assert_", "aten.sym_constrain")) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def skip_copies(node: fx.Node) -> fx.Node | None:
    """alias, clone, cast to the same type, detach of a constant: nothing in the graph is ever overwritten, so a copy says nothing.

    A copy made to be contiguous stays, unless a view follows, which becomes a reshape.
    """
    if node.target in (aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default):
        return _operand(node)
    if node.target is aten.clone.default:
        return _operand(node) if _format(node) in (None, torch.preserve_format) or _only_viewed(node) else None
    if node.target is aten.detach.default:
        return None if info_of(_operand(node)).requires_grad else _operand(node)
    if node.target is aten._to_copy.default:
        same = (
            info_of(node).dtype == info_of(_operand(node)).dtype
            and not node.kwargs.get("device")
            and _format(node) in (None, torch.preserve_format)
        )
        return _operand(node) if same else None
    return None


def skip_neutral(node: fx.Node) -> fx.Node | None:
    """x + 0, x - 0, x * 1, x / 1 where neither type nor shape changes."""
    neutral = _NEUTRAL.get(op_name(node.target))
    if neutral is None or len(node.args) < 2 or isinstance(node.args[1], fx.Node) or node.args[1] != neutral:
        return None
    return _operand(node) if _same(node, _operand(node)) else None


def skip_idle_dropout(node: fx.Node) -> fx.Node | None:
    """Dropout that drops nothing."""
    if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
        return _operand(node)
    picks_value = node.target is operator.getitem and node.args[1] == 0
    source = node.args[0] if picks_value else None
    if isinstance(source, fx.Node) and source.target is aten.native_dropout.default and (source.args[1] == 0 or source.args[2] is False):
        return _operand(source)
    return None


def skip_idle_views(node: fx.Node) -> fx.Node | None:
    """Views that change nothing."""
    if op_name(node.target) not in _IDLE or not _same(node, _operand(node)):
        return None
    if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
        return None
    if node.target is aten.permute.default and list(_integers(node.args[1])) != list(range(len(info_of(node).shape))):
        return None
    return _operand(node)


def without_empty_parts(node: fx.Node) -> fx.Node | None:
    """cat accepts operands of shape (0,) next to any other (an empty cache is one): drop them."""
    if node.target is not aten.cat.default:
        return None
    given: Any = node.args[0]
    parts = [part for part in given if info_of(part).shape != (0,)]
    if len(parts) == len(given) or not parts:
        return None
    if len(parts) == 1 and _same(node, parts[0]):
        return _as_node(parts[0])
    return emit(node, aten.cat.default, (parts, *node.args[1:]), info_of(node))


def views_as_reshape(node: fx.Node) -> fx.Node | None:
    """view and its kin -> reshape: the strides of a shard may differ from the whole tensor's."""
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.view_copy.default, aten._reshape_alias.default):
        return emit(node, aten.reshape.default, (_operand(node), list(info_of(node).shape)), info_of(node))
    return None


def masked_writes(node: fx.Node) -> fx.Node | None:
    """x[mask] = v, the same for every row that is chosen -> where(mask, v, x)."""
    if node.target not in (aten.index_put.default, aten._unsafe_index_put.default) or _argument(node, 3, "accumulate", False):
        return None
    given: Any = node.args[1]
    mask, value = given[0] if len(given) == 1 else None, _as_node(node.args[2])
    if not isinstance(mask, fx.Node) or info_of(mask).dtype != torch.bool:
        return None
    rest = info_of(node).shape[len(info_of(mask).shape) :]
    if len(info_of(value).shape) > len(rest) or info_of(value).dtype != info_of(node).dtype:
        return None
    shape = (*info_of(mask).shape, *(1 for _ in rest))
    wide = emit(node, aten.reshape.default, (mask, list(shape)), Info(shape, torch.bool, False))
    return emit(node, aten.where.self, (wide, value, _operand(node)), info_of(node))


def transposes(node: fx.Node) -> fx.Node | None:
    """t, numpy_T, mT -> transpose or permute."""
    if op_name(node.target) not in _TRANSPOSES:
        return None
    rank = len(info_of(_operand(node)).shape)
    if rank < 2:
        return _operand(node)
    if node.target is aten.numpy_T.default and rank > 2:
        return emit(node, aten.permute.default, (_operand(node), list(range(rank - 1, -1, -1))), info_of(node))
    return emit(node, aten.transpose.int, (_operand(node), rank - 2, rank - 1), info_of(node))


def copies_as_expand(node: fx.Node) -> fx.Node | None:
    """copy(old, new) has no derivative; its value is `new` in the type and shape of `old`."""
    if node.target is not aten.copy.default:
        return None
    value = node.args[1]
    assert isinstance(value, fx.Node)
    want, have = info_of(node), info_of(value)
    if have.dtype != want.dtype:
        value = emit(node, aten._to_copy.default, (value,), Info(have.shape, want.dtype, want.requires_grad), {"dtype": want.dtype})
    return value if have.shape == want.shape else emit(node, aten.expand.default, (value, list(want.shape)), want)


def broadcasts_as_expand(node: fx.Node) -> fx.Node | None:
    """One result of broadcast_tensors -> an expand of its operand."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.target is not aten.broadcast_tensors.default:
        return None
    operands: Any = source.args[0]
    operand = operands[node.args[1]]
    info = info_of(node)
    return _as_node(operand) if _same(node, operand) else emit(node, aten.expand.default, (operand, list(info.shape)), info)


def dense_lookups(node: fx.Node) -> fx.Node | None:
    """embedding(sparse=True) -> dense gradients, the same numbers: a sharded parameter cannot hold sparse ones."""
    if node.target is not aten.embedding.default or not _argument(node, 4, "sparse", False):
        return None
    padding, scaled = _argument(node, 2, "padding_idx", -1), _argument(node, 3, "scale_grad_by_freq", False)
    return emit(node, node.target, (*node.args[:2], padding, scaled), info_of(node))


def losses_by_element(node: fx.Node) -> fx.Node | None:
    """mse_loss(x, y, mean) -> mean(mse_loss(x, y, none)): a mean over a sharded dim is then an ordinary mean."""
    position = _place(node, "reduction") if _is_torchs(node, "loss") else None
    if position is None:
        return None
    reduction = _argument(node, position, "reduction", 1)
    if reduction == 0:
        return None
    args = [*node.args[:position]] + ([None] * (position - len(node.args)))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "reduction"}
    shape = torch.broadcast_shapes(*(info_of(part).shape for part in node.all_input_nodes))
    info = Info(tuple(shape), info_of(node).dtype, info_of(node).requires_grad)
    each = emit(node, node.target, (*args, 0, *node.args[position + 1 :]), info, kwargs)
    return emit(node, aten.mean.default if reduction == 1 else aten.sum.default, (each,), info_of(node))


def losses_by_count(node: fx.Node) -> fx.Node | None:
    """cross_entropy_loss(mean) -> a sum divided by the number (or weight) of labels that count, which can be had for the global batch."""
    if not _is_torchs(node, "label loss") or _argument(node, 3, "reduction", 1) != 1:
        return None
    logits, target, weight = _operand(node), node.args[1], _argument(node, 2, "weight", None)
    assert isinstance(target, fx.Node)
    if info_of(target).dtype.is_floating_point:
        return None
    loss = info_of(node)
    wide = Info((), torch.float32 if loss.dtype == torch.float16 else loss.dtype, loss.requires_grad)  # a sum of labels overflows float16
    if wide.dtype != loss.dtype:
        logits = emit(node, aten._to_copy.default, (logits,), Info(info_of(logits).shape, wide.dtype, True), {"dtype": wide.dtype})
    ignore = _argument(node, 4, "ignore_index", -100)
    rest = (_argument(node, 5, "label_smoothing", 0.0),) if node.target is aten.cross_entropy_loss.default else ()
    total = emit(node, node.target, (logits, target, weight, 2, ignore, *rest), wide)
    count = _labels(node, target, ignore) if weight is None else _label_weights(node, target, weight, ignore)
    if info_of(count).dtype != wide.dtype:
        count = emit(node, aten._to_copy.default, (count,), Info((), wide.dtype, False), {"dtype": wide.dtype})
    mean = emit(node, aten.div.Tensor, (total, count), wide)
    return mean if wide.dtype == loss.dtype else emit(node, aten._to_copy.default, (mean,), loss, {"dtype": loss.dtype})


def _labels(node: fx.Node, target: fx.Node, ignore: int) -> fx.Node:
    valid = emit(node, aten.ne.Scalar, (target, ignore), Info(info_of(target).shape, torch.bool, False))
    return emit(node, aten.sum.default, (valid,), Info((), torch.int64, False))


def _label_weights(node: fx.Node, target: fx.Node, weight: fx.Node, ignore: int) -> fx.Node:
    shape, dtype = info_of(target).shape, info_of(weight).dtype
    ignored = emit(node, aten.eq.Scalar, (target, ignore), Info(shape, torch.bool, False))
    safe = emit(node, aten.masked_fill.Scalar, (target, ignored, 0), Info(shape, torch.int64, False))
    each = emit(node, aten.embedding.default, (_column(node, weight), safe), Info((*shape, 1), dtype, False))
    each = emit(node, aten.reshape.default, (each, list(shape)), Info(shape, dtype, False))
    each = emit(node, aten.masked_fill.Scalar, (each, ignored, 0), Info(shape, dtype, False))
    return emit(node, aten.sum.default, (each,), Info((), dtype, False))


def _column(node: fx.Node, weight: fx.Node) -> fx.Node:
    info = info_of(weight)
    return emit(node, aten.reshape.default, (weight, [*info.shape, 1]), Info((*info.shape, 1), info.dtype, info.requires_grad))


CLEANUPS: tuple[Cleanup, ...] = (
    skip_copies,
    skip_neutral,
    skip_idle_dropout,
    without_empty_parts,
    masked_writes,
    transposes,
    copies_as_expand,
    broadcasts_as_expand,
    views_as_reshape,
    skip_idle_views,
    dense_lookups,
    losses_by_element,
    losses_by_count,
)

_NEUTRAL: Mapping[str, int] = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_IDLE = frozenset({"reshape", "expand", "slice", "permute"})
"""Views that change nothing where they keep the shape, but for the order of a permutation and the step of a slice."""
_TRANSPOSES = frozenset({"t", "numpy_T", "mT", "matrix_H"})


def forget_device_numbers(graph: fx.Graph) -> None:
    """device="cuda:3" -> "cuda": each rank runs the graph on its own current device."""
    for node in graph.nodes:
        device = node.kwargs.get("device") if node.op == "call_function" else None
        if isinstance(device, torch.device) and device.index is not None:
            node.kwargs = {**node.kwargs, "device": torch.device(device.type)}


def emit(before: fx.Node, target: Any, args: tuple[Any, ...], info: Info, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """A new node in front of `before`, with its origin."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, dict(kwargs or {}))
    return set_facts(node, facts(before).beside(info))


def _operand(node: fx.Node) -> fx.Node:
    return _as_node(node.args[0])


def _as_node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _same(node: fx.Node, other: fx.Node) -> bool:
    return info_of(node).shape == info_of(other).shape and info_of(node).dtype == info_of(other).dtype


def _format(node: fx.Node) -> Any:
    return node.kwargs.get("memory_format")


def _only_viewed(node: fx.Node) -> bool:
    return all(user.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default) for user in node.users)


def _integers(value: Any) -> list[int]:
    return [int(item) for item in value]


def _is_torchs(node: fx.Node, kind: OperatorKind) -> bool:
    """Whether a call is of a kind, and its arguments mean what they mean to torch."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten" and operator_of(node.target).kind == kind


def _place(node: fx.Node, name: str) -> int | None:
    """The place of an argument; None for an operator that has none of this name."""
    assert isinstance(node.target, OpOverload)
    return next((place for place, argument in enumerate(node.target._schema.arguments) if argument.name == name), None)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
