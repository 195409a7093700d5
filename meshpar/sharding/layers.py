"""Rules of layers and losses: attention, norms, convolutions, recurrences, losses of labels."""

from __future__ import annotations

import re

import torch

from meshpar.graph.op import Op
from meshpar.sharding.notation import Signature
from meshpar.sharding.rules import by_position, pointwise, row
from meshpar.sharding.views import named, sizes_of


def attention(op: Op) -> Signature | None:
    """Heads may be cut, and queries; keys and values are needed whole. (Random masks are drawn for whole rows.)"""
    q, k = op.shapes[0], op.shapes[1]
    s = "[s]" if op.arguments.get("is_causal") and op.arguments.get("dropout_p") else "s"
    if len(q) != 4 or len(k) != 4:
        return row(f"... {s} [e], ... [t] [e], ... [t] [f], ... {s} [t] -> ... {s} [f]", linear=((2,),))(op)
    grouped = k[1] not in (1, q[1])  # (a single head is broadcast)
    lead = "b (k g)" if grouped else "b k"
    mask = f"b [h] {s} [t]" if grouped and len(op.shapes) > 3 and op.shapes[3][-3:-2] not in ((), (1,)) else f"b k {s} [t]"
    rest = ""
    if len(op.shapes) > 3:
        terms = mask.split(" ")
        rest = ", " + " ".join(terms[4 - len(op.shapes[3]) :])
    return row(f"{lead} {s} [e], b k [t] [e], b k [t] [f]{rest} -> {lead} {s} [f]", linear=((2,),))(op)


def attention_of_a_part(op: Op) -> Signature | None:
    """Queries that an outer axis cut already: heads may be cut."""
    if len(op.shapes[0]) != 4 or len(op.shapes[1]) != 4:
        return row("... [s] [e], ... [t] [e], ... [t] [f] -> ... [s] [f]", linear=((2,),))(op)
    return _of_heads(op, "[s]", "[m]")


def scored_attention(op: Op) -> Signature | None:
    """Heads may be cut, and queries; keys and values are needed whole."""
    return _of_heads(op, "s", "[t]")


def _of_heads(op: Op, queries: str, keys: str) -> Signature | None:
    """Attention with any number of operands that are broadcast to samples, heads, queries and keys."""
    heads, grouped = op.shapes[0][1], op.shapes[1][1] not in (1, op.shapes[0][1])
    lead, more = "(k g)" if grouped else "k", list[str]()
    for shape in op.shapes[3:]:
        terms = ["b", lead if shape[-3:-2] == (heads,) else "k", queries, keys]
        more.append(" ".join(terms[4 - len(shape) :]))
    added = "".join(f", {terms}" for terms in more)
    return row(f"b {lead} {queries} [e], b k [t] [e], b k [t] [f]{added} -> b {lead} {queries} [f]", linear=((2,),))(op)


def normalised(op: Op) -> Signature:
    """layer_norm and rms_norm: the trailing dims given by `normalized_shape` are needed whole."""
    shape = op.infos[0].shape
    count = len(op.arguments["normalized_shape"])
    base = named("d", shape)
    tail = base[len(shape) - count :]
    outs = [base] + [tuple(d if i < len(shape) - count else () for i, d in enumerate(base))] * (len(op.outs) - 1)
    fixed = frozenset(f"d{i}" for i in range(len(shape) - count, len(shape)))
    return Signature((base, *[tail] * (len(op.infos) - 1)), tuple(outs), sizes_of("d", shape), fixed)


def batch_norm(op: Op) -> Signature | None:
    """Channels may be cut; samples only where the statistics do not come from them (see `passes.batch_norm`)."""
    shape = op.infos[0].shape
    if len(shape) < 2:
        return None
    base, sizes = named("d", shape), sizes_of("d", shape)
    channel = base[1:2]
    fixed = frozenset(f"d{i}" for i in range(len(shape)) if i != 1) if op.arguments.get("training", False) else frozenset()
    outs = [base] + [
        channel if o is not None and len(o.shape) == 1 and o.shape == shape[1:2] else tuple(() for _ in (o.shape if o else ()))
        for o in op.outs[1:]
    ]
    return Signature((base, *[channel] * (len(op.infos) - 1)), tuple(outs), sizes, fixed)


