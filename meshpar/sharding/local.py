"""How single operators speak of local sizes: a call whose values became a rank's parts, and the call it becomes.

    view(x, [4, 12, 64])   x: S(2) of two         ->   reshape(x, [4, 12, -1])
    mean(x)                x: S(0) of two         ->   sum(x) * (1 / elements of the whole)

Most operators read their sizes off their operands and have no function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from meshpar.graph.op import Op
from meshpar.mesh import Axis
from meshpar.ops import context, gathered, halo, ring, scans, scored, shifts, vocab_parallel
from meshpar.ops import convolution as convolution_ops
from meshpar.plan import NodePlan
from meshpar.sharding.types import Partial, Shard, local_shape
from meshpar.sharding.views import slice_bounds

aten = torch.ops.aten


@dataclass
class LocalCall:
    """One call being lowered: what it was, how it is typed, and the call it becomes."""

    op: Op
    plan: NodePlan
    axis: Axis
    rank: int
    target: Any
    args: list[Any]
    kwargs: dict[str, Any]
    scale: float | None = None
    """A factor applied to the result."""

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """The local shape of a result."""
        out = self.op.outs[index]
        assert out is not None
        return local_shape(out.shape, self.plan.outs[index], self.axis.size, self.rank)

    def in_shape(self, index: int = 0) -> tuple[int, ...]:
        """The local shape of an operand."""
        return local_shape(self.op.infos[index].shape, self.plan.uses[index], self.axis.size, self.rank)

    def out_shard(self) -> Shard | None:
        """The shard of the first result, if it is one."""
        found = self.plan.outs[0]
        return found if isinstance(found, Shard) else None

    def in_shard(self, index: int = 0) -> Shard | None:
        """The shard of an operand, if it is one."""
        found = self.plan.uses[index]
        return found if isinstance(found, Shard) else None

    def sizes(self) -> list[int]:
        """The local shape of the result as a reshape wants it: -1 for the cut dim, which may differ between ranks, or for the rows."""
        cut, rows = self.out_shard(), self.op.out.rows
        free = 0 if rows else cut.dim if cut else -1
        return [-1 if d == free else n for d, n in enumerate(self.out_shape())]

    def set(self, name: str, value: Any) -> None:
        """Set an argument by its schema name."""
        for place, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if place < len(self.args):
                    self.args[place] = value
                else:
                    self.kwargs[name] = value
                return
        raise KeyError(name)

    def where(self) -> dict[str, Any]:
        """The axis as keyword arguments of our own operators."""
        return {"group": self.axis.group, "size": self.axis.size, "rank": self.axis.rank}


Localise = Callable[[LocalCall], None]
"""Changes target and arguments of a call to what they are on the rank."""


def reshape(call: LocalCall) -> None:
    call.target, call.args, call.kwargs = aten.reshape.default, [call.args[0], call.sizes()], {}


def squeeze(call: LocalCall) -> None:
    """Only the dims of the whole value that go: a rank may hold a single element of others."""
    shape, chosen = call.op.infos[0].shape, call.op.dims()
    call.target, call.args, call.kwargs = aten.squeeze.dims, [call.args[0], [d for d in chosen if shape[d] == 1]], {}


def expand(call: LocalCall) -> None:
    out, before = call.out_shape(), call.in_shape()
    shift = len(out) - len(before)
    call.set("size", [-1 if d >= shift and before[d - shift] == n else n for d, n in enumerate(out)])


def created(call: LocalCall) -> None:
    call.set("size", list(call.out_shape()))


def split(call: LocalCall) -> None:
    dim = call.op.dim()
    widths = [call.out_shape(k)[dim] for k in range(len(call.op.outs))]
    call.target, call.args, call.kwargs = aten.split_with_sizes.default, [call.args[0], widths, dim], {}


def slice_(call: LocalCall) -> None:
    """The bounds of a slice among what this rank holds of the dim."""
    dim, cut = call.op.dim(), call.in_shard()
    if cut is None or cut.dim != dim:
        return
    bounds = slice_bounds(call.op)
    assert bounds is not None
    held = cut.ranges(call.axis.size, call.rank)
    start, stop = (sum(max(0, min(high, b) - low) for low, high in held) for b in bounds)
    whole = call.op.out.shape[dim] == call.op.infos[0].shape[dim]
    call.target, call.args, call.kwargs = aten.slice.Tensor, [call.args[0], dim, start, 2**63 - 1 if whole else stop], {}


def ratio(call: LocalCall) -> None:
    out, before = call.out_shape(), call.in_shape()
    shift = len(out) - len(before)
    call.set("repeats", [n // max(1, before[d - shift]) if d >= shift else n for d, n in enumerate(out)])


def interleave(call: LocalCall) -> None:
    dim = call.op.dim()
    call.args, call.kwargs = [call.args[0], call.out_shape()[dim] // max(1, call.in_shape()[dim]), dim], {}


def mean(call: LocalCall) -> None:
    """A mean over a cut dim is the sum of the rank's part over the global count."""
    if not isinstance(call.plan.outs[0], Partial) or call.in_shard() is None:
        return
    count = 1
    for d in call.op.dims():
        count *= call.op.infos[0].shape[d]
    keep, dtype = bool(call.op.arguments.get("keepdim", False)), call.op.arguments.get("dtype")
    call.target = aten.sum.dim_IntList
    call.args, call.kwargs = [call.args[0], list(call.op.dims()), keep], {"dtype": dtype} if dtype else {}
    call.scale = 1.0 / count


