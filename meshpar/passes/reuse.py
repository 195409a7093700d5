"""All-reduce in place what nothing else reads: the result of a matrix product, and the gradient of what only matrix products read.

    y   = linear(x, w)                           y   = linear(x, w)
    y_i = p_to_i(y, ...)                         y_i = p_to_i(y, ..., reuse=True)       the sum takes the memory of y
    z_r = i_to_r(z, ...)                         z_r = i_to_r(z, ..., reuse=True)       backward: that of the gradient of z_r
    q   = linear(z_r, v)                         q   = linear(z_r, v)

Neither a product's result nor the gradient it returns is kept for backward, so both are the collective's alone. Products and their sum must
lie in one block: recompute keeps the inputs of blocks, which must not change.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from meshpar.graph.facts import facts
from meshpar.graph.operators import operator_of
from meshpar.ops import collectives, products


@dataclass(frozen=True)
class Reuse:
    """Mark the all-reduces that may overwrite what they sum. Changes the graph in place; the last pass, since any other may add readers."""

    results: bool = True
    """Whether the results of products may be overwritten: not where recompute keeps them."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            if (node.target is collectives.p_to_i and self.results and _is_own_result(node)) or (
                node.target in (collectives.i_to_r, products.i_to_r)
                and node.users
                and all(_makes_gradient(user, node) for user in node.users)
            ):
                node.kwargs = {**node.kwargs, "reuse": True}
        return graph


def _is_own_result(node: fx.Node) -> bool:
    """Whether what `node` reads is a product of its own block that nothing else reads."""
    read = node.args[0]
    return (
        isinstance(read, fx.Node)
        and read.op == "call_function"
        and operator_of(read.target).factors is not None
        and len(read.users) == 1
        and facts(read).region == facts(node).region
    )


def _makes_gradient(user: fx.Node, node: fx.Node) -> bool:
    """Whether the gradient that `user` has for `node` is a tensor of its own, or a view of one."""
    if user.op != "call_function":
        return False
    row = operator_of(user.target)
    if row.kind == "view":
        return bool(user.users) and all(_makes_gradient(u, user) for u in user.users)
    places = row.factors
    if places is None or node in user.kwargs.values():
        return False
    return all(arg is not node or place in places for place, arg in enumerate(user.args))
