"""Gradient sums hidden behind weight gradients: products with a parameter leave the gradient of it to the conversion before them.

before                                       after
  h = norm(x, g)                               later = beside()
  y = i_to_r(h, ...)                           h = norm(x, g)
  a = linear(y, wa)                            y = i_to_r(h, later, (wd, wa, wb), ...)           backward: all-reduce beside
  b = linear(y, wb)                            a = linear(y, wa, None, later, 1)                       the gradients of wd, wa, wb
  d = linear(silu(a) * b, wd)                  b = linear(y, wb, None, later, 2)
                                               d = linear(silu(a) * b, wd, None, later, 0)

Any conversion that sends in backward takes those of the products of its block whose gradients pass through it: backward then comes to it
after all of them. Of several, one after the other, each takes the products behind it; where two follow each other in backward with no
product between them, they share, by the bytes they send. What is kept longer is the result's gradient of these products, within one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx

from meshpar.graph.facts import Facts, Info, facts, info_of, infos_of, set_facts
from meshpar.graph.op import op_name, operands
from meshpar.graph.operators import operator_of
from meshpar.ops import collectives, expert_all_to_all, pieces, products
from meshpar.ops.collectives import PRIMITIVES
from meshpar.sharding.conversions import conversion, wire_bytes

_LATER: Mapping[str, Callable[..., Tensor]] = {
    "linear": products.linear,
    **dict.fromkeys(("mm", "matmul", "addmm"), products.matmul),
    "meshpar.grouped_mm": products.grouped_mm,
    "meshpar.ops.pieces.scattered": pieces.scattered,
    "meshpar.ops.pieces.reduced": pieces.reduced,
}
"""Products -> the same, leaving the gradient of the weight to somebody else."""
_IN_PIECES = (pieces.scattered, pieces.reduced)
_CONVERSIONS = frozenset(getattr(collectives, name) for name in PRIMITIVES)


@dataclass(frozen=True)
class HideGradientSums:
    """Compute weight gradients while collectives of backward run. Changes the graph in place.

    `least_bytes`: smaller messages are not worth it: what is added costs about as much as they do (50 us of Python a block).
    """

    least_bytes: int = 2**18

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for start, weighed in self._assigned(graph):
            _join(graph, start, weighed)
        return graph

    def _assigned(self, graph: fx.Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Collectives, and the products whose weight gradients are computed beside each."""
        constant = constants(graph)
        starts = [n for n in graph.nodes if n not in constant and _message(n) >= max(1, self.least_bytes)]
        through = _through(graph, frozenset(starts))
        left = [n for n in graph.nodes if through.get(n) and _is_weighed(n, constant)]
        found, at = list[tuple[fx.Node, list[fx.Node]]](), len(starts) - 1
        while at >= 0:
            start = starts[at]
            ready = _ready(left, through, start)
            sharing = [start]
            while at and (before := starts[at - 1]) in through.get(start, ()) and _same(ready, _ready(left, through, before)):
                sharing.append(start := before)
                at -= 1
            found += [(one, taken) for one, taken in zip(sharing, _shared(ready, sharing), strict=True) if taken]
            left = [n for n in left if n not in ready]
            at -= 1
        return found


def _message(node: fx.Node) -> float:
    """The bytes that a collective sends in backward; 0 of anything else."""
    known = facts(node)
    if node.op != "call_function":
        return 0.0
    if node.target is expert_all_to_all.send_rows and known.exchange is not None:
        return float(known.exchange.rows.nbytes) if known.exchange.rows.requires_grad else 0.0
    change = known.conversion
    if node.target not in (*_CONVERSIONS, pieces.gathered, pieces.scattered) or change is None or not change.whole.requires_grad:
        return 0.0
    found = conversion(change.before, change.after)
    return wire_bytes(found.backward, change.whole.nbytes, change.size) if found is not None and found.backward is not None else 0.0


def constants(graph: fx.Graph) -> frozenset[fx.Node]:
    """Parameters, and what is made of nothing else."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and (read := operands(node)) and found.issuperset(read)):
            found.add(node)
    return frozenset(found)


def _through(graph: fx.Graph, starts: frozenset[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """Node -> the collectives that its gradients come to within its block, itself left out."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        before = [n for n in operands(node) if facts(n).region == facts(node).region and any(_differentiable(i) for i in infos_of(n))]
        if node.op == "call_function" and any(_differentiable(i) for i in infos_of(node)):
            found[node] = frozenset().union(*(found.get(n, frozenset()) | ({n} & starts) for n in before))
    return found


def _differentiable(info: Info | None) -> bool:
    return info is not None and info.requires_grad


