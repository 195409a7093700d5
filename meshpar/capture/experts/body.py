"""One expert's forward, lifted to the sorted rows of all experts: a short program, as data.

    one expert   t = mm(x, w[3].t());  y = silu(t) + b[3]
    lifted       t = grouped_mm(x, w.transpose(1, 2), offsets);  y = silu(t) + b[row_expert]

`expert_record` makes such programs by watching an expert run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import pytree
from meshpar.capture.state.places import same
from meshpar.ops.experts import grouped_mm, row_expert

aten = torch.ops.aten


class NotLifted(Exception):
    """Why a forward cannot be lifted; `like_experts`: whether it looks like one of expert layers all the same."""

    def __init__(self, reason: str, *, like_experts: bool = True) -> None:
        super().__init__(reason)
        self.like_experts = like_experts


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier step, or an operand of the body."""

    index: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The number of rows times `factor`."""

    factor: int


@dataclass(frozen=True, slots=True)
class BodyStep:
    """`results` = run(*args, **kwargs), with every Ref and Rows in the arguments replaced by what it stands for."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Body:
    """A lifted forward: rows sorted by expert, the end of each expert's rows, and its operands by name -> rows."""

    operands: Mapping[str, int]
    rows: int
    steps: tuple[BodyStep, ...]
    result: int
    width: int
    """Of the result."""
    narrows: bool
    """Whether it computes somewhere in a narrower type than float64 when it is given float64."""

    def __call__(self, x: Tensor, offsets: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        env: dict[int, Any] = {index: values[name] for name, index in self.operands.items()}
        env[self.rows], env[OFFSETS] = x, offsets
        if any(EXPERT in _refs(step) for step in self.steps):
            env[EXPERT] = row_expert(x, offsets)

        def value(leaf: Any) -> Any:
            return env[leaf.index] if isinstance(leaf, Ref) else leaf.factor * x.shape[0] if isinstance(leaf, Rows) else leaf

        for step in self.steps:
            args, kwargs = pytree.tree_map(value, (step.args, dict(step.kwargs)), is_leaf=lambda leaf: isinstance(leaf, Ref | Rows))
            out = step.run(*args, **kwargs)
            env.update(zip(step.results, out if isinstance(out, tuple | list) else (out,), strict=False))
        return env[self.result]


OFFSETS, EXPERT = -1, -2
"""Places of the offsets and of every row's expert."""


def _refs(step: BodyStep) -> set[int]:
    return {leaf.index for leaf in pytree.tree_leaves((step.args, dict(step.kwargs))) if isinstance(leaf, Ref)}


def read_by(body: Body) -> set[str]:
    """The operands that the body reads."""
    places = set().union(*(_refs(step) for step in body.steps)) | {body.result}
    return {name for name, place in body.operands.items() if place in places}


def pruned(body: Body) -> Body:
    """The body without the steps that its result does not need."""
    needed, kept = {body.result}, []
    for step in reversed(body.steps):
        if needed.intersection(step.results):
            kept.append(step)
            needed |= _refs(step)
    return replace(body, steps=tuple(reversed(kept)))


def idle(body: Body) -> Body:
    """The body that drops nothing."""

    def kept(step: BodyStep) -> BodyStep:
        return BodyStep(identity, step.args[:1], {}, step.results) if step.run is torch.nn.functional.dropout else step

    return replace(body, steps=tuple(map(kept, body.steps)))


# ---- what steps run, where no operator of torch does it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForEach:
    """An operator applied to the tensors of every expert."""

    func: Any
    spec: Any
    rest: tuple[Any, ...]
    places: tuple[int, ...]
    dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        if self.func in (aten.t.default, aten.transpose.int, aten.numpy_T.default) and tensors[0].dim() == 3:
            return tensors[0].transpose(1, 2)
        if self.func is aten._to_copy.default or self.func is aten.detach.default:
            return self._plain(*tensors)
        return torch.func.vmap(self._plain, self.dims)(*tensors)

    def _plain(self, *tensors: Tensor) -> Any:
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)


def gather(stack: Tensor, expert: Tensor, shape: Sequence[int]) -> Tensor:
    """Of every row's expert, in a shape that broadcasts over the row."""
    return stack[expert].reshape(expert.shape[0], *shape)


def grouped_from_left(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Every expert's matrix times rows that lie along dim 1."""
    return grouped_mm(x.transpose(0, 1), w.transpose(1, 2), offsets).transpose(0, 1)


def identity(x: Tensor) -> Tensor:
    return x


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], who: str) -> None:
    """Raise NotLifted where a forward set plain attributes (`stand_in.settings`): in its place, nobody would."""
    changed = [name for name in {**before, **now} if name not in before or not same(now.get(name), before[name])]
    if changed:
        raise NotLifted(f"{who} {', '.join(changed)} in its forward")
