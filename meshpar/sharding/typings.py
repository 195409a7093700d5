"""What one operator could do on one mesh axis: every consistent typing of its operands and results, with its price."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from meshpar.graph.facts import Info
from meshpar.graph.op import value_of
from meshpar.sharding.extents import Pattern, shard
from meshpar.sharding.infer import BoundOp, Inference, pattern_in
from meshpar.sharding.notation import Dim, Dims, Signature
from meshpar.sharding.price import Price
from meshpar.sharding.types import I, P, R, Ragged, Shard, Type, plain

DISPATCH, COMBINE = "meshpar.dispatch", "meshpar.combine"
E = Ragged()
Cutting = Callable[[int, Pattern, int], "Shard | None"]
"""How the axis cuts a dim in which a factor lies with some pattern; None where it cannot."""
SEES_GRADIENT = frozenset({"meshpar.hooked", "meshpar.hooked_parts"})
"""Operators whose backward is not linear in the gradient: it must not be a pending sum."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One typing: the type each operand is used at, the type of each result, and seconds of work."""

    uses: tuple[Type, ...]
    outs: tuple[Type, ...]
    cost: float
    why: str


def at_rest(info: Info, type_: Type) -> Type:
    """Values without a gradient are never replicate: invariant says the same of them."""
    return I if type_ == R and not info.requires_grad else type_


def choices(
    call: BoundOp,
    inference: Inference,
    factors: Iterable[int],
    size: int,
    price: Price,
    work: float,
    *,
    experts: frozenset[int] = frozenset(),
    even: bool = False,
    chunks: Mapping[int, int] | None = None,
) -> tuple[Choice, ...]:
    """All typings of a call when any of `factors` may be cut over `size` ranks. `work`: seconds of the whole operator.

    `experts`: factors that are the experts of the model, where the axis splits those. `even`: whether all ranks must hold equal parts.
    `chunks`: factors of which every rank gets several pieces, and how many.
    """

    def cutting(dim: int, pattern: Pattern, factor: int) -> Shard | None:
        return shard(dim, pattern, size, even=even, chunks=(chunks or {}).get(factor, 1))

    every = _typings(call, inference, factors, size, cutting, price, work, experts)
    return tuple(one for choice in every if (one := _obeying(choice, call)) is not None)


def _obeying(choice: Choice, call: BoundOp) -> Choice | None:
    """The typing under which an own backward gets only gradients that it may get; None where there is none.

    What it adds to the loss is the same on every rank, so that its operand is invariant. If the rest is not linear in the gradient, no
    pending sum may enter it. (A backward that could not be tried does what its rule says; without a rule it gets whole values.)
    """
    nature = call.op.nature
    if nature is None:
        return choice
    uses = tuple(I if t == R and i in nature.shared else t for i, t in enumerate(choice.uses))
    free = nature.linear or (call.signature is not None and not nature.ran)
    return replace(choice, uses=uses) if free or R not in (*uses, *choice.outs) else None


def _typings(
    call: BoundOp,
    inference: Inference,
    factors: Iterable[int],
    size: int,
    cutting: Cutting,
    price: Price,
    work: float,
    experts: frozenset[int],
) -> tuple[Choice, ...]:
    found = [_whole(call, work)]
    differentiable = any(o is not None and o.requires_grad for o in call.op.outs)
    if differentiable and call.op.name not in SEES_GRADIENT:
        found.append(_replicated(call, work + price.launch / 100))
    signature = call.signature
    if signature is not None:
        for together in signature.linear:
            found.extend(_partial(call, together, work))
        seen: set[tuple[tuple[Type, ...], tuple[Type, ...]]] = {(c.uses, c.outs) for c in found}
        for factor in factors:
            for group in _groups(call, inference, factor):
                one = _cut(call, inference, group, factor, cutting, work / size)
                if one is not None and (one.uses, one.outs) not in seen:
                    seen.add((one.uses, one.outs))
                    found.append(one)
    ragged = _ragged(call, inference, found, experts, size, work) if experts else None
    if ragged is not None and call.op.name not in (DISPATCH, COMBINE) and any(isinstance(use, Shard) for use in ragged.uses):
        return (ragged,)  # parameters of experts stay where they are, tokens come to them
    return tuple(found) if ragged is None else (*found, ragged)


