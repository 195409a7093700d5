"""What operators mean for the rows and the tensors of experts, as tables: RULES for those that treat them in a way of their own, ROW_BY_ROW
and POINTWISE for those that treat rows alone.

A rule sees a call of an operator and the recorder that watches it. It notes what the lifted forward does instead and answers True; False
says "not mine".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshpar._torch import OpOverload
from meshpar.capture.experts.body import EXPERT, OFFSETS, NotLifted, Ref, gather, grouped_from_left, identity
from meshpar.ops.experts import grouped_mm

if TYPE_CHECKING:
    from meshpar.capture.experts.record import Recorder

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """An operator that ran."""

    func: OpOverload
    args: Any
    kwargs: Any
    results: list[Tensor]
    kinds: set[str]
    """Of the values that take part."""


ExpertRule = Callable[["Recorder", RecordedCall], bool]


def cut_apart(recorder: Recorder, call: RecordedCall) -> None:
    """What to do with the parameters of all experts, joined along dim 0. Raises NotLifted for anything else than to tell them apart."""
    source, each = call.args[0], call.args[0].shape[0] // recorder.experts
    packet, whole = call.func.overloadpacket, [recorder.experts, each, *source.shape[1:]]
    if packet in (aten.view, aten._unsafe_view, aten.reshape) and call.results[0].shape[:1] == (recorder.experts,):
        recorder.step(Tensor.reshape, (source, [*call.results[0].shape]), {}, call.results, "stack")
        return
    if all(result.shape == source.shape for result in call.results) and call.kinds == {"joined"} and len(call.results) == 1:
        recorder.step(call.func, call.args, call.kwargs, call.results, "joined")
        return
    starts: list[int] = []
    if packet is aten.slice and (len(call.args) < 2 or call.args[1] == 0) and len(call.args) < 5:
        starts = [(call.args[2] or 0) if len(call.args) > 2 else 0]
    elif packet in (aten.split, aten.chunk) and (len(call.args) < 3 or call.args[2] == 0):
        starts = [place * each for place in range(len(call.results))]
    if not starts or any(result.shape[0] != each or start % each for result, start in zip(call.results, starts, strict=True)):
        raise NotLifted(f"{call.func} mixes the experts' parameters")
    for result, start in zip(call.results, starts, strict=True):
        if start // each == recorder.expert:
            recorder.step(Tensor.reshape, (source, whole), {}, [result], "each")
        else:
            recorder.mark([result], "other")


def _select(recorder: Recorder, call: RecordedCall) -> bool:
    """stack[e]"""
    if call.kinds != {"stack"} or call.args[1] != 0:
        return False
    if call.args[2] % call.args[0].shape[0] == recorder.expert:
        recorder.step(identity, (call.args[0],), {}, call.results, "each")
    else:
        recorder.mark(call.results, "other")
    return True


def _unbind(recorder: Recorder, call: RecordedCall) -> bool:
    if call.kinds != {"stack"} or (len(call.args) > 1 and call.args[1] != 0):
        return False
    for expert, result in enumerate(call.results):
        if expert == recorder.expert:
            recorder.step(identity, (call.args[0],), {}, [result], "each")
        else:
            recorder.mark([result], "other")
    return True


def _slice(recorder: Recorder, call: RecordedCall) -> bool:
    """stack[e : e + 1]"""
    if call.kinds != {"stack"} or (len(call.args) > 1 and call.args[1] != 0) or call.results[0].shape[0] == call.args[0].shape[0]:
        return False
    start, end = (call.args[2] or 0), call.args[3]
    if not start <= recorder.expert < end:
        recorder.mark(call.results, "other")
    elif call.results[0].shape[0] == 1:
        recorder.step(Tensor.unsqueeze, (call.args[0], 1), {}, call.results, "each")
    else:
        raise NotLifted("it takes the parameters of several experts at once")
    return True


def _index(recorder: Recorder, call: RecordedCall) -> bool:
    source, indices = call.args[:2]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or recorder.known(given[0][1]) is not None:
        return False
    dim, index = given[0]
    if recorder.kind(source) == "stack" and dim == 0 and index.dtype != torch.bool:
        return _index_stack(recorder, call, source, index)
    whole = recorder.kind(source) in ("rows", "other") and dim == recorder.row_dim(source) and (recorder.all_rows(index) or _all(index))
    if whole:
        recorder.alias(call.results[0], source)
    return whole


def _index_stack(recorder: Recorder, call: RecordedCall, source: Tensor, index: Tensor) -> bool:
    """stack[tensor([e])], or stack[the expert of every row]"""
    chosen = set(index.reshape(-1).tolist())
    if recorder.expert not in chosen:
        recorder.mark(call.results, "other")
    elif chosen != {recorder.expert}:
        raise NotLifted("it takes the parameters of several experts at once")
    elif index.numel() == 1:
        recorder.step(Tensor.reshape, (source, [source.shape[0], *call.results[0].shape]), {}, call.results, "each")
    elif index.shape == (recorder.count,) and source.dim() == 2:
        recorder.step(gather, (source, Ref(EXPERT), list(source.shape[1:])), {}, call.results, "rows")
    else:
        return False
    return True


def _all(index: Tensor) -> bool:
    return index.dtype == torch.bool and index.dim() == 1 and bool(index.all())


def _index_add(recorder: Recorder, call: RecordedCall) -> bool:
    target, dim, index, source = call.args[:4]
    if dim != 0 or call.kwargs.get("alpha", 1) != 1:
        return False
    return _put(recorder, call.results[0], target, index, source, add=True)


def _index_put(recorder: Recorder, call: RecordedCall) -> bool:
    target, indices, values = call.args[:3]
    return len(indices) == 1 and _put(recorder, call.results[0], target, indices[0], values, add=len(call.args) > 3 and bool(call.args[3]))


def _put(recorder: Recorder, result: Tensor, target: Tensor, index: Any, source: Any, *, add: bool) -> bool:
    if not isinstance(index, Tensor) or recorder.known(index) is not None:
        return False
    if index.numel() == 0 or source.numel() == 0 or (index.dtype == torch.bool and not bool(index.any())):
        if recorder.known(target) is not None:
            recorder.alias(result, target)
        return True
    value = recorder.known(source)
    if value is None and add and recorder.constant(source) == 0:
        if recorder.known(target) is not None:
            recorder.alias(result, target)
        return True
    if value is None or value.kind != "rows" or not (recorder.all_rows(index) or _all(index)) or source.shape != target.shape:
        return False
    if not add or recorder.constant(target) == 0:
        recorder.alias(result, source)
    else:
        recorder.step(torch.add, (target, source), {}, [result], "rows")
    return True


def _mul(recorder: Recorder, call: RecordedCall) -> bool:
    """Times a weight of one, or of zero."""
    for value, factor in (call.args[:2], call.args[1::-1]):
        if not isinstance(value, Tensor) or recorder.known(value) is None or not isinstance(factor, Tensor) or recorder.known(factor):
            continue
        constant = recorder.constant(factor)
        if constant == 0 and recorder.kind(value) in ("rows", "other"):
            return True
        if constant == 1 and value.shape == call.results[0].shape:
            recorder.alias(call.results[0], value)
            return True
    return False


def _add(recorder: Recorder, call: RecordedCall) -> bool:
    if call.kwargs.get("alpha", 1) != 1:
        return False
    for value, term in (call.args[:2], call.args[1::-1]):
        known = isinstance(value, Tensor) and recorder.known(value) is not None and value.shape == call.results[0].shape
        if known and isinstance(term, Tensor) and recorder.known(term) is None and recorder.constant(term) == 0:
            recorder.alias(call.results[0], value)
            return True
    return False


def _where(recorder: Recorder, call: RecordedCall) -> bool:
    condition = recorder.constant(call.args[0])
    if not isinstance(condition, bool) or recorder.known(call.args[0]) is not None:
        return False
    chosen = call.args[1] if condition else call.args[2]
    if isinstance(chosen, Tensor) and recorder.known(chosen) is not None:
        if chosen.shape != call.results[0].shape:
            return False
        recorder.alias(call.results[0], chosen)
        return True
    return recorder.constant(chosen) is not None


def _masked_fill(recorder: Recorder, call: RecordedCall) -> bool:
    if recorder.constant(call.args[1]) is not False or call.args[0].shape != call.results[0].shape:
        return False
    recorder.alias(call.results[0], call.args[0])
    return True


def _mm(recorder: Recorder, call: RecordedCall) -> bool:
    x, w = recorder.known(call.args[0]), recorder.known(call.args[1])
    if x is None or w is None or {x.kind, w.kind} != {"rows", "each"}:
        return False
    if x.kind == "rows" and recorder.row_dim(x.tensor) == 0:
        recorder.step(grouped_mm, (x.tensor, w.tensor, Ref(OFFSETS)), {}, call.results, "rows")
        return True
    if x.kind == "each" and recorder.row_dim(w.tensor) == 1:
        recorder.step(grouped_from_left, (x.tensor, w.tensor, Ref(OFFSETS)), {}, call.results, "rows")
        return True
    return False


def _addmm(recorder: Recorder, call: RecordedCall) -> bool:
    bias, x, w = (recorder.known(arg) for arg in call.args[:3])
    if bias is None or x is None or w is None or x.kind != "rows" or w.kind != "each" or bias.kind not in ("each", "shared") or call.kwargs:
        return False
    if recorder.row_dim(x.tensor) != 0:
        return False
    product = recorder.new(call.results[0])
    recorder.step(grouped_mm, (x.tensor, w.tensor, Ref(OFFSETS)), {}, [product], "rows")
    term = recorder.gathered(bias.tensor, product) if bias.kind == "each" else bias.tensor
    recorder.step(torch.add, (product, term), {}, call.results, "rows")
    return True


def _layer_norm(recorder: Recorder, call: RecordedCall) -> bool:
    x, shape, weight, bias, eps = call.args[:5]
    return _normed(recorder, call, torch.nn.functional.layer_norm, x, shape, eps, affine=(weight, bias))


def _rms_norm(recorder: Recorder, call: RecordedCall) -> bool:
    x, shape, weight, eps = call.args[:4]
    return _normed(recorder, call, torch.nn.functional.rms_norm, x, shape, eps, affine=(weight,))


def _normed(recorder: Recorder, call: RecordedCall, norm: Any, x: Tensor, shape: Any, eps: Any, *, affine: Sequence[Tensor | None]) -> bool:
    """A norm of rows whose scale and shift may be each expert's own."""
    if recorder.kind(x) != "rows" or "other" in call.kinds or recorder.row_dim(x) >= x.dim() - len(shape):
        return False
    if all(term is None or recorder.kind(term) == "shared" for term in affine):
        recorder.step(norm, (x, list(shape), *affine), {"eps": eps}, call.results[:1], "rows")
        return True
    current = recorder.new(call.results[0])
    recorder.step(norm, (x, list(shape)), {"eps": eps}, [current], "rows")
    for run, term in zip((torch.mul, torch.add), affine, strict=False):
        if term is not None:
            operand = recorder.gathered(term, current) if recorder.kind(term) == "each" else term
            before, current = current, recorder.new(call.results[0])
            recorder.step(run, (before, operand), {}, [current], "rows")
    recorder.alias(call.results[0], current)
    return True


