"""Experts modules of unknown form whose parameters are stacked over the experts: their own forward, for one expert, lifted to all.

Two calls are known, by shapes and types alone:

    experts(hidden [T, h], index [T, k], weights [T, k] or [T, E])     ->  dispatch, the lifted body, combine
    project(rows [n, i] sorted by expert, sizes: E numbers)            ->  the lifted body

What is lifted is what the module computes when every row goes to one expert. Before it is used, it is compared with the module's forward
under random routings, values and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import pytree
from meshpar.capture.expert_body import Body, NotLifted
from meshpar.capture.expert_proofs import attempt, proven
from meshpar.capture.expert_record import record
from meshpar.capture.stand_in import LARGE, alike, close, derivatives, filled, reduced, stand_in
from meshpar.ops.experts import combine, dispatch


class Sizes(list[Any]):
    """The numbers in a one-dimensional tensor, and the tensor."""

    def __init__(self, numbers: list[Any], tensor: Tensor) -> None:
        super().__init__(numbers)
        self.tensor = tensor

    @staticmethod
    def of(numbers: list[Any], tensor: Tensor) -> list[Any]:
        whole = tensor.dim() == 1 and not tensor.is_floating_point()
        return Sizes(numbers, tensor) if whole else numbers


def experts_of(module: nn.Module) -> int | None:
    """The number of experts, if the module's own parameters may be stacked ones."""
    own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    wide = [p for p in own if p.dim() >= 3]
    counts = {p.shape[0] for p in wide}
    return counts.pop() if len(counts) == 1 and min(counts) > 1 else None


@dataclass(frozen=True)
class Call:
    """How a call of an experts module reads: which leaf of its arguments is what."""

    spec: Any
    leaves: tuple[Any, ...]
    rows: int
    index: int
    weights: int | None
    """None where the rows are sorted already and `index` holds the number of rows of each expert."""

    def with_leaves(self, changed: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


def _is_sizes(leaf: Any) -> bool:
    return isinstance(leaf, Sizes)


def read(module: nn.Module, experts: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | NotLifted | None:
    """The call, if it is one of the known two; None if nothing in it chooses experts."""
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_sizes)
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    whole = [i for i, t in tensors.items() if not t.is_floating_point() and t.dtype != torch.bool]
    floating = [i for i, t in tensors.items() if t.is_floating_point() and t.dim() == 2]
    sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Sizes) and len(leaf) == experts]
    if len(tensors) == 1 and len(floating) == 1 and len(sizes) == 1:
        return Call(spec, tuple(leaves), floating[0], sizes[0], None)
    if len(tensors) == 2 and len(floating) == 1 and len(whole) == 1 and tensors[whole[0]].shape == (experts,):
        return Call(spec, tuple(leaves), floating[0], whole[0], None)
    unknown = NotLifted("it is not called with hidden [T, h], index [T, k] and weights [T, k]") if whole or sizes else None
    if len(tensors) != 3 or len(floating) != 2 or len(whole) != 1 or tensors[whole[0]].dim() != 2:
        return unknown
    tokens, choices = tensors[whole[0]].shape
    widths = {n for p in module.parameters() for n in p.shape[1:]}
    for rows, weights in (floating, floating[::-1]):
        h, w = tensors[rows].shape, tensors[weights].shape
        if h[0] == w[0] == tokens and w[1] in (choices, experts) and (h[1] in widths):
            return Call(spec, tuple(leaves), rows, whole[0], weights)
    return unknown


@dataclass
class Stacks:
    """What was learnt about experts modules during one capture."""

    learnt: list[tuple[nn.Module, Call, Body | NotLifted]] = field(default_factory=list)

    def body(self, module: nn.Module, experts: int, call: Call) -> Body | NotLifted:
        """The lifted forward of `module`, proven; or why there is none."""
        for other, as_called, known in self.learnt:
            if _signature(as_called) == _signature(call) and (other is module or alike(other, module)):
                return known
        found = attempt(lambda: _learn(module, experts, call), "it does not run on a few random rows")
        self.learnt.append((module, call, found))
        return found


def _signature(call: Call) -> tuple[Any, ...]:
    """The call without its number of tokens."""
    shapes = [(leaf.dtype, leaf.dim(), leaf.shape[-1]) if isinstance(leaf, Tensor) else type(leaf) for leaf in call.leaves]
    return (call.spec, *shapes, call.rows, call.index, call.weights)


def run(module: nn.Module, body: Body, experts: int, call: Call) -> Tensor:
    """The module's result, by the lifted body."""
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    rows, index = call.leaves[call.rows], call.leaves[call.index]
    if call.weights is None:
        sizes = index.tensor if isinstance(index, Sizes) else index
        return body(rows, sizes.cumsum(0).to(torch.int32), values)
    weights = call.leaves[call.weights]
    if weights.shape[1] != index.shape[1]:
        weights = weights.gather(1, index)
    x, offsets, perm = dispatch(rows, index, experts)
    return combine(body(x, offsets, values), perm, weights)


