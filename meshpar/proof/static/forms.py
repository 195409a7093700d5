"""One operator on one axis: from the types of its operands those of its results, and what becomes of gradients.

A gradient is WHOLE (the true one, of a part that of the part) or PARTIAL (a pending sum over the ranks). Where all operands are the same on
all ranks, they get what the result gets (AS_RESULT); else the result's has to be whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from meshpar.proof.static.actions import OperatorAction
from meshpar.proof.static.layout import CutLayout, around, inside, layout_of, normal, of_layout
from meshpar.proof.static.report import Contradiction, Unproved
from meshpar.sharding.types import I, P, Partial, Ragged, Shard, Type


class Gradient(Enum):
    """What an operand's gradient is."""

    AS_RESULT = "as the result's"
    WHOLE = "whole"
    PARTIAL = "a pending sum"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The types of the results, and the gradients of the operands."""

    outs: tuple[Type, ...]
    back: tuple[Gradient, ...]


AS_RESULT, WHOLE, PARTIAL = Gradient.AS_RESULT, Gradient.WHOLE, Gradient.PARTIAL
_RAGGED: CutLayout = (0, ())


def unchanged(results: int, operands: int) -> Outcome:
    """Operands that are the same on all ranks give results that are."""
    return Outcome((I,) * results, (AS_RESULT,) * operands)


def through(action: OperatorAction, types: Sequence[Type], ranks: int) -> Outcome:
    """What an operator gives for operands of these types. Raises Contradiction where that is nothing of the whole result."""
    cut = _cut(action, types, ranks)
    sums = frozenset(i for i, t in enumerate(types) if isinstance(t, Partial))
    if cut is None:
        return _linear(action, sums, len(types)) if sums else unchanged(len(action.outputs), len(types))
    name, layout = cut
    having = frozenset(i for i, dims in enumerate(action.inputs) if name in _names(dims))
    for i in sorted(having):
        if not isinstance(types[i], (Shard, Ragged)):
            raise Contradiction(f"operand {i + 1} is {told(types[i])} along a dim of which another operand has a part on each rank")
    if name in action.whole:
        raise Contradiction("a dim that it needs whole is cut")
    counting = frozenset(i for i, counted in action.counts.items() if counted == name and i < len(types))
    if missing := [i for i in counting if not isinstance(types[i], (Partial, Ragged))]:
        raise Contradiction(f"operand {missing[0] + 1} counts what all ranks have together, and each has a part")
    sums -= counting
    outs = tuple(I if dims is None else _out(dims, name, layout, action) for dims in action.outputs)
    gone = [isinstance(t, Partial) for t in outs]
    if not any(gone):
        if sums:
            raise Contradiction(f"operand {min(sums) + 1} is a pending sum where another is cut")
        return Outcome(outs, tuple(WHOLE if i in having else PARTIAL for i in range(len(types))))
    if action.additive and sums:
        raise Contradiction(f"operand {min(sums) + 1} is a pending sum where another is cut")
    if not action.additive and not any(group & having and group - having == sums for group in action.linear):
        raise Contradiction("what the ranks have of a dim that is summed over does not add up: something is added on every rank")
    return Outcome(outs, tuple(WHOLE if i in having or i in sums else PARTIAL for i in range(len(types))))


def _linear(action: OperatorAction, sums: frozenset[int], count: int) -> Outcome:
    if sums not in action.linear:
        raise Contradiction(
            f"operand {min(sums) + 1} is a pending sum, and the operator is not linear in {'it' if len(sums) == 1 else 'them together'}"
        )
    return Outcome((P,) * len(action.outputs), tuple(WHOLE if i in sums else PARTIAL for i in range(count)))


def _cut(action: OperatorAction, types: Sequence[Type], ranks: int) -> tuple[str, CutLayout] | None:
    """The one name that is cut, and how."""
    found: dict[str, CutLayout] = {}
    for i, (type_, dims) in enumerate(zip(types, action.inputs, strict=True)):
        if isinstance(type_, Ragged):
            one: tuple[str, CutLayout] | None = (dims[0][0][0], _RAGGED) if dims and dims[0] else None
        elif isinstance(type_, Shard):
            dim = dims[type_.dim]
            one = inside(dim[0], action.sizes, layout_of(type_, ranks)) if len(dim) == 1 else None
        else:
            continue
        if one is None:
            raise Unproved(f"operand {i + 1} is cut in a way that is not followed")
        name, layout = one
        layout = layout if layout is _RAGGED else normal(layout, ranks)
        if found.setdefault(name, layout) != layout:
            raise Contradiction("operands are cut into different parts")
    if len(found) > 1:
        raise Contradiction("operands are cut along different dims")
    return next(iter(found.items()), None)


def _out(dims: Sequence[Sequence[Sequence[str]]], name: str, layout: CutLayout, action: OperatorAction) -> Type:
    for at, dim in enumerate(dims):
        for factors in dim:
            if name in factors:
                if layout is _RAGGED:
                    return Ragged()
                return of_layout(at, around(factors, action.sizes, name, layout))
    return P


def _names(dims: Sequence[Sequence[Sequence[str]]]) -> set[str]:
    return {name for dim in dims for factors in dim for name in factors}


def told(type_: Type) -> str:
    """A type in words."""
    if isinstance(type_, Shard):
        return f"a part of dim {type_.dim} on each rank"
    if isinstance(type_, Partial):
        return "a pending sum"
    if isinstance(type_, Ragged):
        return "the rows of each rank's experts"
    return "the same on all ranks"
