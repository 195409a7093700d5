"""What each collective is: the type it takes, the type it gives, and the gradient it has to be handed, with what it makes of that.

A pair of collectives is right only for one kind of gradient: an all-reduce in backward makes one that is whole as many times too large as
there are ranks, and none leaves one that is pending so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meshpar.proof.static.forms import PARTIAL, WHOLE, Gradient

TakenKind = Literal["same", "part", "sum"]


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One collective: forward from `takes` to `gives`; backward from a gradient that is `handed` to one that is `returned`."""

    takes: TakenKind
    gives: TakenKind
    handed: Gradient
    returned: Gradient


EXCHANGES: Mapping[str, CollectiveRow] = {
    #                      forward            what arrives in backward, and what it becomes
    "i_to_r": CollectiveRow("same", "same", PARTIAL, WHOLE),  # all-reduce
    "i_to_p": CollectiveRow("same", "sum", WHOLE, WHOLE),
    "i_to_s": CollectiveRow("same", "part", WHOLE, WHOLE),  # all-gather
    "r_to_i": CollectiveRow("same", "same", WHOLE, PARTIAL),  # kept on one rank
    "r_to_p": CollectiveRow("same", "sum", WHOLE, PARTIAL),  # kept on one rank
    "r_to_s": CollectiveRow("same", "part", WHOLE, PARTIAL),  # zeros beside it
    "p_to_i": CollectiveRow("sum", "same", WHOLE, WHOLE),
    "p_to_r": CollectiveRow("sum", "same", PARTIAL, WHOLE),  # all-reduce
    "p_to_s": CollectiveRow("sum", "part", WHOLE, WHOLE),  # all-gather
    "s_to_i": CollectiveRow("part", "same", WHOLE, WHOLE),  # a slice
    "s_to_r": CollectiveRow("part", "same", PARTIAL, WHOLE),  # reduce-scatter
    "s_to_p": CollectiveRow("part", "sum", WHOLE, WHOLE),  # a slice
    "s_to_s": CollectiveRow("part", "part", WHOLE, WHOLE),  # all-to-all
}
