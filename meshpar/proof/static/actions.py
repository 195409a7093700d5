"""What each operator does to the dims of its operands: written from what it computes, not from what the solver may do with it.

    linear       "... i, o i, o -> ... o"       linear in (x, bias) and in (w, bias)
    softmax      every dim by itself, but for the one that it goes along

Here only meaning counts: a dim is `whole` where a part of it would give something else than that part of the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Info
from meshpar.graph.op import Op
from meshpar.graph.operators import operator_of
from meshpar.sharding.notation import Dims, bind


@dataclass(frozen=True)
class OperatorAction:
    """An operator on operands of certain shapes: the dims of operands and results by name."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims | None, ...]
    """None: nothing, a result without elements."""
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    """Sets of operands in which it is linear together, the others being constant."""
    additive: bool = False
    """Whether results for the parts of a dim that no result has add up to that of the whole, also where it is not linear."""
    counts: Mapping[int, str] = field(default_factory=dict)
    """Operands that count along a name: where it is cut each rank has counts of its own."""


Read = Callable[[Op], "OperatorAction | None"]


def action_of(op: Op) -> OperatorAction | None:
    """What a call does; None for an operator that is not known."""
    found = _ACTIONS.get(op.name)
    if found is None:
        pointwise = torch.Tag.pointwise in getattr(op.node.target, "tags", ())
        found = elementwise() if pointwise or operator_of(op.node.target).kind == "elementwise" else None
    try:
        return None if found is None else found(op)
    except (ValueError, IndexError, KeyError, TypeError):
        return None  # called in a way that the text does not speak of


# -- texts -------------------------------------------------------------------------------------------------------------------------------


def text(rule: str, *linear: Iterable[int], additive: bool = False, counts: Mapping[int, str] | None = None) -> Read:
    """An operator in the notation of `sharding.notation`; names in brackets are whole."""

    def read(op: Op) -> OperatorAction:
        bound = bind(rule, op.shapes, [o.shape for o in op.outs if o is not None])
        groups = tuple(frozenset(g) & frozenset(range(len(op.infos))) for g in linear)
        return OperatorAction(bound.inputs, bound.outputs, bound.sizes, bound.fixed, groups, additive, counts or {})

    return read


def chosen(write: Callable[[Op], str | None], *linear: Iterable[int], additive: bool = False) -> Read:
    """The same where the text depends on the call."""

    def read(op: Op) -> OperatorAction | None:
        rule = write(op)
        return None if rule is None else text(rule, *linear, additive=additive)(op)

    return read


def _named(shape: Iterable[int], prefix: str = "d") -> Dims:
    return tuple(((f"{prefix}{i}",),) if n > 1 else () for i, n in enumerate(shape))


def _sizes(shape: Iterable[int], prefix: str = "d") -> dict[str, int]:
    return {f"{prefix}{i}": n for i, n in enumerate(shape) if n > 1}


# -- element by element ------------------------------------------------------------------------------------------------------------------


def elementwise(linear: Callable[[Op], list[set[int]]] | None = None) -> Read:
    """Dims are aligned from the right; one of size 1 meets all of the other operand's."""

    def read(op: Op) -> OperatorAction:
        shape = op.out.shape
        names = _named(shape)
        inputs = []
        for own in op.shapes:
            shift = len(shape) - len(own)
            inputs.append(tuple(names[i + shift] if i + shift >= 0 and n == shape[i + shift] else () for i, n in enumerate(own)))
        groups = tuple(frozenset(g) for g in (linear(op) if linear else ()))
        return OperatorAction(tuple(inputs), (names,) * len(op.outs), _sizes(shape), frozenset(), groups)

    return read


def _both(op: Op) -> list[set[int]]:
    return [set(range(len(op.infos)))] if len(op.infos) == 2 or op.node.args[0] is op.node.args[-1] else []


def _either(op: Op) -> list[set[int]]:
    return [{i} for i in range(len(op.infos))] if op.node.args[0] is not op.node.args[-1] else []


