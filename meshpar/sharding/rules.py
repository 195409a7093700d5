"""Rules: what operators allow, as functions of a call. Which operator obeys which is said in its row of `graph.operators`.

Most are one line of notation (see `notation`) plus the sets of operands in which the operator is linear. Those below depend on arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from meshpar.graph.flops import spelled
from meshpar.graph.op import Op
from meshpar.sharding.notation import Dim, Dims, Signature, bind
from meshpar.sharding.views import Rule, fixed_dims, named, sizes_of


def row(text: str, *, linear: Iterable[Iterable[int]] = (), gathers: Iterable[str] = (), counts: Iterable[tuple[int, str]] = ()) -> Rule:
    """A rule written in the notation."""
    linear, counts = tuple(tuple(g) for g in linear), tuple(counts)

    def rule(op: Op) -> Signature | None:
        outs = [o.shape for o in op.outs if o is not None]
        try:
            return bind(text, op.shapes, outs, linear=linear, gathers=gathers, counts=counts)
        except ValueError:
            return None

    return rule


# -- pointwise ---------------------------------------------------------------------------------------------------------------------------


def pointwise(op: Op) -> Signature:
    """Dims aligned from the right; a dim of size 1 against a larger one is broadcast. (The example of `type_as` may have more dims.)"""
    out = op.out.shape
    names = named("d", out)
    inputs = []
    for shape in op.shapes:
        shift = len(out) - len(shape)
        inputs.append(tuple(names[i + shift] if i + shift >= 0 and n == out[i + shift] else () for i, n in enumerate(shape)))
    return Signature(tuple(inputs), (names,) * len(op.outs), sizes_of("d", out))


def elementwise(linear: Linear) -> Rule:
    """As `pointwise`, linear in the sets of operands that `linear` says."""
    return lambda op: replace(pointwise(op), linear=tuple(frozenset(group) for group in linear(op)))


def pointwise_or(rule: Rule) -> Rule:
    """`pointwise` in the forms that carry torch's tag (`max` of two tensors), else `rule` (`max` along a dim)."""
    return lambda op: pointwise(op) if torch.Tag.pointwise in getattr(op.node.target, "tags", ()) else rule(op)


def uncut(op: Op) -> Signature:
    """Results like the operands, none of which may be cut: what lies before and after is."""
    names = tuple(named(f"d{i}_", shape) for i, shape in enumerate(op.shapes))
    sizes = {name: n for i, shape in enumerate(op.shapes) for name, n in sizes_of(f"d{i}_", shape).items()}
    return Signature(names, names, sizes, frozenset(sizes))


Linear = Callable[[Op], list[set[int]]]
"""Sets of operands in which a call is linear."""


def nowhere(op: Op) -> list[set[int]]:
    return []


def jointly(op: Op) -> list[set[int]]:
    """x + y, of two tensors: a number added to a pending sum would be added by every rank."""
    tensors = [a for a in ("self", "other") if isinstance(op.arguments.get(a), torch.fx.Node)]
    return [set(range(len(op.infos)))] if len(tensors) == 2 else []


def each(op: Op) -> list[set[int]]:
    """x * y: in x and in y, unless they are the same."""
    return [{i} for i in range(len(op.infos))] if op.node.args[0] is not op.node.args[-1] else []


def first(op: Op) -> list[set[int]]:
    return [{0}]


def quotient(op: Op) -> list[set[int]]:
    """x / y: in x, unless it is rounded."""
    return [{0}] if isinstance(op.arguments.get("self"), torch.fx.Node) and op.arguments.get("rounding_mode") is None else []


def widened(op: Op) -> list[set[int]]:
    return [{0}] if _widens(op) else []


def choice(op: Op) -> list[set[int]]:
    """where(mask, x, y): in x and y together."""
    return [{1, 2}] if len(op.infos) == 3 else []