def _made(recorder: Recorder, call: RecordedCall) -> bool:
    """A new tensor in the shape of another: a constant."""
    return True


def _split(recorder: Recorder, call: RecordedCall) -> bool:
    """Rows split by expert: one part has them all, the others are empty."""
    if call.kinds != {"rows"} or (call.args[2] if len(call.args) > 2 else 0) % call.args[0].dim() != recorder.row_dim(call.args[0]):
        return False
    for result in call.results:
        if result.numel() > 0:
            if result.shape != call.args[0].shape:
                return False
            recorder.alias(result, call.args[0])
    return True


def _cat(recorder: Recorder, call: RecordedCall) -> bool:
    """Rows and empty tensors put together."""
    parts = [part for part in call.args[0] if part.numel() > 0]
    if len(parts) != 1 or len(call.args[0]) == 1 or recorder.known(parts[0]) is None:
        return False
    recorder.alias(call.results[0], parts[0])
    return True


def _dropout(recorder: Recorder, call: RecordedCall) -> bool:
    if call.kinds != {"rows"}:
        return False
    recorder.step(torch.nn.functional.dropout, (call.args[0], call.args[1], call.args[2]), {}, call.results[:1], "rows")
    return True


_MADE = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
RULES: Mapping[Any, ExpertRule] = {
    aten.select: _select,
    aten.unbind: _unbind,
    aten.slice: _slice,
    aten.index: _index,
    aten.index_add: _index_add,
    aten.index_put: _index_put,
    aten.mul: _mul,
    aten.add: _add,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.native_layer_norm: _layer_norm,
    aten._fused_rms_norm: _rms_norm,
    aten.native_dropout: _dropout,
    **dict.fromkeys(_MADE, _made),
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.cat: _cat,
}
"""Operators by what they mean for rows and experts; what a rule answers "not mine" to is treated as any other operator."""