def _is_weighed(node: fx.Node, constant: frozenset[fx.Node]) -> bool:
    """Whether a node is the product of a value with a parameter that is trained."""
    if op_name(node.target) not in _LATER or (node.kwargs and node.target not in _IN_PIECES):
        return False
    x, weight, bias = _factors(node)
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight in constant and x not in constant):
        return False
    dims = (2, 3) if _LATER[op_name(node.target)] is products.grouped_mm else (len(info_of(x).shape), 2)
    plain = bias is None or (isinstance(bias, fx.Node) and len(info_of(bias).shape) == 1)
    return plain and info_of(weight).requires_grad and (len(info_of(x).shape), len(info_of(weight).shape)) == dims and dims[0] > 1


def _factors(node: fx.Node) -> tuple[Any, Any, Any]:
    """Value, weight, and what is added, of a product."""
    places = operator_of(node.target).factors
    assert places is not None
    if _LATER[op_name(node.target)] in (products.grouped_mm, *_IN_PIECES):
        return node.args[0], node.args[1], None
    added = node.args[0] if places[0] else node.args[2] if len(node.args) > 2 else None
    return node.args[places[0]], node.args[places[1]], added


def _ready(left: Sequence[fx.Node], through: Mapping[fx.Node, frozenset[fx.Node]], start: fx.Node) -> list[fx.Node]:
    """The products whose gradients come to `start`, which can have their weights."""
    return [n for n in left if start in through[n] and can_come(start, _factors(n)[1])]


def can_come(start: fx.Node, node: fx.Node) -> bool:
    """Whether what a parameter is made into may stand before `start`: collectives stay where they are, in one order on all ranks."""
    if node < start:
        return True
    sends = facts(node).conversion is not None or bool(facts(node).joined)
    return not (sends and node.kwargs["rank"] >= 0) and all(can_come(start, one) for one in node.all_input_nodes)  # type: ignore[operator]


def _same(some: Sequence[fx.Node], others: Sequence[fx.Node]) -> bool:
    return len(some) == len(others) and set(some) == set(others)


def _work(node: fx.Node) -> float:
    """In proportion to the operations of a weight gradient."""
    x, _, _ = _factors(node)
    return float(prod(info_of(x).shape) * info_of(node).shape[-1])  # (rows of x, which a sum may have more of than its result)


def _own(start: fx.Node) -> float:
    """The same of the weight gradients that a collective computes without being asked to."""
    if start.target is not pieces.gathered:
        return 0.0
    x: Any = start.args[0]
    weights: Any = start.args[1]  # (a last result may be what was gathered)
    return float(sum(prod(one.shape) for one, _ in zip(infos_of(start), weights) if one is not None) * info_of(x).shape[-1])


def _shared(ready: Sequence[fx.Node], starts: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The products, the last ones first, dealt out to collectives in the order of backward, in proportion to what these send.

    (Less what they compute beside themselves anyway.)
    """
    found: list[list[fx.Node]] = [[] for _ in starts]
    whole, sent = sum(map(_work, ready)) + sum(map(_own, starts)), sum(map(_message, starts))
    quotas = [max(0.0, _message(one) / sent * whole - _own(one)) for one in starts]
    done, at, until = 0.0, 0, quotas[0]
    for node in reversed(ready):
        while at < len(starts) - 1 and done + _work(node) / 2 > until:
            at += 1
            until += quotas[at]
        found[at].append(node)
        done += _work(node)
    return found


def _join(graph: fx.Graph, start: fx.Node, weighed: Sequence[fx.Node]) -> None:
    """Let `start` compute the weight gradients of the products."""
    weights = tuple(_factors(node)[1] for node in weighed)
    for weight in weights:
        bring(start, weight)
    known = facts(start)
    with graph.inserting_before(start):
        later = set_facts(graph.call_function(products.beside), Facts(module=known.module, region=known.region, stage=known.stage))
    if start.target is expert_all_to_all.send_rows:
        start.args, start.target = (*start.args, later, weights), products.send_rows
    elif start.target is pieces.gathered:
        start.args = (*start.args, later, weights)
    elif start.target is pieces.scattered:
        start.args = (*start.args, *(None, 0)[len(start.args) - 5 :], later, weights)
    elif start.target is collectives.i_to_r:
        start.args, start.target = (start.args[0], later, weights), products.i_to_r
    else:
        start.args = (start.args[0], later, weights, start.target.__name__, *start.args[1:])  # type: ignore[union-attr]
        start.target = products.convert
    for number, node in enumerate(weighed):
        x, weight, bias = _factors(node)
        node.target = _LATER[op_name(node.target)]
        more = node.args[2:] if node.target in (products.grouped_mm, *_IN_PIECES) else (bias,)
        if node.target is pieces.scattered and len(more) > 3:  # (it computes those of others)
            more = (*more[:3], later, number, *more[5:])
            node.args = (x, weight, *more)
            continue
        node.args = (x, weight, *more, later, number)


def bring(start: fx.Node, node: fx.Node) -> None:
    """What a parameter is made into stands before `start`."""
    for one in node.all_input_nodes:
        bring(start, one)
    if start < node:
        start.prepend(node)
