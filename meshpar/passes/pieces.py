"""Products beside their own collectives, in pieces: all-gather and products, product and reduce-scatter or all-reduce become one call each.

before                                       after
  x_r = s_to_r(x, 1, ...)                      qk = gathered(x, (wq, wk), (None, None), 1, ...)
  q   = linear(x_r, wq)                        q  = qk[0]
  k   = linear(x_r, wk)                        k  = qk[1]
  ...                                          ...
  y   = linear(a, wo)                          y_s = scattered(a, wo, 1, ...)
  y_s = p_to_s(y, 1, ...)
  z   = linear(c, wo)                          z_i = reduced(c, wo, ...)
  z_i = p_to_i(z, ...)

Only where nothing else reads what is gathered and keeps it, or reads the pending sum, and that for equal parts of one stretch. Products of
rows (`addmm` of a view) are products like others; of what is gathered, they and those who keep nothing may read views. (Blocks that are
computed again in backward are left alone: they would gather three times.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from meshpar.graph.facts import Change, facts, info_of, set_facts
from meshpar.graph.op import op_name, operands
from meshpar.graph.operators import operator_of
from meshpar.ops import collectives, pieces
from meshpar.passes import worth
from meshpar.passes.products import bring, can_come, constants
from meshpar.sharding.price import Price

aten = torch.ops.aten


@dataclass(frozen=True)
class CutIntoPieces:
    """Compute products while their own collectives run. Changes the graph in place.

    `price`: the constants of the machine that will run, which tell where it takes less (`passes/worth.py`). Without them, `least_bytes`: of
    a value as it is whole on the axis; pieces of smaller ones cost more, in products of few rows and messages, than they hide. From that
    size on, what is not gathered in pieces is gathered again in backward all the same, to keep a part of it alone.
    """

    least_bytes: int = 2**21
    price: Price | None = None

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        fixed = constants(graph)
        for node in list(graph.nodes):
            change = facts(node).conversion
            if change is None or (self.price is None and change.whole.nbytes < self.least_bytes):
                continue
            if node.target is collectives.s_to_r and node.args[1] < len(change.whole.shape) - 1:
                readers = _readers(node)
                made = [reader for reader in readers if _is_product(node, reader, fixed)]
                alone = all(reader in made or _keeps_nothing(node, reader) for reader in readers)
                at_once = not self._is_worth(worth.gathered, change, made)
                if made and alone and not (at_once and change.whole.nbytes < self.least_bytes):
                    _gather(graph, node, made, {"whole": len(made) < len(readers), "at_once": at_once})
            elif (target := _target(node, change)) is not None and self._is_worth(_WORTH[target], change, [node.args[0]]):
                _sum(graph, node, target)
        return graph

    def _is_worth(self, asked: Callable[[Change, worth.Products, Price], bool], change: Change, made: Sequence[Any]) -> bool:
        return self.price is None or asked(change, worth.products_of(made), self.price)


_WORTH: Mapping[Callable[..., Tensor], Callable[[Change, worth.Products, Price], bool]] = {
    pieces.scattered: worth.scattered,
    pieces.reduced: worth.reduced,
}


def _target(node: fx.Node, change: Change) -> Callable[..., Tensor] | None:
    """What a product and its sum become, if they can be in pieces."""
    if node.target is collectives.p_to_s and _is_even(node, change) and _is_pending_product(node):
        return pieces.scattered
    return pieces.reduced if node.target is collectives.p_to_i and _is_pending_product(node) else None


def _is_even(node: fx.Node, change: Change) -> bool:
    """Whether a conversion is one to equal parts of one stretch of a dim that is no feature's."""
    dim, repeat, segments = cast(tuple[int, int, tuple[tuple[int, int], ...]], node.args[1:])
    return pieces.is_one_stretch(repeat, segments, change.size) and dim < len(change.whole.shape) - 1


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads what is gathered, as it is or viewed."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        viewed = user.op == "call_function" and operator_of(user.target).view
        found |= dict.fromkeys(_readers(user) if viewed else [user])
    return sorted(found)


def _is_product(node: fx.Node, reader: fx.Node, fixed: frozenset[fx.Node]) -> bool:
    """Whether `reader` is a product of what is gathered, or of its rows, with parameters, in its block."""
    if (
        reader.op != "call_function"
        or op_name(reader.target) not in _FACTORS
        or reader.kwargs
        or facts(reader).region != facts(node).region
    ):
        return False
    x, weight, bias = _factors(reader)
    width = info_of(x).shape[-1]
    return (
        len([n for n in operands(reader) if n is x]) == 1
        and width == info_of(node).shape[-1]
        and all(isinstance(p, fx.Node) and p in fixed and can_come(node, p) for p in (weight, bias) if p is not None)
        and len(info_of(weight).shape) == 2
        and (bias is None or len(info_of(bias).shape) == 1)
        and _are_rows(x, node)
    )