def _first(op: Op) -> list[set[int]]:
    return [{0}]


def _numerator(op: Op) -> list[set[int]]:
    return [{0}] if isinstance(op.node.args[0], fx.Node) and op.arguments.get("rounding_mode") is None else []


def _without_loss(op: Op) -> list[set[int]]:
    a, b = op.infos[0].dtype, op.out.dtype
    widens = (b.is_floating_point or b.is_complex or not a.is_floating_point) and b.itemsize >= a.itemsize
    return [{0}] if a == b or (widens and b != torch.bool) else []


def _branches(op: Op) -> list[set[int]]:
    return [{1, 2}] if len(op.infos) == 3 else []


# -- along dims --------------------------------------------------------------------------------------------------------------------------


def along(dims: Callable[[Op], Iterable[int]], *, linear: bool = False) -> Read:
    """Same shape in and out; the named dims go together."""

    def read(op: Op) -> OperatorAction:
        shape = op.infos[0].shape
        names = _named(shape)
        whole = frozenset(f"d{i}" for i in dims(op))
        outs = tuple(
            tuple(d if o is not None and i < len(o.shape) and o.shape[i] == shape[i] else () for i, d in enumerate(names)) for o in op.outs
        )
        inputs = (names, *((() for _ in i.shape) for i in op.infos[1:]))
        return OperatorAction(tuple(tuple(one) for one in inputs), outs, _sizes(shape), whole, (frozenset({0}),) if linear else ())

    return read


def _dim(op: Op) -> list[int]:
    return [op.dim()]


def reduction(*, linear: bool = False, whole: bool = True, additive: bool = False) -> Read:
    """Dims that go, or become one. `whole`: whether a part of them tells nothing of the rest."""

    def read(op: Op) -> OperatorAction:
        shape, gone = op.infos[0].shape, set(op.dims())
        names = _named(shape)
        kept = tuple(() if i in gone else d for i, d in enumerate(names))
        outs = tuple(
            kept if o is not None and len(o.shape) == len(shape) else tuple(d for i, d in enumerate(names) if i not in gone)
            for o in op.outs
        )
        fixed = frozenset(f"d{i}" for i in gone) if whole else frozenset()
        return OperatorAction((names,), outs, _sizes(shape), fixed, (frozenset({0}),) if linear else (), additive)

    return read


def _trailing(op: Op) -> OperatorAction:
    """Norms over trailing dims, with a weight and a bias for each of their elements."""
    shape, count = op.infos[0].shape, len(op.arguments["normalized_shape"])
    names = _named(shape)
    lead = len(shape) - count
    short = tuple(d if i < lead else () for i, d in enumerate(names))
    outs = (names, *[short] * (len(op.outs) - 1))
    whole = frozenset(f"d{i}" for i in range(lead, len(shape)))
    return OperatorAction((names, *[names[lead:]] * (len(op.infos) - 1)), outs, _sizes(shape), whole)


def _of_channels(op: Op) -> OperatorAction:
    """Batch norm: of statistics that are given, each element by itself; else over all but the channels."""
    shape = op.infos[0].shape
    names, training = _named(shape), bool(op.arguments.get("training", False))
    whole = frozenset(f"d{i}" for i in range(len(shape)) if i != 1) if training else frozenset()
    by_shape = {shape: names, shape[1:2]: names[1:2]}
    outs = tuple(() if o is None else None if 0 in o.shape else by_shape.get(o.shape, ()) for o in op.outs)
    return OperatorAction((names, *[names[1:2]] * (len(op.infos) - 1)), outs, _sizes(shape), whole)


def _of_groups(op: Op) -> str:
    space = " ".join(f"[s{i}]" for i in range(len(op.shapes[0]) - 2))
    return f"b [c] {space}, [c], [c] -> b [c] {space}"


# -- products ----------------------------------------------------------------------------------------------------------------------------


