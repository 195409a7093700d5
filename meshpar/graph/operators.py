"""The table of operators: one row for each, or for each family, with all that is known of it.

    OPERATORS["linear"]     kind product, rule "... i, o i, o -> ... o", factors 0 and 1, its FLOPs, ...

Solver, lowering, memory, recompute, cost, stages and denominators read the row. A new operator is a row here, or one call of `add_rule`.
An operator without a row is known by torch's tags (element by element; draws random numbers), or runs correctly on invariant values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import fx

import meshpar.ops.experts  # noqa: F401  (registers meshpar::grouped_mm)
from meshpar._torch import OpOverload
from meshpar._torch import draws as tagged_as_drawing
from meshpar.graph import flops as count
from meshpar.graph.flops import Flops
from meshpar.graph.op import op_name
from meshpar.sharding import indexing, layers, local, rules
from meshpar.sharding.conversions import CONVERSIONS
from meshpar.sharding.local import Localise
from meshpar.sharding.notation import bind
from meshpar.sharding.rules import row
from meshpar.sharding.views import RULES as VIEW_RULES
from meshpar.sharding.views import Rule, fixed_dims

OperatorKind = Literal[
    "product", "attention", "convolution", "lookup", "norm", "softmax", "loss", "label loss", "reduction", "scan", "search", "window",
    "recurrent", "view", "copy", "join", "write", "elementwise", "random", "created", "experts", "collective", "other",
]  # fmt: skip
Saves = Literal["operands", "others", "results", "operands and results", "indices", "nothing"]
MatrixDim = Literal["outputs", "inputs", "rows", "features", "experts"]
ARITHMETIC: frozenset[OperatorKind] = frozenset({"product", "attention", "convolution"})
"""Kinds bound by arithmetic: worth keeping when the rest is computed again."""


@dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """What is known of an operator, whatever it is called with."""

    kind: OperatorKind = "other"
    rule: Rule | None = None
    """What it allows: the signature of a call. None: it runs on invariant values."""
    claim: str | None = None
    """The rule as `add_rule` was given it, which is tried before it is used (`compile.claimed`)."""
    view: bool = False
    """Whether its result is the memory of its operand (also where a rare one has to copy): it moves nothing and keeps nothing."""
    saves: Saves = "operands"
    """What its backward reads. "others": of every operand the other one, so nothing where there is only one; "indices": the operands that
    need no gradient. Operands, unless known better."""
    flops: Flops | None = None
    """Floating-point operations of a call, forward; None: too few to count."""
    factors: tuple[int, int] | None = None
    """Of a product whose backward reads its factors alone and gives each a gradient of its own: their places among the arguments."""
    matrix: tuple[MatrixDim, ...] = ()
    """What the dims of the parameter that it is used with are to it."""
    draws: bool | None = None
    """Whether it draws random numbers; None: what torch's tag says."""
    only_if: tuple[str, ...] = ()
    """Arguments of which none may be zero or False for it to draw."""
    local: Localise | None = None
    """How it speaks of local sizes; None: it reads them off its operands."""
    additive: bool = False
    """Whether its results for parts of what it sums over add up to that of the whole (of a loss: unless it takes the mean)."""
    sequences: bool = False
    """Whether it is attention of whole queries, keys and values, so that places are positions."""
    weighs: bool = False
    """Whether it makes rows of weights that add up to one: what lies around it, up to the next products, is attention."""


def operator_of(target: Any) -> OperatorRow:
    """The row of what a node calls; for an operator without one, what torch's tags tell."""
    found = OPERATORS.get(op_name(target))
    if found is not None:
        return found
    if tagged_as_drawing(target):
        return _RANDOM
    return _ELEMENTWISE if torch.Tag.pointwise in getattr(target, "tags", ()) else _UNKNOWN


