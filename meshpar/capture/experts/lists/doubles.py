"""Doubles of an owner of experts: the same code on a few random tokens, with simple functions in place of the experts."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import pytree
from meshpar.capture.experts.body import NotLifted
from meshpar.capture.experts.lists.loops import Chain, Loop, calling, defined_in
from meshpar.capture.stand_in import LARGE, filled, stand_in
from meshpar.ops.experts import row_expert


@dataclass(frozen=True, slots=True)
class Trial:
    """Small random inputs: their sizes, their scale, and how far tokens differ from each other."""

    sizes: tuple[int, ...]
    """Of the dims before the last one; where there is one such dim, it has the product."""
    scale: float = 1.0
    spread: float = 1.0
    twins: bool = False
    """Whether parameters of the owner that have one shape are equal: two routers then choose the same experts."""


def members_of(container: nn.Module) -> list[nn.Module]:
    """The modules of a list, without those that hold no parameters: dropout, say."""
    return [child for child in container.children() if next(child.parameters(), None) is not None]


@dataclass(frozen=True)
class Case:
    """The call of an owner of experts that is to be lifted."""

    owner: nn.Module
    container: str
    """The path to its list of experts."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sizes: Mapping[int, int] = field(default_factory=dict)
    """Large numbers -> what doubles have in their place."""

    @property
    def members(self) -> list[nn.Module]:
        return members_of(self.owner.get_submodule(self.container))

    @property
    def tokens(self) -> int:
        """How many tokens the call has."""
        tensors = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return max((prod(map(int, t.shape[:-1])) for t in _rows(tensors)), default=1)

    def small(self, width: int) -> int:
        return self.sizes.get(width, width)

    def double(self, width: int, trial: Trial, seed: int, dtype: torch.dtype | None = torch.double) -> Double:
        """A double whose experts return rows of `width`. `dtype`: of all that is floating; None leaves the types as they are."""
        generator = torch.Generator().manual_seed(seed)
        members = self.members
        kind = dtype or type_of(members[0])
        numbers = (torch.randn(len(members), self.small(width), generator=generator, dtype=torch.double) for _ in range(2))
        scale, shift = (n.to(kind).requires_grad_() for n in numbers)
        calls = SeenCalls()
        experts = [_Simple(calls, *own) for own in zip(scale.unbind(), shift.unbind(), members, strict=True)]
        calls.owner = owner = self._owner(experts, generator, dtype, calls)
        if trial.twins:
            _equalise(owner)
        return Double(owner, scale, shift, *self._inputs(trial, generator, dtype), calls)

    def rows_given(self) -> int:
        """The width of the rows that the experts are given."""
        generator = torch.Generator().manual_seed(0)
        owner = self._owner([_First() for _ in self.members], generator, torch.double)
        args, kwargs = self._inputs(Trial((2, 3)), generator, torch.double)
        try:
            owner(*args, **kwargs)
        except _SeenWidth as seen:
            return seen.width
        raise NotLifted("its members are not called on these inputs", like_experts=False)

    def _owner(
        self, experts: Sequence[nn.Module], generator: torch.Generator, dtype: torch.dtype | None, calls: SeenCalls | None = None
    ) -> nn.Module:
        instead = {id(member): expert for member, expert in zip(self.members, experts, strict=True)}
        dropping = None if calls is None else calls.drop
        return stand_in(
            self.owner, generator, dtype=dtype, instead=instead, without=("forward",), sizes=self.sizes, thin=True, dropping=dropping
        )

    def _inputs(self, trial: Trial, generator: torch.Generator, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same form with few tokens: equal sizes stay equal, the last dim of a floating tensor is a width."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise NotLifted("it is called without a tensor", like_experts=False)
        rows = _rows(tensors)
        leads = [[int(n) for n in (t.shape[:-1] if rows else t.shape) if n > 1] for t in rows or tensors]
        sizes = trial.sizes if any(len(lead) > 1 for lead in leads) else (prod(trial.sizes),)
        fewer = {n: sizes[i % len(sizes)] for i, n in enumerate(dict.fromkeys(n for lead in leads for n in lead))}
        masks, experts = _masks(rows), len(self.members)

        def shrink(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            wide = rows and leaf.dim() > 1 and leaf.dtype != torch.bool and id(leaf) not in masks
            kept = leaf.dim() - 1 if wide else leaf.dim()
            shape = tuple(fewer.get(int(n), int(n)) if d < kept else self.small(int(n)) for d, n in enumerate(leaf.shape))
            if not leaf.is_floating_point():
                return _whole(shape, leaf.dtype, experts, trial, generator)
            made = filled(torch.empty(shape, dtype=leaf.dtype, device="meta"), generator, dtype)
            if len(shape) > 1:
                made = made * (trial.scale * shape[-1] ** 0.5)
                made = made * trial.spread + made.reshape(-1, shape[-1])[:1] * (1 - trial.spread)
            return made.detach().requires_grad_()

        args, kwargs = pytree.tree_unflatten([shrink(leaf) for leaf in leaves], spec)
        return args, kwargs


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that may hold a row per token."""
    return [t for t in tensors if t.is_floating_point() and t.dim() > 1]


def _masks(rows: Sequence[Tensor]) -> set[int]:
    """The ids of those whose last dim is of tokens, as that before it: square ones, but not where that leaves no rows (as many tokens as
    they are wide)."""
    square = [id(t) for t in rows if t.dim() > 2 and t.shape[-1] == t.shape[-2]]
    return set(square if len(square) < len(rows) else square[1:])


def type_of(member: nn.Module) -> torch.dtype:
    """What a module computes in."""
    return next((p.dtype for p in member.parameters() if p.is_floating_point()), torch.float32)


def _whole(shape: tuple[int, ...], dtype: torch.dtype, experts: int, trial: Trial, generator: torch.Generator) -> Tensor:
    """Random numbers that may be an index of experts: those of a row differ, where there are enough."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < (0.7 if trial.scale == 1.0 else 1.0)
    if not shape or shape[-1] > experts:
        return torch.randint(experts, shape, generator=generator).to(dtype)
    order = torch.rand(*shape[:-1], experts, generator=generator).argsort(-1)[..., : shape[-1]].to(dtype)
    return order if trial.spread == 1.0 else order.reshape(-1, shape[-1])[:1].expand(shape).clone()


def _equalise(owner: nn.Module) -> None:
    first: dict[torch.Size, Tensor] = {}
    with torch.no_grad():
        for parameter in owner.parameters():
            if parameter.numel() <= LARGE:
                parameter.copy_(first.setdefault(parameter.shape, parameter))


@dataclass(frozen=True)
class Double:
    """A double of the owner whose experts are simple."""

    owner: nn.Module
    scale: Tensor
    """Of every expert, [E, width]."""
    shift: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: SeenCalls

    def run(self, loop: Loop | None = None, instead: Any = None) -> Any:
        """The owner's forward; while it runs, the function of `loop` is `instead`."""
        torch.manual_seed(0)
        self.calls.count, self.calls.first = 0, None
        if loop is None:
            return self.owner(*self.args, **self.kwargs)
        return calling(self.owner, loop, instead, self.args, self.kwargs)

    def body(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.chosen(x, row_expert(x, offsets))

    def chosen(self, rows: Tensor, expert: Tensor) -> Tensor:
        """What the experts of these rows make of them."""
        return _simple(rows, self.scale[expert], self.shift[expert])

    @property
    def experts(self) -> int:
        return self.scale.shape[0]

    def wanted(self) -> list[Tensor]:
        """What derivatives are compared for."""
        inputs = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return [*inputs, self.scale, self.shift] + [p for p in self.owner.parameters() if p.requires_grad and p.numel() <= LARGE]

    def left_behind(self) -> list[Tensor]:
        """Tensors that a forward keeps in its module: buffers and plain attributes."""
        found = []
        for module in self.owner.modules():
            found += [value for value in module.__dict__.values() if isinstance(value, Tensor)]
            found += [value for value in module._buffers.values() if value is not None]
        return found


@dataclass
class SeenCalls:
    """What the simple experts saw."""

    owner: nn.Module | None = None
    chains: list[Chain] = field(default_factory=list)
    """For every call, the functions of the owner that were running."""
    given: set[tuple[int, int]] = field(default_factory=set)
    """Numbers of dims and widths of what they got."""
    count: int = 0
    """Of the calls in a run."""
    first: Tensor | None = None
    """The result of the first one, until the second one has been made."""
    drops: int = 0
    """How often the owner has dropped elements at random, were it not a double."""

    def drop(self, module: nn.Module, p: float, x: Tensor) -> Tensor:
        self.drops += 1
        return x


class _Simple(nn.Module):
    """An expert that is a nonlinear function of each row with random numbers of its own."""

    def __init__(self, calls: SeenCalls, scale: Tensor, shift: Tensor, member: nn.Module) -> None:
        super().__init__()
        self.__dict__["member"] = member  # not a submodule
        self.calls, self.numbers = calls, (scale, shift)
        self.unread = nn.Parameter(torch.zeros(1, dtype=scale.dtype))  # code may ask for its type

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = _only(args, kwargs)
        calls = self.calls
        if calls.first is not None and _depends(x, calls.first):
            raise NotLifted("its members run one after another", like_experts=False)
        calls.chains.append(_chain(calls.owner))
        calls.given.add((x.dim(), x.shape[-1]))
        result = _simple(x, *self.numbers)
        calls.first = result if calls.count == 0 else None  # kept for the second call only
        calls.count += 1
        return result

    def __getattr__(self, name: str) -> Any:
        if name != "member" and hasattr(self.member, name):
            raise NotLifted(f"its forward reads {name!r} of its members, beside calling them")
        return super().__getattr__(name)


def _simple(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wave = torch.sin(x)
    return (wave if wave.shape[-1] == scale.shape[-1] else wave.mean(-1, keepdim=True)) * scale + shift


class _SeenWidth(Exception):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class _First(nn.Module):
    """An expert that ends the run."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _SeenWidth(_only(args, kwargs).shape[-1])


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() == 0:
        raise NotLifted("its members are called with more than one tensor", like_experts=False)
    return args[0]


def _depends(x: Tensor, source: Tensor) -> bool:
    return (
        x.requires_grad
        and source.requires_grad
        and torch.autograd.grad(x.sum(), source, retain_graph=True, allow_unused=True)[0] is not None
    )


def _chain(owner: nn.Module | None) -> Chain:
    """The methods of `owner` that are running, and the line each is at."""
    chain: list[tuple[types.CodeType, int]] = []
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        own = code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is owner
        if own and defined_in(type(owner), code) not in (None, nn.Module):
            chain.append((code, frame.f_lineno))
        frame = frame.f_back
    return tuple(reversed(chain))