def _matmul(op: Op) -> str:
    a, b = len(op.shapes[0]), len(op.shapes[1])
    left = "k" if a == 1 else "i k" if a == 2 else "... i k"
    right = "k" if b == 1 else "k j" if b == 2 else "... k j"
    lead = "..." if max(a, b) > 2 else ""
    return f"{left}, {right} -> {lead} {'i' if a > 1 else ''} {'j' if b > 1 else ''}"


def _plus(product: str, total: str) -> Callable[[Op], str]:
    """Something added, broadcast from the right, to a product."""
    return lambda op: f"{' '.join(total.split()[len(total.split()) - len(op.shapes[0]) :])}, {product} -> {total}"


def _einsum(op: Op) -> str | None:
    left, arrow, out = str(op.arguments["equation"]).replace(" ", "").partition("->")
    terms = [re.findall(r"\.\.\.|[A-Za-z]", term) for term in left.split(",")]
    if not arrow or any(len(set(term)) < len(term) for term in terms):
        return None  # a diagonal
    return f"{', '.join(' '.join(term) for term in terms)} -> {' '.join(re.findall(r'[.]{3}|[A-Za-z]', out))}"


def _each_operand(read: Read) -> Read:
    def linear(op: Op) -> OperatorAction | None:
        found = read(op)
        return found and replace(found, linear=tuple(frozenset({i}) for i in range(len(op.infos))))

    return linear


def attention_text(op: Op) -> str | None:
    """Every query with all keys, of its sample and head. A causal one by position: then queries go together."""
    q, k = op.shapes[0], op.shapes[1]
    s = "[s]" if op.arguments.get("is_causal") or op.arguments.get("window") else "s"
    if len(q) != 4 or len(k) != 4:
        mask = f"... {s} [t]"
        return f"... {s} [e], ... [t] [e], ... [t] [f], {mask} -> ... {s} [f]"
    grouped = k[1] != q[1] and k[1] > 1
    heads = "(k g)" if grouped else "k"
    mask = ""
    if len(op.shapes) > 3:
        shape = op.shapes[3]
        of_heads = "[m]" if grouped else "k"
        mask = ", " + " ".join(["b", of_heads, s, "[t]"][4 - len(shape) :])
    return f"b {heads} {s} [e], b k [t] [e], b k [t] [f]{mask} -> b {heads} {s} [f]"


def scored_text(op: Op) -> str | None:
    """The same with any number of operands that are added to scores, or multiply or hide them."""
    s = "[s]" if op.arguments.get("is_causal") or op.arguments.get("window") else "s"
    grouped = op.shapes[1][1] != op.shapes[0][1] and op.shapes[1][1] > 1
    heads, more = "(k g)" if grouped else "k", ""
    for shape in op.shapes[3:]:
        terms = ["b", heads if shape[-3:-2] == op.shapes[0][1:2] else "k", s, "[t]"]
        more += ", " + " ".join(terms[4 - len(shape) :])
    return f"b {heads} {s} [e], b k [t] [e], b k [t] [f]{more} -> b {heads} {s} [f]"


def _convolution(op: Op) -> str | None:
    space = len(op.shapes[0]) - 2
    if space < 1:
        return None
    groups, transposed = int(op.arguments.get("groups", 1)), op.arguments.get("transposed") or "transpose" in op.name
    s, k, r = (" ".join(f"[{c}{i}]" for i in range(space)) for c in "skr")
    if transposed:
        return f"b i {s}, i o {k}, o -> b o {r}" if groups == 1 else None
    if (
        op.shapes[1][2:] == (1,) * space and op.out.shape[2:] == op.shapes[0][2:] and not op.arguments.get("left")
    ):  # each position by itself
        s = r = " ".join(f"s{i}" for i in range(space))
    if groups == 1:
        return f"b i {s}, o i {k}, o -> b o {r}"
    if groups == op.shapes[0][1] == op.shapes[1][0]:
        return f"b c {s}, c [u] {k}, c -> b c {r}"
    return f"b [i] {s}, [o] [u] {k}, [o] -> b [o] {r}"


