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

Only where nothing else reads what is gathered, or the pending sum, and for equal parts of one stretch. (Blocks that are computed again in
backward are left alone: they would gather three times.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, fx

from meshpar.graph.facts import Change, facts, info_of, set_facts
from meshpar.graph.op import op_name
from meshpar.ops import collectives, pieces
from meshpar.passes.products import bring, can_come, constants


@dataclass(frozen=True)
class CutIntoPieces:
    """Compute products while their own collectives run. Changes the graph in place.

    `least_bytes`: of a value as it is whole on the axis; pieces of smaller ones cost more, in products of few rows and messages, than they
    hide.
    """

    least_bytes: int = 2**21

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        fixed = constants(graph)
        for node in list(graph.nodes):
            change = facts(node).conversion
            if change is None or change.whole.nbytes < self.least_bytes:
                continue
            if node.target is collectives.s_to_r and _is_even(node, change) and _are_products(node, fixed):
                _gather(graph, node)
            elif node.target is collectives.p_to_s and _is_even(node, change) and _is_pending_product(node):
                _sum(graph, node, pieces.scattered)
            elif node.target is collectives.p_to_i and _is_pending_product(node):
                _sum(graph, node, pieces.reduced)
        return graph


def _is_even(node: fx.Node, change: Change) -> bool:
    """Whether a conversion is one to or from equal parts of one stretch of a dim that is no feature's."""
    dim, repeat, segments = cast(tuple[int, int, tuple[tuple[int, int], ...]], node.args[1:])
    return repeat == 1 and len(segments) == 1 and segments[0][0] % change.size == 0 and dim < len(change.whole.shape) - 1


def _are_products(node: fx.Node, fixed: frozenset[fx.Node]) -> bool:
    """Whether all that reads what is gathered are products of it with parameters, in its block."""
    return bool(node.users) and all(
        op_name(user.target) == "linear"
        and user.op == "call_function"
        and user.args[0] is node
        and facts(user).region == facts(node).region
        and all(isinstance(p, fx.Node) and p in fixed and can_come(node, p) for p in user.args[1:] if p is not None)
        and len(info_of(user.args[1]).shape) == 2  # type: ignore[arg-type]
        for user in node.users
    )


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


def _gather(graph: fx.Graph, node: fx.Node) -> None:
    users = sorted(node.users)
    weights, biases = zip(*((user.args[1], user.args[2] if len(user.args) > 2 else None) for user in users), strict=True)
    for value in (*weights, *biases):
        if isinstance(value, fx.Node):
            bring(node, value)
    with graph.inserting_before(node):
        made = graph.call_function(pieces.gathered, (node.args[0], weights, biases, *node.args[1:]), dict(node.kwargs))
        set_facts(made, replace(facts(node), info=tuple(info_of(user) for user in users)))
        for index, user in enumerate(users):
            item = graph.call_function(operator.getitem, (made, index))
            user.replace_all_uses_with(set_facts(item, facts(user)))
    for user in users:
        graph.erase_node(user)
    graph.erase_node(node)


def _sum(graph: fx.Graph, node: fx.Node, target: Callable[..., Tensor]) -> None:
    made: Any = node.args[0]
    node.target, node.args = target, (*made.args[:2], *node.args[1:])
    graph.erase_node(made)