_UNKNOWN, _RANDOM, _ELEMENTWISE = OperatorRow(), OperatorRow(kind="random"), OperatorRow(kind="elementwise", rule=rules.pointwise)


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers. An argument that is not known yet counts as one that lets it."""
    if not isinstance(node.target, OpOverload):
        return False
    one = operator_of(node.target)
    drawing = tagged_as_drawing(node.target) if one.draws is None else one.draws
    return drawing and all(_may_be_set(node, name) for name in one.only_if)


def _may_be_set(node: fx.Node, name: str) -> bool:
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
            return isinstance(value, fx.Node) or value is None or bool(value)
    raise KeyError(name)


def add_rule(
    name: str,
    text: str,
    *,
    linear: Iterable[Iterable[int]] = (),
    kind: OperatorKind | None = None,
    view: bool | None = None,
    saves: Saves | None = None,
    flops: Flops | None = None,
    factors: tuple[int, int] | None = None,
    matrix: tuple[MatrixDim, ...] | None = None,
    draws: bool | None = None,
    only_if: Iterable[str] | None = None,
    local: Localise | None = None,
    additive: bool | None = None,
    weighs: bool | None = None,
) -> None:
    """Teach meshpar an operator: `name` is "namespace.op" (without "aten."), `text` its rule, `linear` the operand sets it is linear in.

    The rule alone is enough to be correct. The other facts, those of `OperatorRow`, make it cheap and well counted:

    `kind`       "product", "attention", "convolution" are kept under recompute="selective"; "lookup" reads few rows of its first operand
    `view`       its result shares the memory of its operand: it costs nothing
    `saves`      what its backward reads: "operands" (the default), "results", "indices", "nothing", ...
    `flops`      a function of the call (`call.shapes`, `call.out.shape`, `call.arguments`): floating-point operations, forward
    `factors`    of a product, the places of the arguments whose gradients are new tensors: all-reduces of them run in place
    `matrix`     what the dims of its parameter are to it, for `explain()`: "outputs", "inputs", "rows", "features", "experts"
    `draws`      it draws random numbers (default: what torch's tag says), `only_if` these arguments are neither zero nor False
    `local`      changes a call to what it is on a rank, for an operator that is told sizes (`meshpar.sharding.local`)
    `additive`   its results for parts of the batch add up;   `weighs`: its rows add up to one, as those of a softmax

    What is not given stays as known. A call whose shapes the text does not fit runs on whole values, and `explain()` says so.

    Raises ValueError when the name is written another way, the text is not a rule or a word is not one of those above.

    >>> add_rule("mylib.scale_rows", "n c, n -> n c", linear=[(0,), (1,)])
    >>> add_rule(
    ...     "mylib.project", "... i, i o -> ... o", linear=[(0,), (1,)], kind="product", factors=(0, 1),
    ...     flops=lambda call: 2 * call.out.shape[-1] * call.infos[0].nbytes / call.infos[0].dtype.itemsize,
    ... )
    """
    if (known_as := name.replace("::", ".").removeprefix("aten.")) != name:
        raise ValueError(f"add_rule({name!r}): the operator is known here as {known_as!r}. Type add_rule({known_as!r}, {text!r}, ...).")
    bind(text, [], [])
    dims = [(dim, get_args(MatrixDim)) for dim in matrix or ()]
    for word, known in ((kind, get_args(OperatorKind)), (saves, get_args(Saves)), *dims):
        if word is not None and word not in known:
            raise ValueError(f"add_rule({name!r}): {word!r} is none of {', '.join(known)}.")
    facts: dict[str, Any] = {
        "kind": kind,
        "view": view,
        "saves": saves,
        "flops": flops,
        "factors": factors,
        "matrix": matrix,
        "draws": draws,
        "local": local,
    }
    facts |= {"only_if": None if only_if is None else tuple(only_if), "additive": additive, "weighs": weighs}
    given = {fact: value for fact, value in facts.items() if value is not None}
    OPERATORS[name] = replace(OPERATORS.get(name, _UNKNOWN), rule=row(text, linear=linear), claim=text, **given)


# -- the rows ----------------------------------------------------------------------------------------------------------------------------


def _rows(names: str, rule: Rule | None = None, **facts: Any) -> dict[str, OperatorRow]:
    return dict.fromkeys(names.split(), OperatorRow(rule=rule, **facts))


def _product(names: str, rule: Rule | None = None, first: int = 0, **facts: Any) -> dict[str, OperatorRow]:
    return _rows(names, rule, kind="product", factors=(first, first + 1), flops=count.product(first), **facts)


def _elementwise(names: str, linear: Callable[..., Any] = rules.nowhere, **facts: Any) -> dict[str, OperatorRow]:
    return _rows(names, rules.elementwise(linear), kind="elementwise", **facts)


def _views(names: str, local: Localise | None = None) -> dict[str, OperatorRow]:
    return {name: OperatorRow(kind="view", rule=VIEW_RULES.get(name), view=True, saves="nothing", local=local) for name in names.split()}


def _moves(names: str, kind: OperatorKind, saves: Saves = "operands", local: Localise | None = None) -> dict[str, OperatorRow]:
    return {name: OperatorRow(kind=kind, rule=VIEW_RULES[name], saves=saves, local=local) for name in names.split()}


def _attention(name: str, flops: Flops) -> dict[str, OperatorRow]:
    """Attention of parts of a sequence, by an outer axis."""
    return _rows(f"meshpar.ops.{name}_attention", layers.attention_of_a_part, kind="attention", saves="operands and results", flops=flops)


_PRODUCTS: dict[str, OperatorRow] = {
    **_product("linear", row("... i, o i, o -> ... o", linear=((0, 2), (1, 2))), matrix=("outputs", "inputs")),
    **_product("mm", row("i k, k j -> i j", linear=((0,), (1,)))),
    **_product("bmm", row("b i k, b k j -> b i j", linear=((0,), (1,)))),
    **_product("addmm", rules.added("n o", "n i, i o -> n o"), 1),
    **_product("baddbmm", rules.added("b i j", "b i k, b k j -> b i j"), 1),
    **_product("addbmm", None, 1),
    **_product("matmul", rules.matmul),
    **_product("mv", row("i k, k -> i", linear=((0,), (1,)))),
    **_product("dot", row("k, k -> ", linear=((0,), (1,)))),
    **_product("meshpar.ops.deferred.linear", matrix=("outputs", "inputs")),
    **_product("meshpar.ops.deferred.matmul"),
    **_product("meshpar.ops.deferred.grouped_mm", matrix=("experts",)),
    **_product("meshpar.ops.products.linear", matrix=("outputs", "inputs")),
    **_product("meshpar.ops.products.matmul"),
    **_rows("meshpar.ops.pieces.gathered", kind="product", flops=count.products, factors=(0, 1)),
    **_rows("meshpar.ops.pieces.scattered meshpar.ops.pieces.reduced", kind="product", flops=count.reduced_product, factors=(0, 1)),
    **_product("meshpar.ops.products.grouped_mm", matrix=("experts",)),
    **_product("meshpar.grouped_mm", rules.grouped_mm, matrix=("experts",)),  # the matrices of every expert are cut alike
    **_rows("einsum", rules.einsum, kind="product", flops=count.einsum),
    **_rows("outer", row("i, j -> i j", linear=((0,), (1,)))),
    **_rows("bilinear", row("... i, ... j, o i j, o -> ... o", linear=((0, 3), (1, 3), (2, 3))), kind="product", flops=count.bilinear),
    **_rows("cdist", row("... i [c], ... j [c] -> ... i j")),
    # the same below autograd, where recompute decides
    **_rows("_scaled_mm _grouped_mm _int_mm _trilinear", kind="product"),
    **_rows("scaled_dot_product_attention", layers.attention, kind="attention", saves="operands and results", flops=count.attention,
            only_if=("dropout_p",), local=local.attention, sequences=True, weighs=True),
    **_rows("meshpar.ops.context.grouped_attention", layers.attention, kind="attention", saves="operands and results",
            flops=count.attention, local=local.attention, sequences=True, weighs=True),
    **_rows("meshpar.ops.halo.windowed_attention", layers.attention, kind="attention", saves="operands and results",
            flops=count.windowed_attention, local=local.attention, sequences=True),
    **_rows("meshpar.ops.scored.scored_attention", layers.scored_attention, kind="attention", saves="operands and results",
            flops=count.windowed_attention, local=local.attention, sequences=True, weighs=True),
    **_rows("meshpar.ops.scored.scored_attention_of_a_part", layers.attention_of_a_part, kind="attention",
            saves="operands and results", flops=count.windowed_attention),
    **_attention("context.causal", count.attention),
    **_attention("scored.scored_halo", count.windowed_attention),
    **_attention("gathered.gathered", count.ring_attention),
    **_attention("halo.halo", count.windowed_attention),
    **_attention("ring.ring", count.ring_attention),
    **_rows("_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable _flash_attention_forward "
            "_efficient_attention_forward _scaled_dot_product_attention_math_for_mps", kind="attention", saves="operands and results"),
    **_rows("convolution conv1d conv2d conv3d", layers.convolution, kind="convolution", flops=count.convolution, local=local.convolution),
    **_rows("meshpar.ops.convolution.convolved meshpar.ops.convolution.halo_convolution", layers.convolved, kind="convolution",
            flops=count.convolution, local=local.convolved),
    **_rows("conv_transpose1d conv_transpose2d conv_transpose3d", layers.transposed_convolution, kind="convolution",
            flops=count.transposed_convolution),
}  # fmt: skip

_ROWS_OF_TABLES: dict[str, OperatorRow] = {
    **_rows("embedding", indexing.embedding, kind="lookup", saves="indices", local=local.embedding, matrix=("rows", "features")),
    **_rows("index", indexing.index, kind="lookup", saves="indices"),
    **_rows("index_select", indexing.index_select, kind="lookup", saves="indices"),
    **_rows("gather take_along_dim", indexing.gather, kind="lookup", saves="indices"),
    **_rows("meshpar.ops.vocab_parallel.embedding", kind="lookup", saves="indices", matrix=("rows", "features")),
    **_rows("scatter scatter_add", indexing.scatter, kind="write"),
    **_rows("index_add", indexing.index_add, kind="write"),
    **_rows("slice_scatter", indexing.written, kind="write", saves="nothing"),
    **_rows("select_scatter", indexing.written, kind="write"),
    **_rows("one_hot", indexing.one_hot),
}

_EXPERTS: dict[str, OperatorRow] = {
    **_rows("meshpar.dispatch", row("t [h], t [k] -> (t k) [h], [x], (t k)"), kind="experts", saves="indices"),
    **_rows("meshpar.ops.load.dispatch", kind="experts", saves="indices"),
    **_rows("meshpar.row_expert", rules.row_expert, kind="experts"),
    **_rows("meshpar.combine", row("(t k) h, (t k), t [k] -> t h", linear=((0,), (2,))), kind="experts"),
    **_rows("meshpar.ops.expert_all_to_all.send_rows", row("[n] h, [x] -> [n] h, [y], [s] [r], [m], [m]", linear=((0,),)), kind="experts"),
    **_rows("meshpar.ops.products.send_rows", kind="experts"),
    **_rows("meshpar.ops.expert_pieces.through_experts", kind="experts", flops=count.through_experts),
    **_rows("meshpar.ops.token_pieces.on_gathered_tokens", kind="experts", flops=count.on_gathered_tokens),
    **_rows("meshpar.ops.expert_all_to_all.return_rows", row("[n] h, [s] [r], [m], [m] -> [n] h", linear=((0,),)), kind="experts"),
}

_LAYERS: dict[str, OperatorRow] = {
    **_rows("layer_norm native_layer_norm rms_norm _fused_rms_norm", layers.normalised, kind="norm"),
    **_rows("_native_batch_norm_legit_functional _native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm "
            "batch_norm", layers.batch_norm, kind="norm"),
    **_rows("group_norm", layers.group_norm, kind="norm"),
    **_rows("_weight_norm", layers.weight_norm, kind="norm"),
    **_rows("softmax _softmax", rules.along_dim, kind="softmax", saves="results", weighs=True),
    **_rows("_safe_softmax", rules.along_dim, kind="softmax", weighs=True),
    **_rows("log_softmax _log_softmax", rules.along_dim, kind="softmax", saves="results"),
    **_rows("glu", layers.glu),
    **_rows("prelu", layers.prelu),
    **_rows("lstm gru rnn_tanh rnn_relu", layers.recurrent, kind="recurrent", only_if=("dropout", "train")),
    **_rows("lstm_cell", row("b [i], b [h], b [h], [g] [i], [g] [h], [g], [g] -> b [h], b [h]"), kind="recurrent"),
    **_rows("gru_cell rnn_tanh_cell rnn_relu_cell", row("b [i], b [h], [g] [i], [g] [h], [g], [g] -> b [h]"), kind="recurrent"),
    **_rows("cosine_similarity", layers.cosine_similarity, kind="reduction"),
    **_rows("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
            "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d "
            "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d",
            layers.pooling, kind="window"),
    **_rows("im2col", row("... c [h] [w] -> ... (c k) [l]", linear=((0,),)), kind="window"),
    **_rows("col2im", row("... (c k) [l] -> ... c [h] [w]", linear=((0,),)), kind="window"),
    **_rows("fft_fftn", fixed_dims(lambda op: op.dims(), linear=True)),
}  # fmt: skip

_LOSSES: dict[str, OperatorRow] = {
    **_rows("meshpar.ops.chunked_loss.cross_entropy", kind="label loss", flops=count.reduced_product, additive=True),
    **_rows("cross_entropy_loss", layers.cross_entropy, kind="label loss", additive=True, local=local.cross_entropy),
    **_rows("nll_loss nll_loss_nd nll_loss2d", layers.label_loss, kind="label loss", additive=True),
    **_rows("mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits",
            layers.loss_by_element, kind="loss"),
    **_rows("meshpar.ctc_loss", layers.ctc_loss, kind="loss"),
}  # fmt: skip

_REDUCTIONS: dict[str, OperatorRow] = {
    **_rows("sum", rules.summed, kind="reduction", saves="nothing", additive=True),
    **_rows("mean", rules.summed, kind="reduction", saves="nothing", local=local.mean),
    **_rows("nansum count_nonzero", rules.counted, kind="reduction", additive=True),
    **_rows("amax amin any all logsumexp var std var_mean std_mean prod kthvalue mode argmax argmin linalg_vector_norm norm median",
            rules.reduction, kind="reduction"),
    **_rows("max min", rules.pointwise_or(rules.reduction), kind="reduction"),
    **_rows("cumprod logcumsumexp", rules.along_dim, kind="scan", local=local.cumulated),
    **_rows("cummax cummin", rules.along_dim, kind="scan"),
    **_rows("diff", indexing.differences, kind="scan"),
    **_rows("topk sort argsort", indexing.searched, kind="search"),
    **_rows("meshpar.expect", rules.whole),
}  # fmt: skip

_ELEMENT_BY_ELEMENT: dict[str, OperatorRow] = {
    **_elementwise("add sub", rules.jointly, saves="nothing"),
    **_elementwise("rsub subtract", rules.jointly),
    **_elementwise("mul", rules.each, saves="others"),
    **_elementwise("multiply", rules.each),
    **_elementwise("div", rules.quotient, saves="others"),
    **_elementwise("divide true_divide", rules.quotient),
    **_elementwise("neg", rules.first, saves="nothing"),
    **_elementwise("positive", rules.first),
    **_elementwise("where", rules.choice),
    **_elementwise("exp sqrt rsqrt tanh sigmoid relu", saves="results"),
    # these carry no pointwise tag, or not in every form
    **_elementwise("masked_fill copy complex polar log_sigmoid hardswish __and__ __or__ __xor__ __lshift__ __rshift__"),
    **_elementwise("greater greater_equal less less_equal"),
    **_rows("rrelu rrelu_with_noise", kind="random", draws=True, only_if=("training",)),
    **_rows("meshpar.hooked", rules.uncut),
    **_rows("meshpar.hooked_parts", rules.pointwise),
    **_rows("_to_copy to", rules.elementwise(rules.widened), kind="copy", saves="nothing"),
    **_rows("broadcast_tensors", rules.pointwise, kind="copy"),
    **_rows("type_as", rules.elementwise(rules.widened), kind="copy"),
    **_rows("clone", rules.elementwise(rules.first), kind="copy", saves="nothing"),
}

_MADE: dict[str, OperatorRow] = {
    **_rows("dropout native_dropout", layers.dropout, kind="random", only_if=("p", "train")),
    **_rows("feature_dropout alpha_dropout feature_alpha_dropout", kind="random", draws=True, only_if=("p", "train")),
    **_rows("bernoulli rand_like randn_like", layers.dropout, kind="random"),
    **_rows("rand randn", rules.created, kind="random", local=local.created),
    **_rows("zeros ones full empty new_zeros new_ones new_full new_empty", rules.created, kind="created", local=local.created),
    **_rows("zeros_like ones_like full_like empty_like scalar_tensor", rules.created, kind="created"),
}

_MOVED: dict[str, OperatorRow] = {
    **_views("view reshape _unsafe_view flatten unflatten", local.reshape),
    **_views("squeeze", local.squeeze),
    **_views("expand broadcast_to", local.expand),
    **_views("split split_with_sizes chunk", local.split),
    **_views("slice", local.slice_),
    **_views("transpose swapaxes swapdims mT adjoint mH t numpy_T permute movedim unsqueeze expand_as select unbind alias detach"),
    **_views("diagonal"),
    **_rows("_operator.getitem", kind="view", view=True, saves="nothing"),
    **_rows("unfold", layers.unfolded, kind="view", view=True, saves="nothing"),
    **_rows("view_as_complex", row("... [c] -> ..."), kind="view", view=True, saves="nothing"),
    **_rows("view_as_real", row("... -> ... [c]"), kind="view", view=True, saves="nothing"),
    **_moves("contiguous", "copy", "nothing"),
    **_moves("lift_fresh_copy split_copy split_with_sizes_copy unbind_copy flip roll", "copy"),
    **_moves("tril triu", "elementwise"),
    **_moves("repeat", "copy", local=local.ratio),
    **_moves("repeat_interleave", "copy", local=local.interleave),
    **_moves("cat stack", "join", "nothing"),
    **_moves("concat concatenate", "join"),
    **_moves("cumsum", "scan", local=local.cumulated),
    **_rows("meshpar.ops.scans.cumulated", rules.cumulated, kind="scan"),
    **_rows("meshpar.ops.shifts.shifted", fixed_dims(lambda op: [op.dim()]), kind="copy", saves="nothing", local=local.shifted),
    **_rows("meshpar.ops.shifts.halo_shifted", fixed_dims(lambda op: [op.dim()]), kind="copy", saves="nothing"),
    **_rows("pad", layers.padding, kind="write"),
    **_rows("constant_pad_nd", layers.padding, kind="write", saves="nothing"),
}

_COLLECTIVES: dict[str, OperatorRow] = {
    f"meshpar.ops.collectives.{name}": OperatorRow(
        kind="collective",
        rule=rules.collective,
        saves="nothing",
        view=name in ("i_to_r", "i_to_r_many", "r_to_i"),
        local=local.exchanged_again,
    )
    for name in ("i_to_r_many", *(conversion.op for conversion in CONVERSIONS.values()))
} | {
    "meshpar.ops.again.computed": OperatorRow(kind="elementwise"),
    "meshpar.ops.products.i_to_r": OperatorRow(kind="collective", saves="nothing", view=True),
    "meshpar.ops.products.convert": OperatorRow(kind="collective", saves="nothing"),
    "meshpar.ops.products.beside": OperatorRow(saves="nothing"),
}

OPERATORS: dict[str, OperatorRow] = {
    **_PRODUCTS, **_ROWS_OF_TABLES, **_EXPERTS, **_LAYERS, **_LOSSES, **_REDUCTIONS,
    **_ELEMENT_BY_ELEMENT, **_MADE, **_MOVED, **_COLLECTIVES,
}  # fmt: skip
"""The rows, by `op_name`."""
assert op_name(operator.getitem) in OPERATORS