# -- look-ups and writes -----------------------------------------------------------------------------------------------------------------


def _index(op: Op) -> OperatorAction | None:
    given = list(op.arguments["indices"])
    places = [i for i, a in enumerate(given) if a is not None]
    if not places or places != list(range(places[0], places[-1] + 1)) or any(i.dtype == torch.bool for i in op.infos[1:]):
        return None
    shape, rank = op.infos[0].shape, max(len(i.shape) for i in op.infos[1:])
    new = op.out.shape[places[0] : places[0] + rank]
    base, at = _named(shape), _named(new, "n")
    inputs = [tuple(at[rank - len(i.shape) + k] if n > 1 else () for k, n in enumerate(i.shape)) for i in op.infos[1:]]
    out = (*base[: places[0]], *at, *base[places[-1] + 1 :])
    return OperatorAction((base, *inputs), (out,), _sizes(shape) | _sizes(new, "n"), frozenset(f"d{i}" for i in places), (frozenset({0}),))


def _index_select(op: Op) -> OperatorAction:
    dim, shape = op.dim(), op.infos[0].shape
    base, at = _named(shape), _named([op.out.shape[dim]], "n")
    index = at if op.infos[1].shape else ()
    return OperatorAction((base, index), ((*base[:dim], *at, *base[dim + 1 :]),), _sizes(shape) | _sizes([op.out.shape[dim]], "n"),
                  frozenset({f"d{dim}"}), (frozenset({0}),))  # fmt: skip


def _gather(op: Op) -> OperatorAction | None:
    if op.arguments["dim"] is None:
        return None
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    base, at = _named(shape), _named(other, "n")
    same = [i != dim and shape[i] == other[i] for i in range(len(shape))]
    index = tuple(base[i] if same[i] else at[i] for i in range(len(other)))
    whole = frozenset(n for i in range(len(shape)) if not same[i] for n in ([f"d{i}"] if i == dim else [f"d{i}", f"n{i}"]))
    return OperatorAction((base, index), (index,), _sizes(shape) | _sizes(other, "n"), whole, (frozenset({0}),))


def _scatter(op: Op) -> OperatorAction | None:
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    if any(shape[i] != other[i] for i in range(len(shape)) if i != dim):
        return None
    base = _named(shape)
    at = tuple(_named(other, "n")[i] if i == dim else d for i, d in enumerate(base))
    groups = (frozenset({0, 2}),) if op.name == "scatter_add" else ()
    return OperatorAction(
        (base, *[at] * (len(op.infos) - 1)), (base,), _sizes(shape) | _sizes(other, "n"), frozenset({f"d{dim}", f"n{dim}"}), groups
    )


def _written(op: Op) -> OperatorAction:
    """slice_scatter, select_scatter: a part of one dim replaced."""
    dim, shape, part = op.dim(), op.infos[0].shape, op.infos[1].shape
    base = _named(shape)
    fresh = _named(part, "n")[dim : dim + 1] if len(part) == len(shape) else ()
    source = (*base[:dim], *fresh, *base[dim + 1 :])
    return OperatorAction(
        (base, source), (base,), _sizes(shape) | _sizes(part, "n"), frozenset({f"d{dim}", f"n{dim}"}), (frozenset({0, 1}),)
    )


def _index_add(op: Op) -> OperatorAction:
    dim, shape = op.dim(), op.infos[0].shape
    base, rows = _named(shape), _named([op.infos[2].shape[dim]], "n")
    inputs = (base, rows if op.shapes[1] else (), (*base[:dim], *rows, *base[dim + 1 :]))
    return OperatorAction(
        inputs, (base,), _sizes(shape) | _sizes([op.infos[2].shape[dim]], "n"), frozenset({f"d{dim}", "n0"}), (frozenset({0, 2}),)
    )


