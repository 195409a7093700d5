"""Whether a call in pieces beside its own collectives takes less than the whole after them, on a machine whose constants are known.

    gain    what is no longer waited for, forward and backward
    price   every message more is a latency of the network, every product more a start, and its matrix is read again
            parts are copied to their places, and added by kernels of their own
            what is gathered again in backward and does not fit beside what is computed there

Gradient sums are no gain: they run beside weight gradients in either form (`passes/products.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from meshpar.graph.cost import flops
from meshpar.graph.facts import Change, Exchange, info_of
from meshpar.graph.operators import operator_of
from meshpar.ops import expert_pieces, pieces
from meshpar.sharding.beside import Covers, arriving, leaving, rest
from meshpar.sharding.conversions import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, wire_bytes
from meshpar.sharding.price import Price
from meshpar.sharding.types import Shard


@dataclass(frozen=True)
class Products:
    """Some products of one operand, as a rank computes them: FLOPs forward, how many, and bytes of their matrices and of their results."""

    flops: float
    count: int
    matrices: float
    results: float

    def again(self, parts: int, price: Price) -> float:
        """Seconds more, if they are computed in parts."""
        return (parts - 1) * (self.count * price.start + self.matrices / price.memory)


def products_of(nodes: Iterable[fx.Node]) -> Products:
    """The products among some nodes, together."""
    found = [(node, places) for node in nodes if (places := operator_of(node.target).factors) is not None and flops(node)]
    given: Iterator[Any] = (node.args[places[1]] for node, places in found)
    matrices, results = sum(info_of(n).nbytes for n in given), sum(info_of(n).nbytes for n, _ in found)
    return Products(sum(flops(n) for n, _ in found), len(found), matrices, results)


def gathered(change: Change, made: Products, price: Price) -> bool:
    """`ops.pieces.gathered` for a gather and the products `made` of it."""
    parts = change.size * messages_of(change)
    took = _seconds(ALL_GATHER, change, price)
    gain = took - _rest(arriving(made.flops, parts), took, parts - change.size, price)
    again = rest(((1.0, made.flops),), took, price)
    placed = 0.0 if _is_one_stretch(change) else 2 * made.results / price.memory
    return gain > again + placed + made.again(parts, price)


def scattered(change: Change, made: Products, price: Price) -> bool:
    """`ops.pieces.scattered` for a product and the sum that is cut."""
    each, size = messages_of(change), change.size
    took, back = _seconds(REDUCE_SCATTER, change, price), _seconds(ALL_GATHER, change, price)
    gain = took - _rest(leaving(made.flops, each * (size - 1), each * size), took, each * (size - 1) - 1, price)
    gain += back - _rest(arriving(made.flops, each * size), back, each * (size - 1) - 1, price)
    added, placed = 3 * made.results * (1 - 1 / size), 2 * made.results * (1 if _is_one_stretch(change) else 2)
    return gain > (added + placed) / price.memory + 2 * made.again(each * size, price)


def reduced(change: Change, made: Products, price: Price) -> bool:
    """`ops.pieces.reduced` for a product and the sum that all ranks get."""
    took = _seconds(ALL_REDUCE, change, price)
    gain = took - _rest(leaving(made.flops, pieces.PIECES, pieces.PIECES), took, pieces.PIECES - 1, price)
    return gain > 2 * made.results / price.memory + made.again(pieces.PIECES, price)


def on_gathered_tokens(come: Change, leave: Change, made: Products, price: Price) -> bool:
    """`ops.token_pieces.on_gathered_tokens` for the products `made` between tokens that come and results that leave."""
    seconds = (_seconds(ALL_GATHER, come, price), _seconds(REDUCE_SCATTER, leave, price))
    return _joined(seconds, made, beside_tokens(made.flops, come.size), come.size + 1, price)


def through_experts(sent: Exchange, experts: int, made: Products, price: Price) -> bool:
    """`ops.expert_pieces.through_experts` for the products `made` of a rank's `experts`, of rows that come and rows that return."""
    took = price.collective(sent.rows.nbytes * (1 - 1 / sent.size))
    groups = min(expert_pieces.GROUPS, experts)
    return _joined((took, took), made, beside_rows(made.flops, sent.size, experts), groups + 2, price)


def beside_tokens(work: float, size: int) -> float:
    """FLOPs, of forward's, while tokens come or results leave: half of a rank's own, those of others but for one rank."""
    return work * (size - 1.5) / size


def beside_rows(work: float, size: int, experts: int) -> float:
    """FLOPs, of forward's, while rows come or return: half of a rank's own, and those of others but for one group of its experts."""
    groups = min(expert_pieces.GROUPS, experts)
    return work * (0.5 / size + (1 - 1 / size) * (groups - 1) / groups)


def messages_of(change: Change) -> int:
    """The messages of what one rank sends to another, of a value that is cut between them."""
    return pieces.messages(change.whole.shape[_cut(change).dim] // change.size, change.whole.nbytes // change.size, change.size)


def _joined(seconds: tuple[float, float], made: Products, beside: float, parts: int, price: Price) -> bool:
    """Forward both ways, backward results' gradients; those of what comes ran beside weight gradients before, and now beside others."""
    come, leave = seconds
    gain = sum(took - _rest(((1.0, beside),), took, parts - 2, price) for took in seconds)
    gain += leave - _rest(((1.0, 2 * beside),), leave, parts - 2, price)
    gain += rest(((1.0, made.flops),), come, price) - _rest(((1.0, 2 * beside),), come, parts - 2, price)
    return gain > 2 * made.again(parts, price)


def _is_one_stretch(change: Change) -> bool:
    """Whether what a rank has of the whole lies in one stretch of memory."""
    return prod(change.whole.shape[: _cut(change).dim]) == 1


def _cut(change: Change) -> Shard:
    cut = change.before if isinstance(change.before, Shard) else change.after
    assert isinstance(cut, Shard)
    return cut


def _seconds(kind: str, change: Change, price: Price) -> float:
    return price.collective(wire_bytes(kind, change.whole.nbytes, change.size))


def _rest(covers: Covers, took: float, more: int, price: Price) -> float:
    """What is waited for, if there are `more` messages than one."""
    return rest(covers, took + more * price.latency, price)