def _dims(position: int, default: int | None = None) -> Callable[[Recorder, Any], bool]:
    """The dims that argument `position` names, or else `default`, are not the rows'; None: there it means all of them."""

    def check(recorder: Recorder, args: Any) -> bool:
        source = args[0] if isinstance(args[0], Tensor) else args[0][0]
        named = args[position] if len(args) > position else default
        dims: list[Any] = [*named] if isinstance(named, list | tuple) else [named]
        return None not in dims and bool(dims) and all(d % source.dim() != recorder.row_dim(source) for d in dims)

    return check


def _always(recorder: Recorder, args: Any) -> bool:
    return True


def _by_shared(position: int) -> Callable[[Recorder, Any], bool]:
    """Rows times a matrix that all experts share."""

    def check(recorder: Recorder, args: Any) -> bool:
        x, w = recorder.known(args[position]), recorder.known(args[position + 1])
        return x is not None and x.kind == "rows" and w is not None and w.kind == "shared" and recorder.row_dim(args[position]) == 0

    return check


TELLING = frozenset({*_MADE, aten.where, aten.masked_fill})
"""Operators whose result may be a constant other than zero."""
POINTWISE = frozenset({aten.clone, aten._to_copy, aten.alias, aten.detach, aten.gelu, aten.silu, aten.where, aten.masked_fill})
ROW_BY_ROW: Mapping[Any, Callable[[Recorder, Any], bool]] = {
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.t), _always),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view), _always),
    **dict.fromkeys(
        (aten.slice, aten.select, aten._softmax, aten._log_softmax, aten.cat, aten.sum, aten.mean, aten.amax, aten.glu), _dims(1)
    ),
    **dict.fromkeys((aten.amin, aten.logsumexp, aten.cumsum, aten.var, aten.std), _dims(1)),
    **dict.fromkeys((aten.split, aten.split_with_sizes), _dims(2, default=0)),
    aten.linalg_vector_norm: _dims(2),
    aten.mm: _by_shared(0),
    aten.addmm: _by_shared(1),
}
"""Operators that treat rows alone, and when. (A view that keeps the rows' dim does; one that does not is refused by its shape.)"""


def _cast(x: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)


READABLE: Mapping[Any, Callable[..., Any]] = {
    aten._to_copy.default: _cast,
    aten._unsafe_view.default: torch.reshape,
    aten.view.default: torch.reshape,
    aten._softmax.default: lambda x, dim, half: torch.softmax(x, dim),
    aten._log_softmax.default: lambda x, dim, half: torch.log_softmax(x, dim),
    aten.mm.default: torch.mm,
}
"""Operators of a record -> what to call instead, so that the graph has operators that rules know."""
