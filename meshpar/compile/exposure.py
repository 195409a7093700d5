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
from meshpar.plan import Comm
from meshpar.sharding.conversions import ALL_GATHER
from meshpar.sharding.price import Price
from meshpar.sharding.types import Shard

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
    change, phase, kind = facts(node).conversion, sent.phase, sent.kind
    if node.target in _COMPUTING and phase == "backward":
        return max(0.0, seconds - _left_to(node, price))
    if node.target is pieces.gathered:
        assert change is not None
        own = price.compute(flops(node), 0.0)
        if phase == "forward":
            repeat, segments = node.args[4:6]
            in_pieces = not node.kwargs.get("whole") and pieces.is_one_stretch(repeat, segments, change.size)  # type: ignore[arg-type]
            return _arriving(seconds, own, change.size, _messages(change)) if in_pieces else seconds
        return max(0.0, seconds - (own if kind == ALL_GATHER else own + _left_to(node, price)))
    if node.target is pieces.scattered:
        assert change is not None
        own = price.compute(flops(node), 0.0)
        if phase == "forward":
            many = _messages(change)
            return _leaving(seconds, own, many * (change.size - 1), many * change.size)
        return max(0.0, _arriving(seconds, own, change.size, _messages(change)) - _left_to(node, price))
    if node.target is pieces.reduced and phase == "forward":
        return _leaving(seconds, price.compute(flops(node), 0.0), pieces.PIECES, pieces.PIECES)
    if node.target is ring.ring_attention:
        return _going_round(node, seconds, phase, price)
    if node.target is expert_pieces.through_experts and sent.node != COUNTS:
        return max(0.0, seconds - _beside_rows(node, price) * (2 if phase == "backward" else 1))
    if node.target is token_pieces.on_gathered_tokens:
        return max(0.0, seconds - _beside_tokens(node, price) * (2 if phase == "backward" else 1))
    return seconds


def _beside_tokens(node: fx.Node, price: Price) -> float:
    """Seconds of what is computed, forward, while tokens come or results leave: half of a rank's own, those of others but for one rank."""
    change = facts(node).inside[0].conversion
    assert change is not None
    return price.compute(flops(node), 0.0) * (change.size - 1.5) / change.size


def _going_round(node: fx.Node, seconds: float, phase: str, price: Price) -> float:
    """What of keys, values and the sums of their gradients takes longer than what is computed beside them."""
    size: Any = node.kwargs["size"]
    pairs = 0.5 if node.kwargs.get("causal") else 1.0
    beside = price.compute(flops(node) * pairs, 0.0) * (size - 1) / size
    if phase == "forward":
        return max(0.0, seconds - beside)
    home = seconds / (2 * size - 1)
    return home + max(0.0, seconds - home - 2.5 * beside)  # five products for two


def _beside_rows(node: fx.Node, price: Price) -> float:
    """Seconds of what is computed, forward, while rows come or return: half of a rank's own, and those of others but for one group."""
    exchange, ends = facts(node).inside[0].exchange, facts(node).inside[2].info
    assert exchange is not None
    assert isinstance(ends, Info)
    groups = min(expert_pieces.GROUPS, ends.shape[0])
    own = 1 / exchange.size
    return price.compute(flops(node), 0.0) * (own / 2 + (1 - own) * (groups - 1) / groups)


def _left_to(node: fx.Node, price: Price) -> float:
    """Seconds of the weight gradients that products left to a node: as many as those of the products."""
    return sum(price.compute(flops(user), 0.0) for later in _queues(node) for user in later.users if user is not node)


def _queues(node: fx.Node) -> Sequence[fx.Node]:
    """Where a node finds what is left to it."""
    place = _PLACES[node.target]
    found = node.args[place] if len(node.args) > place else None
    return [found] if isinstance(found, fx.Node) else []


def _messages(change: Change) -> int:
    """The messages of what one rank sends to another, of a value that is cut between them."""
    cut = change.before if isinstance(change.before, Shard) else change.after
    assert isinstance(cut, Shard)
    return pieces.messages(change.whole.shape[cut.dim] // change.size, change.whole.nbytes // change.size, change.size)


def _arriving(seconds: float, compute: float, size: int, messages: int) -> float:
    """Parts are computed as they come, the own one first; beside the last message, all but what it brings."""
    return max(0.0, seconds - compute * (1 - 1 / (size * messages)))


def _leaving(seconds: float, compute: float, messages: int, parts: int) -> float:
    """Parts leave as they are computed, `messages` of `parts`; how much later than the last part is computed the last one has arrived."""
    part, one = compute / parts, seconds / messages
    ends = [k * part + (messages - k + 1) * one for k in range(1, messages + 1)]
    return min(seconds, max(0.0, max(ends) - compute))