def weight_norm(op: Op) -> Signature:
    """A weight of unit norm times a magnitude for each index of one dim, which may be cut."""
    shape, dim = op.infos[0].shape, op.dim()
    base = named("d", shape)
    magnitude = tuple(d if i == dim else () for i, d in enumerate(base))
    return Signature((base, magnitude), (base,), sizes_of("d", shape), frozenset(f"d{i}" for i in range(len(shape)) if i != dim))


def group_norm(op: Op) -> Signature | None:
    """Statistics go over the channels of a group and over space: only samples may be cut."""
    space = " ".join(f"[s{i}]" for i in range(len(op.infos[0].shape) - 2))
    return row(f"b [c] {space}, [c], [c] -> b [c] {space}")(op)


def transposed_convolution(op: Op) -> Signature | None:
    rank = len(op.infos[0].shape) - 2
    if rank < 1 or int(op.arguments["groups"]) > 1:
        return None
    space, kernel, out = (" ".join(f"[{name}{i}]" for i in range(rank)) for name in "skr")
    return row(f"b i {space}, i o {kernel}, o -> b o {out}", linear=((0, 2), (1, 2)))(op)


def convolution(op: Op) -> Signature | None:
    if op.arguments.get("transposed"):
        return transposed_convolution(op)
    rank = len(op.infos[0].shape) - 2
    if rank < 1:
        return None
    space, out = (" ".join(f"[{name}{i}]" for i in range(rank)) for name in "sr")
    if by_position(op):
        space = out = "s0"
    return _of_channels(op, space, out)


def convolved(op: Op) -> Signature | None:
    """A convolution with one result for every so many positions, of which a part needs some around it: channels may be cut."""
    return _of_channels(op, "[s]", "[s]" if op.shapes[0][-1] == op.out.shape[-1] else "[r]")


def _of_channels(op: Op, space: str, out: str) -> Signature | None:
    """The channels of a convolution of `space` to `out`."""
    groups, channels = int(op.arguments.get("groups", 1)), op.infos[0].shape[1]
    kernel = " ".join(f"[k{i}]" for i in range(len(op.infos[0].shape) - 2))
    if groups == 1:
        return row(f"b i {space}, o i {kernel}, o -> b o {out}", linear=((0, 2), (1, 2)))(op)
    if groups == channels and op.infos[1].shape[0] == channels:
        return row(f"b c {space}, c [u] {kernel}, c -> b c {out}", linear=((0, 2), (1, 2)))(op)
    return row(f"b [i] {space}, [o] [u] {kernel}, [o] -> b [o] {out}", linear=((0, 2), (1, 2)))(op)


def pooling(op: Op) -> Signature | None:
    """Windows over the last dims, as many as the operator's name says; the dims before them may be cut."""
    found = re.search(r"([123])d", op.name)
    assert found is not None
    rank, lead = int(found[1]), "b c"
    if len(op.out.shape) == rank + 1:
        lead = "c"
    space, out = " ".join(f"[s{i}]" for i in range(rank)), " ".join(f"[r{i}]" for i in range(rank))
    return row(f"{lead} {space} -> " + ", ".join([f"{lead} {out}"] * len(op.outs)))(op)