def _widens(op: Op) -> bool:
    """A pending sum may be cast only where the cast loses nothing."""
    a, b = op.infos[0].dtype, op.out.dtype
    return a == b or (b.is_floating_point and b.itemsize >= a.itemsize) or (not a.is_floating_point and b.itemsize > a.itemsize)


# -- reductions --------------------------------------------------------------------------------------------------------------------------


def reduction(op: Op) -> Signature:
    """Reduced dims are needed whole."""
    found = counted(op)
    return replace(found, fixed=frozenset(f"d{i}" for i in op.dims()))


def summed(op: Op) -> Signature:
    """Sums and means: linear, and a pending sum where a summed dim is sharded."""
    return replace(counted(op), linear=(frozenset({0}),))


def counted(op: Op) -> Signature:
    """Sums of something made of each element: a pending sum where a summed dim is sharded."""
    shape = op.infos[0].shape
    gone = set(op.dims())
    base = named("d", shape)
    keep = op.out.shape
    kept = tuple(base[i] if i not in gone else () for i in range(len(shape)))
    out: Dims = kept if len(keep) == len(shape) else tuple(d for i, d in enumerate(kept) if i not in gone)
    return Signature((base,), (out,) * len(op.outs), sizes_of("d", shape))


along_dim = fixed_dims(lambda op: [op.dim()], linear=False)
"""softmax and cumulative operators: along one dim, which is needed whole."""


# -- rows that need the arguments --------------------------------------------------------------------------------------------------------


def matmul(op: Op) -> Signature | None:
    a, b = len(op.infos[0].shape), len(op.infos[1].shape)
    left = {1: "k"}.get(a, "... i k")
    right = {1: "k", 2: "k j"}.get(b, "... k j")
    out = " ".join(["..."] * (a > 2 or b > 2) + ["i"] * (a > 1) + ["j"] * (b > 1))
    return row(f"{left if a != 2 else 'i k'}, {right} -> {out}", linear=((0,), (1,)))(op)


def added(sum_: str, product: str) -> Rule:
    """A matrix product with something added to it, which is broadcast from the right."""

    def rule(op: Op) -> Signature | None:
        names = sum_.split()
        return row(f"{' '.join(names[len(names) - len(op.shapes[0]) :])}, {product}", linear=((0, 1), (0, 2)))(op)

    return rule


def einsum(op: Op) -> Signature | None:
    left, arrow, out = str(op.arguments["equation"]).replace(" ", "").partition("->")
    if not arrow:
        return None
    terms = [" ".join(spelled(term, len(shape))) for term, shape in zip([*left.split(","), out], [*op.shapes, op.out.shape], strict=True)]
    return row(f"{', '.join(terms[:-1])} -> {terms[-1]}", linear=tuple((i,) for i in range(len(op.infos))))(op)


def embedding(op: Op) -> Signature | None:
    """Gradients scaled by how often an id occurs need all ids and the whole table."""
    return None if op.arguments["scale_grad_by_freq"] else row("v c, ... -> ... c")(op)


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
    grouped = op.shapes[1][1] not in (1, op.shapes[0][1])
    lead, rest = "b (k g)" if grouped else "b k", ""
    if len(op.shapes) > 3:
        terms = ["b", "[h]" if grouped and op.shapes[3][-3:-2] not in ((), (1,)) else "k", "[s]", "[m]"]
        rest = ", " + " ".join(terms[4 - len(op.shapes[3]) :])
    return row(f"{lead} [s] [e], b k [t] [e], b k [t] [f]{rest} -> {lead} [s] [f]", linear=((2,),))(op)


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


