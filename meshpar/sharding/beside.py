"""What is computed beside a collective: of a call that sends in pieces, as shares of what sending takes and FLOPs that run meanwhile."""

from __future__ import annotations

from meshpar.sharding.price import Price

Covers = tuple[tuple[float, float], ...]
"""Shares of what a collective takes, and for each the floating-point operations that run beside it: the longest rest is waited for."""
WAITED: Covers = ((1.0, 0.0),)


def rest(covers: Covers, seconds: float, price: Price) -> float:
    """The seconds, of those that a collective takes, beside which nothing is computed.

    >>> rest(((1.0, 3e12),), 0.02, Price(flops=5e14))
    0.014
    """
    return max(0.0, *(share * seconds - price.compute(work, 0.0) for share, work in covers))


def arriving(work: float, parts: int, left: float = 0.0) -> Covers:
    """Of `parts` of what is computed the own one is first, others as they come: beside the last message, all but what it brings.

    Then what others `left`.
    """
    return ((1.0, work * (1 - 1 / parts) + left),)


def leaving(work: float, messages: int, parts: int) -> Covers:
    """Parts leave as they are computed, `messages` of `parts`: the last beside what stays, all beside all but the first."""
    return ((1 / messages, work * (1 - messages / parts)), (1.0, work * (1 - 1 / parts)))