def _are_rows(x: fx.Node, node: fx.Node) -> bool:
    """Whether `x` is the rows of `node` in their order: views in between may be of other dims, and turn, cut or repeat them."""
    while x is not node:
        if op_name(x.target) not in _ROWS or info_of(x).shape[-1] != info_of(node).shape[-1]:
            return False
        x = x.args[0]  # type: ignore[assignment]
    return True


_FACTORS: Mapping[str, tuple[int, int, int]] = {"linear": (0, 1, 2), "mm": (0, 1, 2), "addmm": (1, 2, 0)}
"""Products of rows -> where their factors are, and what is added."""
_ROWS = ("view", "reshape", "_unsafe_view", "flatten")
"""Views that leave rows of the last dim as they are, if they leave its size."""


def _factors(product: fx.Node) -> tuple[Any, Any, Any]:
    x, weight, added = _FACTORS[op_name(product.target)]
    return product.args[x], product.args[weight], product.args[added] if added < len(product.args) else None


def _keeps_nothing(node: fx.Node, reader: fx.Node) -> bool:
    """Whether backward of a reader, in its block, needs nothing of what it reads."""
    known = reader.op == "call_function" and operator_of(reader.target).saves in ("nothing", "indices", "results")
    return known and facts(reader).region == facts(node).region


def _is_pending_product(node: fx.Node) -> bool:
    """Whether what is summed is a product without a bias that nothing else reads."""
    made: Any = node.args[0]
    return (
        made.op == "call_function"
        and op_name(made.target) == "linear"
        and len(made.users) == 1
        and (len(made.args) == 2 or made.args[2] is None)
        and facts(made).region == facts(node).region
        and len(info_of(made.args[1]).shape) == 2
    )


def _gather(graph: fx.Graph, node: fx.Node, users: Sequence[fx.Node], form: Mapping[str, bool]) -> None:
    factors = [_factors(user) for user in users]
    for _, weight, bias in factors:
        for value in (weight, bias):
            if isinstance(value, fx.Node):
                bring(node, value)
    known, shape = facts(node), info_of(node).shape[:-1]
    with graph.inserting_before(node):
        weights = tuple(_outputs_first(user, weight) for user, (_, weight, _) in zip(users, factors, strict=True))
        infos = [replace(info_of(user), shape=(*shape, info_of(user).shape[-1])) for user in users]
        args = (node.args[0], weights, tuple(bias for _, _, bias in factors), *node.args[1:])
        made = graph.call_function(pieces.gathered, args, {**node.kwargs, **{name: True for name, is_so in form.items() if is_so}})
        read = tuple(facts(_factors(user)[0]) for user in users)
        set_facts(made, replace(known, info=(*infos, *([info_of(node)] if form["whole"] else [])), inside=read))
        for index, (user, info) in enumerate(zip(users, infos, strict=True)):
            item = set_facts(graph.call_function(operator.getitem, (made, index)), replace(facts(user), info=info))
            if info != info_of(user):
                item = set_facts(graph.call_function(aten.reshape.default, (item, list(info_of(user).shape))), facts(user))
            user.replace_all_uses_with(item)
            graph.erase_node(user)
        if form["whole"]:
            item = graph.call_function(operator.getitem, (made, len(users)))
            node.replace_all_uses_with(set_facts(item, replace(known, conversion=None)))
    _erase_unread(graph, node)


def _outputs_first(product: fx.Node, weight: fx.Node) -> fx.Node:
    """The weight of a product as `linear` has it."""
    if op_name(product.target) == "linear":
        return weight
    info = info_of(weight)
    turned = product.graph.call_function(aten.t.default, (weight,))
    return set_facts(turned, facts(product).beside(replace(info, shape=info.shape[::-1])))


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """A value, and views of it, that nobody reads any more."""
    for user in list(node.users):
        _erase_unread(graph, user)
    graph.erase_node(node)


def _sum(graph: fx.Graph, node: fx.Node, target: Callable[..., Tensor]) -> None:
    made: Any = node.args[0]
    node.target, node.args = target, (*made.args[:2], *node.args[1:])
    graph.erase_node(made)