def index(op: Op) -> Signature | None:
    """`x[:, i, j]`: the dims without an index keep their names, the indexed ones are needed whole."""
    given = [a for a in op.arguments["indices"]]
    places = [i for i, a in enumerate(given) if a is not None]
    if not places or places != list(range(places[0], places[-1] + 1)) or any(i.dtype == torch.bool for i in op.infos[1 : 1 + len(places)]):
        return None
    shape = op.infos[0].shape
    rank = max(len(i.shape) for i in op.infos[1 : 1 + len(places)])
    new = op.out.shape[places[0] : places[0] + rank]
    base, at = named("d", shape), named("n", new)
    out = (*base[: places[0]], *at, *base[places[-1] + 1 :])
    indices = [tuple(at[rank - len(i.shape) + k] if n > 1 else () for k, n in enumerate(i.shape)) for i in op.infos[1 : 1 + len(places)]]
    values = [out[len(out) - len(i.shape) :] for i in op.infos[1 + len(places) :]]
    if values:
        return None
    fixed = [f"d{i}" for i in places]
    return Signature((base, *indices), (out,), {**sizes_of("d", shape), **sizes_of("n", new)}, frozenset(fixed), (frozenset({0}),))


def index_select(op: Op) -> Signature:
    dim, shape = op.dim(), op.infos[0].shape
    base = named("d", shape)
    out = tuple(((("n",),) if op.out.shape[dim] > 1 else ()) if i == dim else d for i, d in enumerate(base))
    lookup = ((("n",),) if op.infos[1].shape and op.infos[1].shape[0] > 1 else (),) if op.infos[1].shape else ()
    return Signature((base, lookup), (out,), {**sizes_of("d", shape), "n": op.out.shape[dim]}, frozenset({f"d{dim}"}), (frozenset({0}),))


def gather(op: Op) -> Signature | None:
    """gather and take_along_dim: other dims may be cut where index and source have the same size."""
    if op.arguments["dim"] is None:
        return None
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    base = tuple(
        d if i != dim and shape[i] == other[i] else ((f"x{i}",),) if n > 1 else () for i, (d, n) in enumerate(zip(named("d", shape), shape))
    )
    out = tuple(((f"d{i}",),) if n > 1 and i != dim and shape[i] == n else ((f"n{i}",),) if n > 1 else () for i, n in enumerate(other))
    sizes = {**sizes_of("d", shape), **sizes_of("x", shape), **sizes_of("n", other)}
    fixed = frozenset(n for n in sizes if n[0] in "xn")
    return Signature((base, out), (out,), sizes, fixed, (frozenset({0}),))


def scatter(op: Op) -> Signature | None:
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    if any(shape[i] != other[i] for i in range(len(shape)) if i != dim) or len(op.infos) > 3:
        return None
    base = named("d", shape)
    at = tuple((((f"n{i}",),) if n > 1 else ()) if i == dim else base[i] for i, n in enumerate(other))
    inputs = [base, at, *([at] if len(op.infos) > 2 else [])]
    linear = (frozenset({0, 2}),) if op.name == "scatter_add" else ()
    return Signature(tuple(inputs), (base,), {**sizes_of("d", shape), f"n{dim}": other[dim]}, frozenset({f"d{dim}", f"n{dim}"}), linear)


def index_add(op: Op) -> Signature:
    """Rows added to a tensor at places along one dim, which is needed whole."""
    dim, shape = op.dim(), op.infos[0].shape
    base, count = named("d", shape), op.infos[2].shape[dim] if shape else 1
    rows = (("n",),) if count > 1 else ()
    inputs = (base, (rows,) if op.shapes[1] else (), (*base[:dim], rows, *base[dim + 1 :]))
    return Signature(inputs, (base,), {**sizes_of("d", shape), "n": count}, frozenset({f"d{dim}", "n"}), (frozenset({0, 2}),))


def differences(op: Op) -> Signature:
    """diff: along one dim, which is needed whole, as is what is put before and after."""
    dim, shape = op.dim(), op.infos[0].shape
    base = named("d", shape)

    def along(prefix: str, n: int) -> Dims:
        return (*base[:dim], ((f"{prefix}{dim}",),) if n > 1 else (), *base[dim + 1 :])

    inputs = [base, *(along(f"x{i}_", other[dim]) for i, other in enumerate(op.shapes[1:]))]
    sizes = {**sizes_of("d", shape), f"n{dim}": op.out.shape[dim]}
    sizes |= {f"x{i}_{dim}": other[dim] for i, other in enumerate(op.shapes[1:])}
    cut = frozenset(name for name in sizes if name[0] in "xn" or name == f"d{dim}")
    return Signature(tuple(inputs), (along("n", op.out.shape[dim]),), sizes, cut)


