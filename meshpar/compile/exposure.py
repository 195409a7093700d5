"""How long a collective is waited for: what it takes, less what a lowered graph computes beside it, both by the constants of a `Price`.

    i_to_r(x, later, (wa, wb))     backward: the gradients of wa and wb run beside it
    gathered, t ranks              own rows run beside the first of t - 1 parts, those that have arrived beside the next
                                   backward: gathering runs beside the gradients of values, their sum beside those of weights
    scattered, reduced             a message leaves when its rows are computed: the last ones run late
    through_experts                rows of others run beside the first half of own ones and each other, results beside each other and the
                                   other half; their numbers are waited for
    on_gathered_tokens, t ranks    tokens of others come beside the first half of own ones and each other, results leave beside each other
                                   and the other half; so do gradients
    ring_attention, p ranks        forward: p - 1 messages of keys and values, each beside a step of p
                                   backward: as many beside as many steps, and after each of p the sums so far, the last beside nothing
    any other                      is waited for where it is called

Overlap over the borders of calls (of data parallelism, of pipelines) is none of a graph's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from meshpar.graph.cost import flops
from meshpar.graph.facts import Change, Info, facts
from meshpar.ops import expert_pieces, pieces, products, ring, token_pieces
from meshpar.passes.worth import beside_rows, beside_tokens, messages_of
from meshpar.plan import Comm
from meshpar.sharding.beside import WAITED, Covers, arriving, leaving, rest
from meshpar.sharding.conversions import ALL_GATHER
from meshpar.sharding.price import Price

COUNTS = "numbers of rows"
"""What is sent before the rows of experts, as the ledger calls it."""
_COMPUTING = (products.i_to_r, products.convert, products.send_rows)
_PLACES: Mapping[Any, int] = {
    products.i_to_r: 1,
    products.convert: 1,
    products.send_rows: 2,
    pieces.gathered: 6,
    pieces.scattered: 7,
}
"""Of a call, where among its arguments is what others leave to it."""


def exposed(node: fx.Node, sent: Comm, seconds: float, price: Price) -> float:
    """The seconds, of those that one of a node's collectives takes, beside which nothing is computed."""
    return rest(covers(node, sent), seconds, price)


def covers(node: fx.Node, sent: Comm) -> Covers:
    """What is computed beside one of a node's collectives, on any machine."""
    change, phase, kind = facts(node).conversion, sent.phase, sent.kind
    if node.target in _COMPUTING and phase == "backward":
        return ((1.0, _left_to(node)),)
    if node.target is pieces.gathered:
        assert change is not None
        if phase == "forward":
            return arriving(flops(node), change.size * messages_of(change)) if _arrives_in_pieces(node, change) else WAITED
        return ((1.0, flops(node) + (0.0 if kind == ALL_GATHER else _left_to(node))),)
    if node.target is pieces.scattered:
        assert change is not None
        if phase == "forward":
            many = messages_of(change)
            return leaving(flops(node), many * (change.size - 1), many * change.size)
        return arriving(flops(node), change.size * messages_of(change), _left_to(node))
    if node.target is pieces.reduced and phase == "forward":
        return leaving(flops(node), pieces.PIECES, pieces.PIECES)
    if node.target is ring.ring_attention:
        return _going_round(node, phase)
    twice = 2 if phase == "backward" else 1
    if node.target is expert_pieces.through_experts and sent.node != COUNTS:
        exchange, ends = facts(node).inside[0].exchange, facts(node).inside[2].info
        assert exchange is not None
        assert isinstance(ends, Info)
        return ((1.0, twice * beside_rows(flops(node), exchange.size, ends.shape[0])),)
    if node.target is token_pieces.on_gathered_tokens:
        change = facts(node).inside[0].conversion
        assert change is not None
        return ((1.0, twice * beside_tokens(flops(node), change.size)),)
    return WAITED


def messages(node: fx.Node, sent: Comm) -> int:
    """How many calls one of a node's collectives is: messages between two ranks, or parts of a sum."""
    change, phase = facts(node).conversion, sent.phase
    if node.target is pieces.reduced and phase == "forward":
        return pieces.PIECES
    if change is None or node.target not in (pieces.gathered, pieces.scattered):
        return 1
    travels = phase == "forward" and _arrives_in_pieces(node, change) if node.target is pieces.gathered else True
    return (change.size - 1) * messages_of(change) if travels else 1


def _arrives_in_pieces(gathered: fx.Node, change: Change) -> bool:
    repeat, segments = gathered.args[4:6]
    at_once = gathered.kwargs.get("whole") or gathered.kwargs.get("at_once")
    return not at_once and pieces.is_one_stretch(repeat, segments, change.size)  # type: ignore[arg-type]


def _going_round(node: fx.Node, phase: str) -> Covers:
    """Keys, values and the sums of their gradients beside a step of attention each; the last sums go home beside nothing."""
    size: Any = node.kwargs["size"]
    beside = flops(node) * (0.5 if node.kwargs.get("causal") else 1.0) * (size - 1) / size
    return ((1.0, beside),) if phase == "forward" else ((1 / (2 * size - 1), 0.0), (1.0, 2.5 * beside))  # five products for two


def _left_to(node: fx.Node) -> float:
    """The weight gradients that products left to a node: as much as those of the products."""
    return sum(flops(user) for later in _queues(node) for user in later.users if user is not node)


def _queues(node: fx.Node) -> Sequence[fx.Node]:
    """Where a node finds what is left to it."""
    place = _PLACES[node.target]
    found = node.args[place] if len(node.args) > place else None
    return [found] if isinstance(found, fx.Node) else []