def padding(op: Op) -> Signature:
    """Padded dims are needed whole, also where as much is cut off at the other end and the size stays."""
    shape = op.infos[0].shape
    base, sizes = named("d", shape), sizes_of("d", shape)
    changed = sorted({len(shape) - 1 - place // 2 for place, amount in enumerate(op.arguments["pad"]) if amount})
    out = tuple((((f"n{i}",),) if op.out.shape[i] > 1 else ()) if i in changed else d for i, d in enumerate(base))
    sizes.update({f"n{i}": op.out.shape[i] for i in changed})
    linear = (frozenset({0}),) if op.arguments.get("mode", "constant") == "constant" and not op.arguments.get("value") else ()
    return Signature((base,), (out,), sizes, frozenset(f"{p}{i}" for i in changed for p in "dn"), linear)


def unfolded(op: Op) -> Signature:
    """Tensor.unfold: windows along one dim, which is needed whole; their elements are a new last dim."""
    dim, shape, out = op.dim("dimension"), op.infos[0].shape, op.out.shape
    base = named("d", shape)
    windows = (((f"n{dim}",),) if out[dim] > 1 else ()), (((f"n{len(shape)}",),) if out[-1] > 1 else ())
    sizes = {**sizes_of("d", shape), f"n{dim}": out[dim], f"n{len(shape)}": out[-1]}
    result = (*base[:dim], windows[0], *base[dim + 1 :], windows[1])
    return Signature((base,), (result,), sizes, frozenset({f"d{dim}", f"n{dim}", f"n{len(shape)}"}), (frozenset({0}),))


def glu(op: Op) -> Signature:
    """The dim is a row of two halves, which must be cut alike."""
    dim, out = op.dim(), op.out.shape
    base = named("d", out)
    halves = ((f"d{dim}",), (f"d{dim}",)) if out[dim] > 1 else ((f"h{dim}",),)
    sizes = {**sizes_of("d", out), **({} if out[dim] > 1 else {f"h{dim}": 2})}
    before = tuple(halves if i == dim else d for i, d in enumerate(base))
    return Signature((before,), (base,), sizes, frozenset({f"h{dim}"} if out[dim] == 1 else ()))


def prelu(op: Op) -> Signature:
    """One slope for each channel, or one for all."""
    shape = op.infos[0].shape
    base = named("d", shape)
    slope = tuple(base[1] if n > 1 else () for n in op.infos[1].shape)
    return Signature((base, slope), (base,), sizes_of("d", shape))


def recurrent(op: Op) -> Signature | None:
    """lstm, gru, rnn over a whole sequence: samples are independent."""
    a, shape = op.arguments, op.infos[0].shape
    if "batch_sizes" in a or len(shape) != 3 or (a["dropout"] and a["train"]):
        return None
    at = 0 if a["batch_first"] else 1
    size = shape[at]
    sample = (("b",),) if size > 1 else ()
    states = len(a["hx"]) if isinstance(a["hx"], (list, tuple)) else 1
    sequence = tuple(sample if i == at else () for i in range(3))
    state = ((), sample, ())
    weights = [tuple(() for _ in info.shape) for info in op.infos[1 + states :]]
    return Signature((sequence, *[state] * states, *weights), (sequence, *[state] * states), {"b": size} if size > 1 else {})


def cosine_similarity(op: Op) -> Signature:
    """Along one dim of two values that are broadcast against each other."""
    shape = torch.broadcast_shapes(*op.shapes)
    dim = int(op.arguments["dim"]) % len(shape)
    base = named("d", shape)
    inputs = [tuple(d if n > 1 else () for d, n in zip(base[len(shape) - len(own) :], own, strict=True)) for own in op.shapes]
    return Signature(tuple(inputs), ((*base[:dim], *base[dim + 1 :]),), sizes_of("d", shape), frozenset({f"d{dim}"}))


def label_loss(op: Op) -> Signature | None:
    """nll_loss: the classes are needed whole, samples may be cut unless the mean over them is asked for."""
    logits, reduction = op.infos[0].shape, op.arguments["reduction"]
    if reduction == 1 or len(logits) < 2 or len(op.outs) != 1:
        return None
    rest = " ".join(f"d{i}" for i in range(len(logits) - 2))
    return row(f"n [v] {rest}, n {rest}, [w] -> {f'n {rest}' if reduction == 0 else ''}")(op)


def ctc_loss(op: Op) -> Signature | None:
    """Samples may be cut where every one has a row of targets."""
    if len(op.shapes[1]) == 2:
        return row("[t] b [c], b [s], b, b -> b")(op)
    return row("[t] [b] [c], [n], [b], [b] -> [b]")(op)


def loss_by_element(op: Op) -> Signature | None:
    """mse_loss and its kind without a reduction (capture writes the reduction apart)."""
    return pointwise(op) if op.arguments["reduction"] == 0 else None


def cross_entropy(op: Op) -> Signature | None:
    """Sum over the samples: a pending sum where samples are sharded; a sharded class dim is settled by the operator itself."""
    if op.arguments.get("reduction", 1) == 1 or op.infos[1].dtype.is_floating_point:
        return None
    logits = op.infos[0].shape
    rest = " ".join(f"d{i}" for i in range(len(logits) - 2))
    lead = "" if len(logits) == 1 else "n"
    out = f"{lead} {rest}" if op.arguments.get("reduction") == 0 else ""
    return row(f"{lead} v {rest}, {lead} {rest}, [v_w] -> {out}", gathers=("v",))(op)


def dropout(op: Op) -> Signature:
    shape = op.infos[0].shape
    base = named("d", shape)
    return Signature((base,), (base,) * len(op.outs), sizes_of("d", shape))
