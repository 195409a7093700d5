"""Whether a call in pieces beside its own collectives takes less than the whole after them, on a machine whose constants are known.

    gain    what is no longer waited for, forward and backward
    price   every message more is a latency of the network, every operator more a start
            what is gathered again in backward and does not fit beside what is computed there

Gradient sums are no gain: they run beside weight gradients in either form (`passes/products.py`).
"""

from __future__ import annotations

from meshpar.graph.facts import Change, Exchange
from meshpar.ops import expert_pieces, pieces
from meshpar.sharding.beside import Covers, arriving, leaving, rest
from meshpar.sharding.conversions import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, wire_bytes
from meshpar.sharding.price import Price
from meshpar.sharding.types import Shard


def gathered(change: Change, work: float, products: int, price: Price) -> bool:
    """`ops.pieces.gathered` for a gather and its `products`, of `work` FLOPs forward."""
    parts = change.size * messages_of(change)
    took = _seconds(ALL_GATHER, change, price)
    gain = took - _rest(arriving(work, parts), took, parts - change.size, price)
    again = rest(((1.0, work),), took, price)
    return gain - again > (parts - 1) * products * price.launch


def scattered(change: Change, work: float, price: Price) -> bool:
    """`ops.pieces.scattered` for a product and the sum that is cut."""
    each, size = messages_of(change), change.size
    took, back = _seconds(REDUCE_SCATTER, change, price), _seconds(ALL_GATHER, change, price)
    gain = took - _rest(leaving(work, each * (size - 1), each * size), took, each * (size - 1) - 1, price)
    gain += back - _rest(arriving(work, each * size), back, each * (size - 1) - 1, price)
    return gain > 2 * (each * size - 1) * price.launch


def reduced(change: Change, work: float, price: Price) -> bool:
    """`ops.pieces.reduced` for a product and the sum that all ranks get."""
    took = _seconds(ALL_REDUCE, change, price)
    gain = took - _rest(leaving(work, pieces.PIECES, pieces.PIECES), took, pieces.PIECES - 1, price)
    return gain > pieces.PIECES * price.launch


def on_gathered_tokens(come: Change, leave: Change, work: float, steps: int, price: Price) -> bool:
    """`ops.token_pieces.on_gathered_tokens` for the `steps` of experts between tokens that come and results that leave."""
    seconds = (_seconds(ALL_GATHER, come, price), _seconds(REDUCE_SCATTER, leave, price))
    return _joined(seconds, work, beside_tokens(work, come.size), come.size, steps, price)


def through_experts(sent: Exchange, experts: int, work: float, steps: int, price: Price) -> bool:
    """`ops.expert_pieces.through_experts` for the `steps` of a rank's `experts` between rows that come and rows that return."""
    took = price.collective(sent.rows.nbytes * (1 - 1 / sent.size))
    groups = min(expert_pieces.GROUPS, experts)
    return _joined((took, took), work, beside_rows(work, sent.size, experts), groups + 1, steps, price)


def beside_tokens(work: float, size: int) -> float:
    """FLOPs, of forward's, while tokens come or results leave: half of a rank's own, those of others but for one rank."""
    return work * (size - 1.5) / size


def beside_rows(work: float, size: int, experts: int) -> float:
    """FLOPs, of forward's, while rows come or return: half of a rank's own, and those of others but for one group of its experts."""
    groups = min(expert_pieces.GROUPS, experts)
    return work * (0.5 / size + (1 - 1 / size) * (groups - 1) / groups)


def messages_of(change: Change) -> int:
    """The messages of what one rank sends to another, of a value that is cut between them."""
    cut = change.before if isinstance(change.before, Shard) else change.after
    assert isinstance(cut, Shard)
    return pieces.messages(change.whole.shape[cut.dim] // change.size, change.whole.nbytes // change.size, change.size)


def _joined(seconds: tuple[float, float], work: float, beside: float, more: int, steps: int, price: Price) -> bool:
    """Forward both ways, backward results' gradients; those of what comes ran beside weight gradients before, and now beside others."""
    come, leave = seconds
    messages = more - 1
    gain = sum(took - _rest(((1.0, beside),), took, messages, price) for took in seconds)
    gain += leave - _rest(((1.0, 2 * beside),), leave, messages, price)
    gain += rest(((1.0, work),), come, price) - _rest(((1.0, 2 * beside),), come, messages, price)
    return gain > 3 * more * steps * price.launch


def _seconds(kind: str, change: Change, price: Price) -> float:
    return price.collective(wire_bytes(kind, change.whole.nbytes, change.size))


def _rest(covers: Covers, took: float, more: int, price: Price) -> float:
    """What is waited for, if there are `more` messages than one."""
    return rest(covers, took + more * price.latency, price)
