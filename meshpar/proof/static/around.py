"""Convolutions of a part of the positions, with what lies around it; cumulative operators and shifts, with what lies before it."""

from __future__ import annotations

from collections.abc import Sequence

from meshpar.graph.op import Op
from meshpar.proof.static.calls import PlainCall
from meshpar.proof.static.forms import PARTIAL, WHOLE, Outcome, told
from meshpar.proof.static.layout import layout_of
from meshpar.proof.static.report import Contradiction
from meshpar.sharding.types import I, Shard, Type


def convolution(op: Op, call: PlainCall, types: Sequence[Type], ranks: int) -> Outcome:
    """On the axis that cuts the positions: parts before and after, with the same weight everywhere, whose gradients add up."""
    x, cut, last = types[0], Shard(*call.cut), len(op.shapes[0]) - 1
    results = Shard(last, 1, tuple(call.told["out"]))
    if not isinstance(x, Shard) or x.dim != last:
        raise Contradiction(f"it takes a part of the positions, which are {told(x)}")
    if cut.dim != last or layout_of(cut, ranks) != layout_of(x, ranks):
        raise Contradiction(f"it is told that ranks have the positions {cut}, they have {x}")
    if any(t != I for t in types[1:]):
        raise Contradiction("its weight or its bias is not the same on all ranks")
    if results.length != op.out.shape[last]:
        raise Contradiction(f"it gives {results.length} positions, the model {op.out.shape[last]}")
    return Outcome((results,), (WHOLE, *[PARTIAL] * (len(types) - 1)))


def cumulative(op: Op, call: PlainCall, types: Sequence[Type], ranks: int) -> Outcome:
    """On the axis that cuts the dim along which it goes."""
    x, cut = types[0], Shard(*call.cut)
    if not isinstance(x, Shard) or x.dim != op.dim():
        raise Contradiction(f"it takes a part of the dim that it goes along, which is {told(x)}")
    if cut.dim != x.dim or layout_of(cut, ranks) != layout_of(x, ranks):
        raise Contradiction(f"it is told that ranks have {cut}, they have {x}")
    return Outcome((x,), (WHOLE,))