def embedding(call: LocalCall) -> None:
    cut = call.in_shard(0)
    if cut is None or cut.dim != 0:
        return
    padding = call.op.arguments.get("padding_idx", -1)
    call.target = vocab_parallel.embedding
    call.args = [call.args[1], call.args[0], padding, cut.dim, cut.repeat, cut.segments]
    call.kwargs = call.where()


def cross_entropy(call: LocalCall) -> None:
    cut, logits = call.in_shard(0), call.op.infos[0].shape
    class_dim = 0 if len(logits) == 1 else 1
    if cut is None or cut.dim != class_dim:
        return
    a = call.op.arguments
    call.target = vocab_parallel.cross_entropy
    weight = call.args[2] if len(call.args) > 2 else call.kwargs.get("weight")
    call.kwargs = {
        "reduction": "sum" if a["reduction"] == 2 else "none",
        "ignore_index": a["ignore_index"],
        "label_smoothing": a["label_smoothing"],
        **call.where(),
    }
    call.args = [*call.args[:2], weight, cut.dim, cut.repeat, cut.segments]


def convolution(call: LocalCall) -> None:
    groups = int(call.op.arguments.get("groups", 1))
    weight = call.in_shard(1)
    if groups > 1 and weight is not None and weight.dim == 0:
        call.set("groups", call.in_shape(1)[0])


def convolved(call: LocalCall) -> None:
    """As many groups as there are channels here; of a part of the positions, with what lies around it."""
    weight, cut, out = call.in_shard(1), call.in_shard(), call.out_shard()
    if int(call.op.arguments["groups"]) > 1 and weight is not None and weight.dim == 0:
        call.kwargs["groups"] = call.in_shape(1)[0]
    if call.plan.why == "near" and cut is not None and out is not None:
        bias = call.args[2] if len(call.args) > 2 else None
        call.target, call.args = convolution_ops.halo_convolution, [*call.args[:2], bias, cut.dim, cut.repeat, cut.segments]
        call.kwargs |= {"out": out.segments, **call.where()}


def cumulated(call: LocalCall) -> None:
    """Along a dim that is cut."""
    cut = call.in_shard()
    if call.plan.why == "prefix" and cut is not None:
        how, dtype = call.op.name, call.op.arguments.get("dtype")
        call.target, call.args = scans.cumulated, [call.args[0], how, dtype, cut.dim, cut.repeat, cut.segments]
        call.kwargs = call.where()


def shifted(call: LocalCall) -> None:
    """Of a part of the positions, with those before it."""
    cut = call.in_shard()
    if call.plan.why == "near" and cut is not None:
        call.target, call.args = shifts.halo_shifted, [call.args[0], cut.dim, cut.repeat, cut.segments]
        call.kwargs |= call.where()


def attention(call: LocalCall) -> None:
    """Queries that are cut are not the first ones: what they may see follows from their positions."""
    cut, a, own = call.in_shard(), call.op.arguments, call.target is scored.scored_attention
    form = call.plan.why.partition(": ")[0]
    window, causal = a.get("window"), bool(a.get("is_causal", True))
    if cut is None or cut.dim != len(call.op.infos[0].shape) - 2 or (form not in ("gather", "ring", "halo") and not causal):
        return
    given = call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")
    call.args = [*call.args[:3], *_added(given, form, own), cut.dim, cut.repeat, cut.segments]
    call.kwargs = {"window": window, "scale": a["scale"], "enable_gqa": a["enable_gqa"], **call.where()}
    call.target = _FORMS.get((form, own), scored.scored_attention_of_a_part if own else context.causal_attention)
    if form in ("gather", "ring") or (own and form != "halo"):
        call.kwargs["causal"] = causal
    if form == "ring" or own:
        call.kwargs["steps"] = a["steps"] if own else steps_of(call.op)
    if form == "gather" and (keys := call.in_shard(1)) is not None:
        call.kwargs["keys"] = keys.segments


def _added(given: Any, form: str, own: bool) -> list[Any]:
    """What is added to scores, as a form takes it: a mask, operands, or nothing."""
    if not own and form not in ("gather", "ring"):
        return []
    if own or form == "gather":
        return [given]
    return [[] if given is None else [given]]


def steps_of(op: Op) -> tuple[tuple[str, int], ...]:
    """A mask as a step of scores."""
    return () if len(op.infos) < 4 else (("seen" if op.infos[3].dtype == torch.bool else "plus", 0),)


_FORMS = {
    ("gather", False): gathered.gathered_attention,
    ("halo", False): halo.halo_attention,
    ("halo", True): scored.scored_halo_attention,
    ("ring", False): ring.ring_attention,
    ("ring", True): ring.ring_attention,
}
"""The operators of the forms, of torch's attention and of that with steps of its own."""


def exchanged_again(call: LocalCall) -> None:
    """A conversion of an outer axis whose dims this axis cuts inside of their parts: it moves what this rank has of each."""
    for at in range(1, len(call.args) - 2, 3):
        dim = call.args[at]
        (whole, local), *_ = sorted(
            ((call.op.infos[0].shape[dim], call.in_shape()[dim]), (call.op.out.shape[dim], call.out_shape()[dim])), reverse=True
        )
        if whole != local:
            ((units, each),) = call.args[at + 2]
            call.args[at + 2] = ((units * each * local // whole, 1),)