def _learn(module: nn.Module, experts: int, call: Call) -> Body:
    def prove(sizes: Mapping[int, int]) -> None:
        exact = _recorded(module, experts, call, torch.double, sizes)
        for seed, (tokens, used) in enumerate(((6, max(2, experts - 1)), (5, experts), (1, experts), (40, 1))):
            _prove(module, experts, call, exact, tokens, used, seed, sizes)

    tensors = [*module.parameters(), *module.buffers()]
    sizes = reduced(tensors, call.leaves[call.rows].shape[1], kept=experts)
    return proven(lambda sizes: _recorded(module, experts, call, None, sizes), prove, sizes)


def _recorded(module: nn.Module, experts: int, call: Call, dtype: torch.dtype | None, sizes: Mapping[int, int]) -> Body:
    double = stand_in(module, torch.Generator().manual_seed(0), dtype=dtype, without=("forward",), sizes=sizes, hollow=True)
    tensors = {**dict(double.named_parameters()), **dict(double.named_buffers())}
    rows = call.leaves[call.rows]
    width = sizes.get(rows.shape[1], rows.shape[1])
    chosen = experts - 1

    def one(x: Tensor) -> Tensor:
        return _call(double, call, _routed_to(call, x, chosen, experts, dtype))

    reason = NotLifted("it has no stacked parameters")
    for least in (1, 2):
        stacks = {name: t for name, t in tensors.items() if t.dim() >= least and t.shape[0] == experts}
        shared = {name: t for name, t in tensors.items() if name not in stacks}
        try:
            return record(one, width, dtype or rows.dtype, stacks=stacks, shared=shared, expert=chosen)
        except NotLifted as error:
            reason = error
    raise reason


def _call(double: nn.Module, call: Call, changed: Mapping[int, Any]) -> Tensor:
    args, kwargs = call.with_leaves(changed)
    return double(*args, **kwargs)


def _routed_to(call: Call, x: Tensor, expert: int, experts: int, dtype: torch.dtype | None) -> dict[int, Any]:
    """The arguments of a call that sends every row to one expert, with a weight of one."""
    count, index = x.shape[0], call.leaves[call.index]
    if call.weights is None:
        sizes = torch.tensor([count if e == expert else 0 for e in range(experts)])
        return {call.rows: x, call.index: sizes.tolist() if isinstance(index, Sizes) else sizes.to(index.dtype)}
    weights = call.leaves[call.weights]
    dense = weights.shape[1] != index.shape[1]
    ones = torch.zeros(count, experts if dense else 1, dtype=dtype or weights.dtype)
    ones[:, expert if dense else 0] = 1
    return {call.rows: x, call.index: torch.full((count, 1), expert, dtype=index.dtype), call.weights: ones}


def _prove(module: nn.Module, experts: int, call: Call, body: Body, tokens: int, used: int, seed: int, sizes: Mapping[int, int]) -> None:
    """Raise NotLifted unless the lifted body gives the module's values and gradients, on `tokens` routed to the first `used` experts."""
    generator = torch.Generator().manual_seed(seed)
    double = stand_in(module, generator, dtype=torch.double, without=("forward",), sizes=sizes)
    rows, index = call.leaves[call.rows], call.leaves[call.index]
    x = filled(torch.empty(tokens, sizes.get(rows.shape[1], rows.shape[1])), generator, torch.double).requires_grad_()
    wanted = [x, *(p for p in double.parameters() if p.requires_grad and p.numel() <= LARGE)]
    if call.weights is None:
        counts = torch.bincount(torch.randint(used, (tokens,), generator=generator), minlength=experts)
        changed = {call.rows: x, call.index: counts.tolist() if isinstance(index, Sizes) else counts.to(index.dtype)}
        ours = Call(
            call.spec, tuple({**dict(enumerate(call.leaves)), call.rows: x, call.index: counts}.values()), call.rows, call.index, None
        )
    else:
        choices = min(index.shape[1], used)
        chosen = torch.stack([torch.randperm(used, generator=generator)[:choices] for _ in range(tokens)])
        weights = torch.rand(tokens, choices, generator=generator, dtype=torch.double) ** 8  # some close to zero
        if call.leaves[call.weights].shape[1] != index.shape[1]:
            weights = torch.zeros(tokens, experts, dtype=torch.double).scatter(1, chosen, weights)
        weights.requires_grad_()
        wanted.append(weights)
        changed = {call.rows: x, call.index: chosen.to(index.dtype), call.weights: weights}
        leaves = tuple({**dict(enumerate(call.leaves)), **changed}.values())
        ours = Call(call.spec, leaves, call.rows, call.index, call.weights)
    before = {name: b.clone() for name, b in double.named_buffers()}
    theirs = _call(double, call, changed)
    changed_buffers = any(not torch.equal(b, before[name]) for name, b in double.named_buffers())
    lifted = run(double, body, experts, ours)
    tolerance = 1e-4 if body.narrows else 1e-9
    if changed_buffers:
        raise NotLifted("it changes its buffers")
    if not isinstance(theirs, Tensor) or not close([lifted], [theirs], tolerance):
        raise NotLifted("lifted from one expert, it gave other values than its forward on random routings")
    if not close(derivatives([lifted], wanted), derivatives([theirs], wanted), tolerance):
        raise NotLifted("lifted from one expert, it gave other gradients than its forward on random routings")
