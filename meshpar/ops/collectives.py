"""Every conversion between the types of a value on one mesh axis, as a pair of collectives: one forward, its conjugate backward.

| conversion | forward           | backward                        |
|------------|-------------------|---------------------------------|
| i_to_r     | none              | all-reduce                      |
| i_to_p     | keep on rank 0    | none                            |
| i_to_s     | slice             | all-gather                      |
| r_to_i     | none              | keep on rank 0                  |
| r_to_p     | keep on rank 0    | keep on rank 0                  |
| r_to_s     | slice             | own slice, zeros elsewhere      |
| p_to_i     | all-reduce        | none                            |
| p_to_r     | all-reduce        | all-reduce                      |
| p_to_s     | reduce-scatter    | all-gather                      |
| s_to_i     | all-gather        | slice                           |
| s_to_r     | all-gather        | reduce-scatter                  |
| s_to_p     | own slice, zeros elsewhere | slice                  |
| s_to_s     | all-to-all        | all-to-all                      |

Types: invariant (the same everywhere, and its gradient), replicate (the same, gradient a pending sum), partial (a pending sum, gradient the
same everywhere), shard (`sharding.types.Shard`; here its fields `dim, repeat, segments`, so that fx can print the call).

Every function takes the axis as plain constants: `group`, the name of its process group; `size`; and `rank`, this process's coordinate on
it, or -1 inside `simulate` (all ranks at once). On an axis of size 1 all are the identity. None changes its input, unless the caller gives
it up (`reuse=True`: see `passes.reuse`); results may alias it where nothing is to be done. Values that need no gradient (integers, or under
`no_grad`) skip autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import (
    Primitive,
    all_gather,
    all_reduce,
    all_reduce_in_place,
    all_to_all,
    keep_on_first,
    on_rank,
    own_slice,
    reduce_scatter,
    same,
    zero_padded,
)

PRIMITIVES: Mapping[str, tuple[Primitive, Primitive]] = {
    "i_to_r": (same, all_reduce),
    "i_to_s": (own_slice, all_gather),
    "p_to_r": (all_reduce, all_reduce),
    "p_to_s": (reduce_scatter, all_gather),
    "s_to_r": (all_gather, reduce_scatter),
    "s_to_s": (all_to_all, all_to_all),
}
"""The conversions that send in backward: what they do forward, and backward."""


def i_to_r(x: Tensor, *, group: str, size: int, rank: int, reuse: bool = False) -> Tensor:
    """Invariant to replicate: uses of `x` whose gradients are pending sums; backward adds them up (Megatron's f).

    `reuse`: the sum may be left in the memory of the gradient that arrives, which nothing else reads.
    """
    if size == 1 or not _needs_grad(x):
        return x
    forward, backward = PRIMITIVES["i_to_r"]
    return _Convert.apply(x, forward, all_reduce_in_place if reuse else backward, (), (group, size, rank))


def i_to_r_many(*xs: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, ...]:
    """`i_to_r` of several tensors with one all-reduce per dtype for all their gradients together."""
    needing = [x for x in xs if _needs_grad(x)]
    if size == 1 or not needing:
        return xs
    converted = iter(_ConvertMany.apply(group, size, rank, *needing))
    return tuple(next(converted) if _needs_grad(x) else x for x in xs)


def i_to_p(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Invariant to partial: the value on the axis's first rank, zeros on the others."""
    return x if size == 1 else _convert(x, keep_on_first, same, (), (group, size, rank))


def i_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Invariant to shard: this rank's slice; backward gathers."""
    return x if size == 1 else _convert(x, *PRIMITIVES["i_to_s"], (dim, repeat, segments), (group, size, rank))


def r_to_i(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to invariant: the gradient, the same everywhere, enters the pending sum once."""
    if size == 1 or not _needs_grad(x):
        return x
    return _Convert.apply(x, same, keep_on_first, (), (group, size, rank))


def r_to_p(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to partial: the value on the axis's first rank, zeros on the others."""
    return x if size == 1 else _convert(x, keep_on_first, keep_on_first, (), (group, size, rank))


def r_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to shard: this rank's slice; the gradient stays a pending sum, so backward needs no communication."""
    return x if size == 1 else _convert(x, own_slice, zero_padded, (dim, repeat, segments), (group, size, rank))


def p_to_i(x: Tensor, *, group: str, size: int, rank: int, reuse: bool = False) -> Tensor:
    """Partial to invariant: the sum over the axis (Megatron's g).

    `reuse`: the sum may be left in the memory of `x`, which nothing else reads.
    """
    return x if size == 1 else _convert(x, all_reduce_in_place if reuse else all_reduce, same, (), (group, size, rank))


def p_to_r(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Partial to replicate: the sum over the axis, of the value and of its gradients."""
    return x if size == 1 else _convert(x, *PRIMITIVES["p_to_r"], (), (group, size, rank))


def p_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Partial to shard: this rank's slice of the sum."""
    return x if size == 1 else _convert(x, *PRIMITIVES["p_to_s"], (dim, repeat, segments), (group, size, rank))


def s_to_i(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to invariant: all slices in global order."""
    return x if size == 1 else _convert(x, all_gather, own_slice, (dim, repeat, segments), (group, size, rank))


def s_to_r(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to replicate: all slices in global order; the gradients are added up and scattered."""
    return x if size == 1 else _convert(x, *PRIMITIVES["s_to_r"], (dim, repeat, segments), (group, size, rank))


def s_to_p(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to partial: this rank's slice in its place, zeros elsewhere."""
    return x if size == 1 else _convert(x, zero_padded, own_slice, (dim, repeat, segments), (group, size, rank))


def s_to_s(
    x: Tensor,
    dim: int,
    repeat: int,
    segments: Segments,
    to_dim: int,
    to_repeat: int,
    to_segments: Segments,
    *,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Shard to another shard (another dim, or the same dim cut in another way)."""
    here, there = (dim, repeat, segments), (to_dim, to_repeat, to_segments)
    if size == 1 or here == there:
        return x
    if not _needs_grad(x):
        return all_to_all(x, (*here, *there), (group, size, rank))
    return _Convert.apply(x, *PRIMITIVES["s_to_s"], (*here, *there), (group, size, rank), (*there, *here))


def _needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _convert(x: Tensor, forward: Primitive, backward: Primitive, layout: Any, axis: tuple[str, int, int]) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Convert.apply(x, forward, backward, layout, axis)
    return forward(x, layout, axis)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Primitive, backward: Primitive, layout: Any, axis: Any, back_layout: Any = None) -> Tensor:
        ctx.conjugate, ctx.layout, ctx.axis = backward, layout if back_layout is None else back_layout, axis
        y = forward(x, layout, axis)
        if y is x and forward is all_reduce_in_place:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return ctx.conjugate(grad, ctx.layout, ctx.axis), None, None, None, None, None


class _ConvertMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, size: int, rank: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = (group, size, rank)
        ctx.set_materialize_grads(False)
        return xs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return (None, None, None, *_all_reduce_together(grads, ctx.axis))


def _all_reduce_together(xs: tuple[Tensor | None, ...], axis: tuple[str, int, int]) -> list[Tensor | None]:
    """The sums of several tensors over the axis, in one all-reduce per dtype."""
    results = list(xs)
    for dtype in dict.fromkeys(x.dtype for x in xs if x is not None):
        places = [i for i, x in enumerate(xs) if x is not None and x.dtype == dtype]
        tensors = [x for x in xs if x is not None and x.dtype == dtype]
        if len(tensors) == 1:
            results[places[0]] = all_reduce(tensors[0], (), axis)
            continue
        flat = on_rank(_concatenate, axis, *tensors)
        for i, total in zip(places, on_rank(_separate, axis, all_reduce(flat, (), axis), *tensors)):
            results[i] = total
    return results


def _concatenate(rank: int, *xs: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1) for x in xs])


def _separate(rank: int, flat: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
    return tuple(piece.view(x.shape) for piece, x in zip(flat.split([x.numel() for x in like]), like))


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "meshpar: a parallel model has no second derivative (backward ran with create_graph=True). A model whose loss needs one, as a "
            "penalty on the gradient of its input, is to be trained in torch's DistributedDataParallel."
        )