def _ragged(call: BoundOp, inference: Inference, found: Sequence[Choice], experts: frozenset[int], size: int, work: float) -> Choice | None:
    """The typing in which every rank has the rows of its own experts; None for what has no rows, or does not treat them alike."""
    cut = next((c for c in found if isinstance(c.outs[0], Shard)), None) if call.op.name in (DISPATCH, COMBINE) else None
    if call.op.name == DISPATCH and cut is not None:
        return Choice(cut.uses, (E, E, cut.outs[2]), work / size, "experts")
    if call.op.name == COMBINE and cut is not None:
        return Choice((E, *cut.uses[1:]), cut.outs, work / size, "experts")
    infos, signature = call.op.infos, call.signature
    if signature is None or not any(info.rows for info in infos) or not all(o is None or o.rows for o in call.op.outs):
        return None
    rows = {dims[0] for dims, info in zip(signature.inputs, infos, strict=True) if info.rows and dims}
    outs = [dims[0] for dims, out in zip(signature.outputs, call.op.outs) if out is not None]
    if any(out not in rows or not _is_free(out, signature) for out in outs):
        return None
    uses = [
        E if info.rows else at_rest(info, _of_expert(inference, operand, info, experts, size))
        for operand, info in zip(call.op.operands, infos, strict=True)
    ]
    return Choice(tuple(uses), tuple(I if o is None else E for o in call.op.outs), work / size, "experts")


def _is_free(dim: Dim, signature: Signature) -> bool:
    """Whether a dim is one name that may be cut."""
    return len(dim) == 1 and len(dim[0]) == 1 and dim[0][0] not in signature.fixed


def _of_expert(inference: Inference, operand: fx.Node, info: Info, experts: frozenset[int], size: int) -> Type:
    """How something that is not rows is used beside ragged ones: by experts, if it has one part for each."""
    for d, one in enumerate(inference.dims[value_of(operand)]):
        if one is not None and inference.extents.find(one) in experts:
            return plain(d, info.shape[d])
    return R


def _outs(call: BoundOp, type_: Type) -> tuple[Type, ...]:
    return tuple(I if o is None else at_rest(o, type_) for o in call.op.outs)


def _whole(call: BoundOp, work: float) -> Choice:
    return Choice((I,) * len(call.op.operands), tuple(I for _ in call.op.outs), work, "whole")


def _replicated(call: BoundOp, work: float) -> Choice:
    return Choice(tuple(at_rest(i, R) for i in call.op.infos), _outs(call, R), work, "replicated")


def _partial(call: BoundOp, group: frozenset[int], work: float) -> list[Choice]:
    if len(call.op.outs) != 1 or not call.op.operands:
        return []
    uses = tuple(P if i in group else at_rest(info, R) for i, info in enumerate(call.op.infos))
    return [Choice(uses, (P,), work, "partial")]


def _groups(call: BoundOp, inference: Inference, factor: int) -> list[frozenset[str]]:
    signature = call.signature
    assert signature is not None
    out: list[frozenset[str]] = []
    for name, one in call.names.items():
        if name not in signature.fixed and inference.extents.pattern(one, factor) is not None:
            group = signature.group(name)
            if group not in out and not group & signature.fixed:
                out.append(group)
    return out


def _cut(call: BoundOp, inference: Inference, group: frozenset[str], factor: int, cutting: Cutting, work: float) -> Choice | None:
    signature = call.signature
    assert signature is not None
    typed = [_type(call, inference, labels, group, factor, cutting) for labels in signature.inputs]
    uses = [at_rest(info, t) for info, t in zip(call.op.infos, typed, strict=True) if t is not None]
    if len(uses) < len(typed):
        return None
    held = {i for i, t in enumerate(uses) if isinstance(t, Shard)}
    uses = [P if any(i == at and name in group for at, name in signature.counts) else t for i, t in enumerate(uses)]
    outs: list[Type] = []
    for index, out in enumerate(call.op.outs):
        if out is None:
            outs.append(I)
            continue
        type_ = _type(call, inference, signature.outputs[index], group, factor, cutting)
        if type_ is None:
            return None
        if 0 in out.shape and not isinstance(type_, Shard):
            outs.append(I)
            continue
        if not isinstance(type_, Shard) and held:
            if group & signature.gathers:
                type_ = I
            elif signature.summed is not None and index not in signature.summed:
                return None
            else:
                type_ = P
        outs.append(type_)
    if not held and not any(isinstance(t, Shard) for t in outs):
        return None
    if P in outs:
        # What is added to a contraction must be added once.
        for together in signature.linear:
            if together & held:
                uses = [P if i in together and i not in held else t for i, t in enumerate(uses)]
    if P in outs and any(isinstance(t, Shard) for t in outs) and call.op.name != DISPATCH:
        return None
    return Choice(tuple(uses), tuple(outs), work, " ".join(sorted(group)))


def _type(call: BoundOp, inference: Inference, labels: Dims, group: frozenset[str], factor: int, cutting: Cutting) -> Type | None:
    """The shard of one tensor when `group` is cut; R when it holds none of its names; None when that cannot be."""
    found: Type = R
    for d, dim in enumerate(labels):
        if not any(n in group for segment in dim for n in segment):
            continue
        pattern = pattern_in(call, inference.extents, dim, group, factor)
        cut = cutting(d, pattern, factor) if pattern is not None else None
        if cut is None or isinstance(found, Shard):
            return None
        found = cut
    return found
