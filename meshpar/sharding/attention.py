"""Attention over a sequence that is cut: what forms there are, what each sends, and which a typing is.

    form      keys and values                                              sent by a rank, in parts of the keys and values
    gather    all of them meet the rank's own queries                      p - 1 forward, 2 (p - 1) backward
    heads     an all-to-all: each rank has some heads of all positions     (with queries and results) about 1/p of the whole, twice
    ring      they go round; a rank holds two parts at a time              p - 1 forward, 2 p - 1 backward
    halo      in a sliding window: the few before the rank's own           (window - 1) / part for each of its pieces that another
                                                                           rank's come after, forward and backward

Heads are conversions around an attention of the usual rules. The others are operators that take the parts as they are, and keep no more.
(With dropout, and where heads of keys and values are repeated before they meet the queries, a gather is conversions, too.)
(Liu et al., arXiv 2310.01889, and Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from meshpar.graph.facts import Info
from meshpar.graph.op import value_of
from meshpar.ops.halo import before_each
from meshpar.sharding.infer import BoundOp
from meshpar.sharding.price import Price
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import R, Shard, Type
from meshpar.sharding.typings import Choice, at_rest

AttentionForm = Literal["gather", "heads", "ring", "halo", "whole"]


def form(choice: Choice) -> AttentionForm:
    """Which form a typing of attention is."""
    query, key = choice.uses[:2]
    if (said := said_form(choice.why)) is not None:
        return said
    if not isinstance(query, Shard):
        return "whole"
    return "heads" if isinstance(key, Shard) else "gather"


def said_form(why: str) -> AttentionForm | None:
    """The form that an operator of its own has, of the reason of a typing; a reason why it is no other form may follow."""
    said = why.partition(": ")[0]
    return said if said in ("gather", "ring", "halo") else None  # type: ignore[return-value]


def instead(found: Sequence[Choice], call: BoundOp, reading: Reading, asked: str) -> list[Choice]:
    """The typings of a call that has none of the form that was asked for, with the reason."""
    reason = {"ring": f"no ring, {_reason(call, reading)}", "heads": "no heads that divide"}.get(asked)
    return [one if reason is None else replace(one, why=f"{one.why}: {reason}") for one in found]


def gathering(call: BoundOp, found: Sequence[Choice], reading: Reading, price: Price) -> list[Choice]:
    """The typings, and beside those that need whole keys and values the same with cut ones, which one operator gathers.

    It keeps parts for backward, and gathers once more. What the others keep is as dear as that message.
    """
    cut = None if call.op.arguments.get("dropout_p") or "steps" in call.op.arguments else _of_keys(call, reading)
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
    """The typings in which queries, keys and values stay cut along one sequence: as a ring, and in a window with a halo.

    What is added to scores is cut along the queries; beside a halo it may not depend on keys (sinks do not).
    """
    cut = _sequence(call, reading)
    arguments = call.op.arguments
    if isinstance(cut, str) or arguments.get("dropout_p"):
        return []
    added = tuple(_along_queries(info, cut) for info in call.op.infos[3:])
    size, sent = reading.size, float(sum(info.nbytes for info in call.op.infos[1:3]))
    steps = price.collective(0.0) * size + 1.5 * sent * (size - 1) / size / price.link
    found = [Choice((*(cut,) * 3, *added), (cut,), work / size + 2 * steps, "ring")]
    if (window := arguments.get("window")) is not None and all(n == 1 for info in call.op.infos[3:] for n in info.shape[-1:]):
        rows = before_each(cut, window, size).most_sent() / cut.length
        found.append(replace(found[0], cost=work / size + 2 * price.collective(sent * rows), why="halo"))
    return found


def _reason(call: BoundOp, reading: Reading) -> str:
    """Why keys and values cannot go round."""
    found = _sequence(call, reading)
    return found if isinstance(found, str) else "it drops weights at random"


def _along_queries(info: Info, cut: Shard) -> Type:
    """How an operand `[..., queries, keys]` is used where the queries are cut."""
    at = len(info.shape) - 2
    return replace(cut, dim=at) if at >= 0 and info.shape[at] == cut.length else at_rest(info, R)


def _sequence(call: BoundOp, reading: Reading) -> Shard | str:
    """The cut that queries, keys and values have in common, or why there is none."""
    if len(call.op.operands) < 3 or any(len(info.shape) != 4 for info in call.op.infos[:3]):
        return "its values are not of samples, heads, positions and a width"
    ones = {reading.inference.dims[value_of(operand)][2] for operand in call.op.operands[:3]}
    factors = {one if one is None else reading.inference.extents.find(one) for one in ones}
    if len(factors) != 1 or (factor := factors.pop()) is None or factor in reading.batch:
        return "its queries and its keys are not known to be of one sequence"
    cut = reading.shard(2, factor, factor)
    return cut if cut is not None and cut.repeat == 1 else "its positions cannot be dealt out evenly"