def written(op: Op) -> Signature:
    """slice_scatter, select_scatter: one tensor with a part of one dim, which is needed whole, replaced by another."""
    dim, shape = op.dim(), op.infos[0].shape
    base, part = named("d", shape), op.infos[1].shape
    new = (((f"n{dim}",),) if part[dim] > 1 else ()) if len(part) == len(shape) else None
    source = (*base[:dim], *([new] if new is not None else []), *base[dim + 1 :])
    sizes = sizes_of("d", shape) | ({f"n{dim}": part[dim]} if new else {})
    return Signature((base, source), (base,), sizes, frozenset({f"d{dim}", f"n{dim}"}), (frozenset({0, 1}),))


def one_hot(op: Op) -> Signature:
    shape = op.infos[0].shape
    base = named("d", shape)
    return Signature((base,), ((*base, (("classes",),)),), {**sizes_of("d", shape), "classes": op.out.shape[-1]}, frozenset({"classes"}))


def transposed_convolution(op: Op) -> Signature | None:
    rank = len(op.infos[0].shape) - 2
    if rank < 1 or int(op.arguments["groups"]) > 1:
        return None
    space, kernel, out = (" ".join(f"[{name}{i}]" for i in range(rank)) for name in "skr")
    return row(f"b i {space}, i o {kernel}, o -> b o {out}", linear=((0, 2), (1, 2)))(op)


def _by_position(op: Op) -> bool:
    """Whether a convolution along one dim is a product at every position by itself."""
    stride, padding = (op.arguments.get(name) for name in ("stride", "padding"))
    plain = [list(value) if isinstance(value, (list, tuple)) else value for value in (stride, padding)]
    return op.infos[1].shape[2:] == (1,) and plain[0] in ([1], 1) and plain[1] in ([0], 0)


def convolution(op: Op) -> Signature | None:
    if op.arguments.get("transposed"):
        return transposed_convolution(op)
    groups = int(op.arguments.get("groups", 1))
    rank = len(op.infos[0].shape) - 2
    if rank < 1:
        return None
    space = " ".join(f"[s{i}]" for i in range(rank))
    kernel = " ".join(f"[k{i}]" for i in range(rank))
    out = " ".join(f"[r{i}]" for i in range(rank))
    if _by_position(op):
        space = out = "s0"
    channels = op.infos[0].shape[1]
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


def grouped_mm(op: Op) -> Signature | None:
    """Rows that a dispatch sorted: a rank's tokens have its rows, and the ends of every expert's rows add up.

    Of rows that a model sorted itself a rank's part may be of some experts only, and their ends are those of all: they are needed whole.
    """
    if not op.infos[0].rows:
        return row("[n] i, [x] i o, [x] -> [n] o", linear=((0,), (1,)))(op)
    return row("n i, [x] i o, [x] -> n o", linear=((0,), (1,)), counts=((2, "n"),))(op)


def row_expert(op: Op) -> Signature | None:
    rest = " ".join(f"[d{i}]" for i in range(len(op.infos[0].shape) - 1))
    return row(f"n {rest}, [x] -> n", counts=((1, "n"),))(op)


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


def created(op: Op) -> Signature:
    """Operators that make a tensor of one value from a shape alone can make any part of it."""
    shape = op.out.shape
    inputs = [tuple(() for _ in i.shape) if len(i.shape) != len(shape) or i.shape != shape else named("d", shape) for i in op.infos]
    return Signature(tuple(inputs), (named("d", shape),), sizes_of("d", shape))