def _padded(op: Op) -> OperatorAction:
    shape = op.infos[0].shape
    changed = {len(shape) - 1 - place // 2 for place, amount in enumerate(op.arguments["pad"]) if amount}
    base, new = _named(shape), _named(op.out.shape, "n")
    zero = op.arguments.get("mode", "constant") == "constant" and not op.arguments.get("value")
    out = tuple(new[i] if i in changed else d for i, d in enumerate(base))
    whole = frozenset(f"{p}{i}" for i in changed for p in "dn")
    return OperatorAction((base,), (out,), _sizes(shape) | _sizes(op.out.shape, "n"), whole, (frozenset({0}),) if zero else ())


def _one_hot(op: Op) -> OperatorAction:
    shape, classes = op.infos[0].shape, op.out.shape[-1:]
    names = _named(shape)
    return OperatorAction((names,), ((*names, *_named(classes, "c")),), _sizes(shape) | _sizes(classes, "c"), frozenset({"c0"}))


def _searched(op: Op) -> OperatorAction:
    shape = op.infos[0].shape
    dim = op.dim() if "dim" in op.arguments else len(shape) - 1
    base, new = _named(shape), _named(op.out.shape, "n")
    out = tuple(new[i] if i == dim else d for i, d in enumerate(base))
    return OperatorAction((base,), (out,) * len(op.outs), _sizes(shape) | _sizes(op.out.shape, "n"), frozenset({f"d{dim}", f"n{dim}"}))


def _filled(op: Op) -> OperatorAction:
    """zeros_like and its kind: the shape of the example alone counts."""
    names = _named(op.out.shape)
    inputs = tuple(names if i.shape == op.out.shape else tuple(() for _ in i.shape) for i in op.infos)
    return OperatorAction(inputs, (names,), _sizes(op.out.shape))


# -- losses ------------------------------------------------------------------------------------------------------------------------------


def cross_entropy_text(op: Op) -> str | None:
    """Classes go together; samples by themselves, and summed unless each has a result."""
    reduction, shape = op.arguments.get("reduction", 1), op.infos[0].shape
    if op.infos[1].dtype.is_floating_point or reduction == 1:
        return None
    rest = " ".join(f"d{i}" for i in range(len(shape) - 2))
    lead = "n" if len(shape) > 1 else ""
    return f"{lead} [v] {rest}, {lead} {rest}, [w] -> {f'{lead} {rest}' if reduction == 0 else ''}"


def _loss_by_element(op: Op) -> OperatorAction | None:
    return elementwise()(op) if op.arguments["reduction"] == 0 else None


def _windows(op: Op) -> str | None:
    space = next((int(c) for c in op.name if c in "123"), 0)
    lead = " ".join(f"l{i}" for i in range(len(op.out.shape) - space))
    s, r = (" ".join(f"[{c}{i}]" for i in range(space)) for c in "sr")
    return f"{lead} {s} -> " + ", ".join([f"{lead} {r}"] * len(op.outs)) if space else None


def _recurrent(op: Op) -> OperatorAction | None:
    a, shape = op.arguments, op.infos[0].shape
    if "batch_sizes" in a or len(shape) != 3 or (a["dropout"] and a["train"]):
        return None
    at = 0 if a["batch_first"] else 1
    sample = _named([shape[at]], "b")[0]
    states = len(a["hx"]) if isinstance(a["hx"], (list, tuple)) else 1
    sequence = tuple(sample if i == at else () for i in range(3))
    weights = [tuple(() for _ in info.shape) for info in op.infos[1 + states :]]
    return OperatorAction(
        (sequence, *[((), sample, ())] * states, *weights), (sequence, *[((), sample, ())] * states), _sizes([shape[at]], "b")
    )


def _prelu(op: Op) -> OperatorAction:
    names = _named(op.infos[0].shape)
    slope = tuple(names[1] if n > 1 else () for n in op.infos[1].shape)
    return OperatorAction((names, slope), (names,), _sizes(op.infos[0].shape))


def _halves(op: Op) -> OperatorAction:
    """glu: two halves of a dim meet, element by element."""
    dim, out = op.dim(), op.out.shape
    names = _named(out)
    both = (("half", *names[dim][0]),) if names[dim] else (("half",),)
    before = (*names[:dim], both, *names[dim + 1 :])
    return OperatorAction((before,), (names,), _sizes(out) | {"half": 2}, frozenset({"half"}))


def _similar(op: Op) -> OperatorAction:
    shape = torch.broadcast_shapes(*op.shapes)
    dim = int(op.arguments["dim"]) % len(shape)
    base = _named(shape)
    inputs = tuple(tuple(d if n > 1 else () for d, n in zip(base[len(shape) - len(own) :], own, strict=True)) for own in op.shapes)
    return OperatorAction(inputs, ((*base[:dim], *base[dim + 1 :]),), _sizes(shape), frozenset({f"d{dim}"}))


def _magnitude(op: Op) -> OperatorAction:
    shape, dim = op.infos[0].shape, op.dim()
    base = _named(shape)
    whole = frozenset(f"d{i}" for i in range(len(shape)) if i != dim)
    return OperatorAction((base, tuple(d if i == dim else () for i, d in enumerate(base))), (base,), _sizes(shape), whole)


def _row_expert(op: Op) -> OperatorAction:
    rest = " ".join(f"[d{i}]" for i in range(len(op.infos[0].shape) - 1))
    found = text(f"n {rest}, [x] -> n", counts={1: "n"})(op)
    assert found is not None
    return found


def either(pointwise: Read, other: Read) -> Read:
    """By whether torch's tag says that this form treats every element by itself."""
    return lambda op: (pointwise if torch.Tag.pointwise in getattr(op.node.target, "tags", ()) else other)(op)


def _matrix(op: Op) -> list[int]:
    return [op.dim()] if "dim" in op.arguments else [len(op.out.shape) - 1, len(op.out.shape) - 2]


def _rows(names: str, read: Read) -> dict[str, Read]:
    return dict.fromkeys(names.split(), read)


_ACTIONS: dict[str, Read] = {
    **_rows("linear", text("... i, o i, o -> ... o", (0, 2), (1, 2))),
    **_rows("mm", text("i k, k j -> i j", (0,), (1,))),
    **_rows("bmm", text("b i k, b k j -> b i j", (0,), (1,))),
    **_rows("mv", text("i k, k -> i", (0,), (1,))),
    **_rows("dot", text("k, k -> ", (0,), (1,))),
    **_rows("outer", text("i, j -> i j", (0,), (1,))),
    **_rows("matmul", chosen(_matmul, (0,), (1,))),
    **_rows("addmm", chosen(_plus("n i, i o", "n o"), (0, 1), (0, 2))),
    **_rows("baddbmm", chosen(_plus("b i k, b k j", "b i j"), (0, 1), (0, 2))),
    **_rows("bilinear", text("... i, ... j, o i j, o -> ... o", (0, 3), (1, 3), (2, 3))),
    **_rows("einsum", _each_operand(chosen(_einsum))),
    **_rows("cdist", text("... i [c], ... j [c] -> ... i j")),
    **_rows("scaled_dot_product_attention meshpar.ops.halo.windowed_attention", chosen(attention_text, (2,))),
    **_rows("meshpar.ops.scored.scored_attention", chosen(scored_text, (2,))),
    **_rows("convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", chosen(_convolution, (0, 2), (1, 2))),
    **_rows("meshpar.ops.convolution.convolved", chosen(_convolution, (0, 2), (1, 2))),
    **_rows("embedding", text("[v] c, ... -> ... c", (0,))),
    **_rows("index", _index),
    **_rows("index_select", _index_select),
    **_rows("gather take_along_dim", _gather),
    **_rows("scatter scatter_add", _scatter),
    **_rows("index_add", _index_add),
    **_rows("slice_scatter select_scatter", _written),
    **_rows("pad constant_pad_nd", _padded),
    **_rows("one_hot", _one_hot),
    **_rows("layer_norm native_layer_norm rms_norm _fused_rms_norm", _trailing),
    **_rows("_native_batch_norm_legit_functional _native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm "
            "batch_norm", _of_channels),
    **_rows("group_norm", chosen(_of_groups)),
    **_rows("_weight_norm", _magnitude),
    **_rows("softmax _softmax _safe_softmax log_softmax _log_softmax cumprod logcumsumexp cummax cummin", along(_dim)),
    **_rows("cumsum meshpar.ops.shifts.shifted", along(_dim, linear=True)),
    **_rows("tril triu", along(_matrix, linear=True)),
    **_rows("flip roll", along(lambda op: op.dims("dims"), linear=True)),
    **_rows("fft_fftn", along(lambda op: op.dims(), linear=True)),
    **_rows("glu", _halves),
    **_rows("prelu", _prelu),
    **_rows("lstm gru rnn_tanh rnn_relu", _recurrent),
    **_rows("lstm_cell", text("b [i], b [h], b [h], [g] [i], [g] [h], [g], [g] -> b [h], b [h]")),
    **_rows("gru_cell rnn_tanh_cell rnn_relu_cell", text("b [i], b [h], [g] [i], [g] [h], [g], [g] -> b [h]")),
    **_rows("cosine_similarity", _similar),
    **_rows("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
            "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d "
            "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d", chosen(_windows)),
    **_rows("im2col", text("... c [h] [w] -> ... (c k) [l]", (0,))),
    **_rows("col2im", text("... (c k) [l] -> ... c [h] [w]", (0,))),
    **_rows("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", chosen(cross_entropy_text, additive=True)),
    **_rows("mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits",
            _loss_by_element),
    **_rows("meshpar.ctc_loss", chosen(lambda op: "[t] b [c], b [s], b, b -> b" if len(op.shapes[1]) == 2 else None)),
    **_rows("sum", reduction(linear=True, whole=False)),
    **_rows("mean", reduction(linear=True)),
    **_rows("nansum count_nonzero", reduction(whole=False, additive=True)),
    **_rows("amax amin any all logsumexp var std var_mean std_mean prod kthvalue mode argmax argmin linalg_vector_norm norm median",
            reduction()),
    **_rows("max min", either(elementwise(), reduction())),
    **_rows("topk sort argsort", _searched),
    **_rows("add sub subtract", elementwise(_both)),
    **_rows("rsub", elementwise(_both)),
    **_rows("mul multiply", elementwise(_either)),
    **_rows("div divide true_divide", elementwise(_numerator)),
    **_rows("neg positive clone contiguous alias detach lift_fresh_copy", elementwise(_first)),
    **_rows("where", elementwise(_branches)),
    **_rows("_to_copy to type_as", elementwise(_without_loss)),
    **_rows("masked_fill copy complex polar log_sigmoid hardswish __and__ __or__ __xor__ __lshift__ __rshift__ greater greater_equal less "
            "less_equal broadcast_tensors", elementwise()),
    **_rows("dropout native_dropout bernoulli", elementwise()),
    **_rows("rand_like randn_like zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty", _filled),
    **_rows("view_as_complex", text("... [c] -> ...", (0,))),
    **_rows("view_as_real", text("... -> ... [c]", (0,))),
    **_rows("meshpar.dispatch", text("t [h], t [k] -> (t k) [h], [x], (t k)", additive=True)),
    **_rows("meshpar.row_expert", _row_expert),
    **_rows("meshpar.grouped_mm", text("n i, [x] i o, [x] -> n o", (0,), (1,), counts={2: "n"})),
    **_rows("meshpar.combine", text("(t k) h, (t k), t [k] -> t h", (0,), (2,))),
}  # fmt: skip
"""Operators by name, as far as they are known."""


def elements(info: Info) -> int:
    """How many elements a tensor has."""
    return prod(info.shape)


def literal(value: Any) -> Any:
    """An argument without its nodes: equal for calls that say the same of the same operands."""
    if isinstance(value, fx.Node):
        return fx.Node
    if isinstance(value, (list, tuple)):
        return tuple(literal(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, literal(v)) for k, v in value.items()))
    return value
