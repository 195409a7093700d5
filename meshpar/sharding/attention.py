"""Attention over a sequence that is cut: what forms there are, what each sends, and which a typing is.

    form      keys and values                                              sent by a rank, in parts of the keys and values
    gather    all of them meet the rank's own queries                      p - 1 forward, 2 (p - 1) backward
    heads     an all-to-all: each rank has some heads of all positions     (with queries and results) about 1/p of the whole, twice
    ring      they go round; a rank holds two parts at a time              p - 1 forward, 2 p - 1 backward
    halo      in a sliding window: the few before the rank's own           window / part for each of its pieces, forward and backward

Heads are conversions around an attention of the usual rules. The others are operators that take the parts as they are, and keep no more.
(With dropout, and where heads of keys and values are repeated before they meet the queries, a gather is conversions, too.)
(Liu et al., arXiv 2310.01889, and Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from meshpar.graph.op import value_of
from meshpar.sharding.infer import BoundOp
from meshpar.sharding.price import Price
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import Shard
from meshpar.sharding.typings import Choice

AttentionForm = Literal["gather", "heads", "ring", "halo", "whole"]


def form(choice: Choice) -> AttentionForm:
    """Which form a typing of attention is."""
    query, key = choice.uses[:2]
    if choice.why in ("gather", "ring", "halo"):
        return choice.why  # type: ignore[return-value]
    if not isinstance(query, Shard):
        return "whole"
    return "heads" if isinstance(key, Shard) else "gather"


def gathering(call: BoundOp, found: Sequence[Choice], reading: Reading, price: Price) -> list[Choice]:
    """The typings, and beside those that need whole keys and values the same with cut ones, which one operator gathers.

    It keeps parts for backward, and gathers once more. What the others keep is as dear as that message.
    """
    cut = None if call.op.arguments.get("dropout_p") else _of_keys(call, reading)
    if cut is None:
        return list(found)
    sent = price.collective(sum(info.nbytes for info in call.op.infos[1:3]) * (reading.size - 1) / reading.size)
    revised: list[Choice] = []
    for one in found:
        if form(one) != "gather" or not isinstance(one.uses[0], Shard) or one.uses[0].dim != 2 or one.uses[0].repeat != 1:
            revised.append(one)
            continue
        uses = (one.uses[0], cut, cut, *one.uses[3:])
        revised += [replace(one, cost=one.cost + sent), Choice(uses, one.outs, one.cost + 3 * sent, "gather")]
    return revised


def _of_keys(call: BoundOp, reading: Reading) -> Shard | None:
    """The cut of keys and values along their positions."""
    if any(len(info.shape) != 4 for info in call.op.infos[:3]) or len({info.dtype for info in call.op.infos[:3]}) > 1:
        return None
    ones = {reading.inference.dims[value_of(operand)][2] for operand in call.op.operands[1:3]}
    factors = {one if one is None else reading.inference.extents.find(one) for one in ones}
    if len(factors) != 1 or (factor := factors.pop()) is None or factor in reading.batch:
        return None
    cut = reading.shard(2, factor, factor)
    return cut if cut is not None and cut.repeat == 1 else None


def between_parts(call: BoundOp, reading: Reading, price: Price, work: float) -> list[Choice]:
    """The typings in which queries, keys and values stay cut along one sequence: as a ring, and in a window with a halo."""
    cut = _sequence(call, reading)
    arguments = call.op.arguments
    if cut is None or arguments.get("attn_mask") is not None or arguments.get("dropout_p"):
        return []
    size, sent = reading.size, float(sum(info.nbytes for info in call.op.infos[1:3]))
    steps = price.collective(0.0) * size + 1.5 * sent * (size - 1) / size / price.link
    found = [Choice((cut,) * 3, (cut,), work / size + 2 * steps, "ring")]
    if (window := arguments.get("window")) is not None:
        rows = (window - 1) * len(cut.segments) / cut.length
        found.append(replace(found[0], cost=work / size + 2 * price.collective(sent * min(1.0, rows)), why="halo"))
    return found


def _sequence(call: BoundOp, reading: Reading) -> Shard | None:
    """The cut that queries, keys and values have in common."""
    if len(call.op.operands) < 3 or any(len(info.shape) != 4 for info in call.op.infos[:3]):
        return None
    ones = {reading.inference.dims[value_of(operand)][2] for operand in call.op.operands[:3]}
    factors = {one if one is None else reading.inference.extents.find(one) for one in ones}
    if len(factors) != 1 or (factor := factors.pop()) is None:
        return None
    cut = reading.shard(2, factor, factor)
    return cut if cut is not None and cut.repeat == 1 and factor not in reading.batch else None