def whole(op: Op) -> Signature:
    """Operators that look at all of a value, and give none of it back."""
    names = [named(f"v{i}_", shape) for i, shape in enumerate(op.shapes)]
    sizes = {name: n for i, shape in enumerate(op.shapes) for name, n in sizes_of(f"v{i}_", shape).items()}
    return Signature(tuple(names), tuple(tuple(() for _ in o.shape) for o in op.outs if o is not None), sizes, frozenset(sizes))


def searched(op: Op) -> Signature:
    """topk, sort, argsort: along one dim, which is needed whole."""
    shape = op.infos[0].shape
    dim = op.dim() if "dim" in op.arguments else len(shape) - 1
    base = named("d", shape)
    new = op.out.shape[dim]
    out = tuple((((f"n{i}",),) if new > 1 else ()) if i == dim else d for i, d in enumerate(base))
    return Signature((base,), (out,) * len(op.outs), {**sizes_of("d", shape), f"n{dim}": new}, frozenset({f"d{dim}", f"n{dim}"}))


def dropout(op: Op) -> Signature:
    shape = op.infos[0].shape
    base = named("d", shape)
    return Signature((base,), (base,) * len(op.outs), sizes_of("d", shape))


def collective(op: Op) -> Signature:
    """A conversion on another axis, already written out. It moves dims whole; one that it cuts or joins evenly can be cut inside of a part.

    heads [8 4] on 2 ranks   s_to_s   [4 8]       the 4 heads that stay here may be cut again, and the 8 before it alike: 2 of each 4
    """
    plain = _evenly(op)
    shapes = [i.shape for i in op.infos]
    inputs, outs, sizes, fixed = [], [], {}, []
    for k, shape in enumerate(shapes):
        out = op.outs[min(k, len(op.outs) - 1)]
        assert out is not None
        sizes.update({f"d{k}_{i}": min(n, m) for i, (n, m) in enumerate(zip(shape, out.shape, strict=True))})
        sizes.update({f"n{k}_{i}": m for i, m in enumerate(out.shape)} | {f"c{k}_{i}": n for i, n in plain.items()})
        before: list[Dim] = []
        after: list[Dim] = []
        for i, (n, m) in enumerate(zip(shape, out.shape, strict=True)):
            own = (f"d{k}_{i}",)
            parts = (f"c{k}_{i}", *own)
            if i in plain and min(n, m) > 1:
                fixed.append(parts[0])
                before.append((parts if n > m else own,))
                after.append((parts if m > n else own,))
            elif i in plain or n != m or i in _dims_of(op):
                sizes[own[0]] = n
                fixed += [own[0], f"n{k}_{i}"]
                before.append((own,) if n > 1 else ())
                after.append(((f"n{k}_{i}",),) if m > 1 else ())
            else:
                before.append((own,) if n > 1 else ())
                after.append((own,) if n > 1 else ())
        inputs.append(tuple(before))
        outs.append(tuple(after))
    return Signature(tuple(inputs), tuple(outs[: len(op.outs)]), sizes, frozenset(fixed), (frozenset(range(len(shapes))),))


def _layouts(op: Op) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """(dim, repeat, segments) of the shard before a conversion, of the one after it, or of both."""
    args = op.node.args[1:] if len(op.infos) == 1 else ()
    return [args[at : at + 3] for at in range(0, len(args), 3)]  # type: ignore[misc]


def _dims_of(op: Op) -> set[int]:
    return {dim for dim, _, _ in _layouts(op)}


def _evenly(op: Op) -> dict[int, int]:
    """Dims that a conversion cuts or joins in as many contiguous parts as there are ranks -> how many."""
    found = {}
    for dim, repeat, segments in _layouts(op):
        size = int(op.arguments["size"])
        if repeat == 1 and len(segments) == 1 and segments[0][0] % size == 0 and op.infos[0].shape[dim] != op.out.shape[dim]:
            found[dim] = size
    return found
