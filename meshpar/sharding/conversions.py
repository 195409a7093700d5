"""Every conversion between types: which operator does it, and which collectives that costs forward and backward.

| from \\ to | I                  | R              | P               | S                |
|-----------|--------------------|----------------|-----------------|------------------|
| I         | -                  | - / reduce     | mask / -        | slice / gather   |
| R         | - / mask           | -              | mask / mask     | slice / pad      |
| P         | reduce / -         | reduce / reduce| -               | scatter / gather |
| S         | gather / slice     | gather / scatter | pad / slice   | exchange / exchange |

(reduce: all-reduce, gather: all-gather, scatter: reduce-scatter, exchange: all-to-all)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshpar.graph.facts import Info
from meshpar.sharding.price import Price
from meshpar.sharding.types import Invariant, Partial, Replicate, Shard, Type

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all_reduce", "all_gather", "reduce_scatter", "all_to_all"


@dataclass(frozen=True, slots=True)
class Conversion:
    """One pair of collectives: `op` names the function in `meshpar.ops.collectives`; None where nothing is sent."""

    op: str
    forward: str | None
    backward: str | None


CONVERSIONS: dict[tuple[type, type], Conversion] = {
    (Invariant, Replicate): Conversion("i_to_r", None, ALL_REDUCE),
    (Invariant, Partial): Conversion("i_to_p", None, None),
    (Invariant, Shard): Conversion("i_to_s", None, ALL_GATHER),
    (Replicate, Invariant): Conversion("r_to_i", None, None),
    (Replicate, Partial): Conversion("r_to_p", None, None),
    (Replicate, Shard): Conversion("r_to_s", None, None),
    (Partial, Invariant): Conversion("p_to_i", ALL_REDUCE, None),
    (Partial, Replicate): Conversion("p_to_r", ALL_REDUCE, ALL_REDUCE),
    (Partial, Shard): Conversion("p_to_s", REDUCE_SCATTER, ALL_GATHER),
    (Shard, Invariant): Conversion("s_to_i", ALL_GATHER, None),
    (Shard, Replicate): Conversion("s_to_r", ALL_GATHER, REDUCE_SCATTER),
    (Shard, Partial): Conversion("s_to_p", None, None),
    (Shard, Shard): Conversion("s_to_s", ALL_TO_ALL, ALL_TO_ALL),
}


def conversion(before: Type, after: Type) -> Conversion | None:
    """How a value of type `before` is made one of type `after`; None when they are the same."""
    return None if before == after else CONVERSIONS[type(before), type(after)]


def wire_bytes(kind: str, nbytes: float, size: int) -> float:
    """Bytes each device sends for a collective over a tensor of `nbytes` in all, with ring algorithms.

    >>> wire_bytes("all_reduce", 1024, 4), wire_bytes("all_gather", 1024, 4), wire_bytes("all_to_all", 1024, 4)
    (1536.0, 768.0, 192.0)
    """
    share = (size - 1) / size
    return nbytes * {ALL_REDUCE: 2 * share, ALL_GATHER: share, REDUCE_SCATTER: share, ALL_TO_ALL: share / size}[kind]


def cost(before: Type, after: Type, info: Info, size: int, price: Price, *, parameter: bool = False) -> float:
    """Seconds of a conversion, forward and backward.

    The gradients of a block's `parameter`s travel together, so that they share one latency.
    """
    found = conversion(before, after)
    if found is None:
        return 0.0
    kinds = [found.forward, found.backward if info.requires_grad else None]
    sent = [k for k in kinds if k is not None]
    touched = price.touch(info.nbytes / size) if after != Replicate() else 0.0
    if parameter and kinds[0] is None:
        price = replace(price, latency=price.latency / 100)
    return touched + sum(price.collective(wire_bytes(k, info.nbytes, size)) for k in sent)
