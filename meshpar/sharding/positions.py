"""What goes along positions but looks no further than a few of them, over a sequence that is cut."""

from __future__ import annotations

from meshpar.graph.op import value_of
from meshpar.ops.convolution import around
from meshpar.ops.scans import SCANS
from meshpar.ops.shifts import before
from meshpar.sharding.infer import Axes, BoundOp
from meshpar.sharding.price import Price
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import R, Shard
from meshpar.sharding.typings import Choice, at_rest


def of_parts(call: BoundOp, reading: Reading, price: Price, work: float) -> list[Choice]:
    """The typing in which a convolution takes and gives parts of the positions, and fetches those around its own."""
    if call.op.name != "meshpar.ops.convolution.convolved":
        return []
    inference, size = reading.inference, reading.size
    given = _cut(inference.dims[value_of(call.op.operands[0])], reading)
    after = _cut(inference.dims[call.op.node, 0], reading)
    if given is None or after is None:
        return []
    a, (b, channels, _) = call.op.arguments, call.op.shapes[0]
    near = around(given, after, call.op.shapes[1][-1], a["left"], a["stride"], a["dilation"], size)
    sent = price.collective(float(near.most_sent() * b * channels * call.op.infos[0].dtype.itemsize))
    uses = (given, *(at_rest(info, R) for info in call.op.infos[1:]))
    return [Choice(uses, (after,), work / size + 2 * sent, "near")]


def piecewise(call: BoundOp, reading: Reading, price: Price, work: float) -> list[Choice]:
    """The typing in which a cumulative sum or product takes and gives parts, and what they come to is told to all ranks.

    So of a shift, which fetches the positions before its own.
    """
    if call.op.name == "meshpar.ops.shifts.shifted":
        return _shifted(call, reading, price, work)
    if call.op.name not in SCANS or not call.op.out.requires_grad or not call.op.infos[0].shape:
        return []
    dim = call.op.dim()
    cut = _cut(reading.inference.dims[call.op.node, 0], reading, dim)
    if cut is None:
        return []
    totals = price.collective(call.op.out.nbytes / cut.length * len(cut.segments) * reading.size)
    return [Choice((cut,), (cut,), work / reading.size + 2 * totals, "prefix")]


def _shifted(call: BoundOp, reading: Reading, price: Price, work: float) -> list[Choice]:
    dim, info, size = call.op.dim(), call.op.out, reading.size
    cut = _cut(reading.inference.dims[call.op.node, 0], reading, dim)
    if cut is None:
        return []
    sent = price.collective(before(cut, call.op.arguments["by"], size).most_sent() * info.nbytes / info.shape[dim])
    return [Choice((cut,), (cut,), work / size + 2 * sent, "near")]


def _cut(axes: Axes, reading: Reading, dim: int = -1) -> Shard | None:
    """The cut of the dim of the positions."""
    if (one := axes[dim]) is None or (factor := reading.inference.extents.find(one)) in reading.batch:
        return None
    cut = reading.shard(dim % len(axes), factor, factor)
    return cut if cut is not None and cut.repeat == 1 else None
