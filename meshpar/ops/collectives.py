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

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar._torch import LocalTensor, below_autograd, functional, is_view
from meshpar.sharding.types import Shard, chunk
from meshpar.simulate import axis_rank, per_rank

Segments = tuple[tuple[int, int], ...]

# ---------------------------------------------------------------------------------------------------------------- conversions


def i_to_r(x: Tensor, *, group: str, size: int, rank: int, reuse: bool = False) -> Tensor:
    """Invariant to replicate: uses of `x` whose gradients are pending sums; backward adds them up (Megatron's f).

    `reuse`: the sum may be left in the memory of the gradient that arrives, which nothing else reads.
    """
    if size == 1 or not _needs_grad(x):
        return x
    return _Convert.apply(x, _same, _all_reduce_in_place if reuse else _all_reduce, (), (group, size, rank))


def i_to_r_many(*xs: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, ...]:
    """`i_to_r` of several tensors with one all-reduce per dtype for all their gradients together."""
    needing = [x for x in xs if _needs_grad(x)]
    if size == 1 or not needing:
        return xs
    converted = iter(_ConvertMany.apply(group, size, rank, *needing))
    return tuple(next(converted) if _needs_grad(x) else x for x in xs)


def i_to_p(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Invariant to partial: the value on the axis's first rank, zeros on the others."""
    return x if size == 1 else _convert(x, _keep_on_first, _same, (), (group, size, rank))


def i_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Invariant to shard: this rank's slice; backward gathers."""
    return x if size == 1 else _convert(x, _slice, _all_gather, (dim, repeat, segments), (group, size, rank))


def r_to_i(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to invariant: the gradient, the same everywhere, enters the pending sum once."""
    if size == 1 or not _needs_grad(x):
        return x
    return _Convert.apply(x, _same, _keep_on_first, (), (group, size, rank))


def r_to_p(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to partial: the value on the axis's first rank, zeros on the others."""
    return x if size == 1 else _convert(x, _keep_on_first, _keep_on_first, (), (group, size, rank))


def r_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Replicate to shard: this rank's slice; the gradient stays a pending sum, so backward needs no communication."""
    return x if size == 1 else _convert(x, _slice, _zero_padded, (dim, repeat, segments), (group, size, rank))


def p_to_i(x: Tensor, *, group: str, size: int, rank: int, reuse: bool = False) -> Tensor:
    """Partial to invariant: the sum over the axis (Megatron's g).

    `reuse`: the sum may be left in the memory of `x`, which nothing else reads.
    """
    return x if size == 1 else _convert(x, _all_reduce_in_place if reuse else _all_reduce, _same, (), (group, size, rank))


def p_to_r(x: Tensor, *, group: str, size: int, rank: int) -> Tensor:
    """Partial to replicate: the sum over the axis, of the value and of its gradients."""
    return x if size == 1 else _convert(x, _all_reduce, _all_reduce, (), (group, size, rank))


def p_to_s(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Partial to shard: this rank's slice of the sum."""
    return x if size == 1 else _convert(x, _reduce_scatter, _all_gather, (dim, repeat, segments), (group, size, rank))


def s_to_i(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to invariant: all slices in global order."""
    return x if size == 1 else _convert(x, _all_gather, _slice, (dim, repeat, segments), (group, size, rank))


def s_to_r(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to replicate: all slices in global order; the gradients are added up and scattered."""
    return x if size == 1 else _convert(x, _all_gather, _reduce_scatter, (dim, repeat, segments), (group, size, rank))


def s_to_p(x: Tensor, dim: int, repeat: int, segments: Segments, *, group: str, size: int, rank: int) -> Tensor:
    """Shard to partial: this rank's slice in its place, zeros elsewhere."""
    return x if size == 1 else _convert(x, _zero_padded, _slice, (dim, repeat, segments), (group, size, rank))


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
        return _all_to_all(x, (*here, *there), (group, size, rank))
    return _Convert.apply(x, _all_to_all, _all_to_all, (*here, *there), (group, size, rank), (*there, *here))


conjugates: Mapping[str, tuple[str | None, str | None]] = {
    "i_to_r": (None, "all_reduce"),
    "i_to_r_many": (None, "all_reduce"),
    "i_to_p": (None, None),
    "i_to_s": (None, "all_gather"),
    "r_to_i": (None, None),
    "r_to_p": (None, None),
    "r_to_s": (None, None),
    "p_to_i": ("all_reduce", None),
    "p_to_r": ("all_reduce", "all_reduce"),
    "p_to_s": ("reduce_scatter", "all_gather"),
    "s_to_i": ("all_gather", None),
    "s_to_r": ("all_gather", "reduce_scatter"),
    "s_to_p": (None, None),
    "s_to_s": ("all_to_all", "all_to_all"),
}
"""Conversion -> the collective it runs forward and the one it runs backward."""

# -------------------------------------------------------------------------------------------------------------------- traffic


class Traffic(NamedTuple):
    """One collective: what it is, when it runs ("forward" or "backward"), and the bytes each device sends."""

    kind: str
    phase: str
    nbytes: int


def traffic(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    size: int,
    dim: int = 0,
    repeat: int = 1,
    segments: Segments = (),
    to_dim: int = 0,
    to_repeat: int = 1,
    to_segments: Segments = (),
    *,
    grad: bool = True,
) -> list[Traffic]:
    """The collectives that conversion `name` runs, with the bytes per device of the ring algorithms.

    `shape` is the value's shape before this axis cuts it, the layouts are those of the call; `grad=False` leaves the backward out.
    With n ranks and a tensor of B bytes: all-reduce 2(n-1)/n B, all-gather and reduce-scatter (n-1)/n B, all-to-all (n-1)/n of a
    rank's share. Uneven shards are padded to the largest, and so counted.

    >>> traffic("p_to_i", (4, 8), torch.float32, 2)
    [Traffic(kind='all_reduce', phase='forward', nbytes=128)]
    """
    if size == 1:
        return []
    here, there = (dim, repeat, segments), (to_dim, to_repeat, to_segments)
    if name == "s_to_s" and here == there:
        return []
    forward, backward = conjugates[name]
    found = [(forward, "forward"), (backward if grad else None, "backward")]
    return [
        Traffic(kind, phase, _ring_elements(kind, shape, here, there, size) * dtype.itemsize) for kind, phase in found if kind is not None
    ]


def _ring_elements(kind: str, shape: tuple[int, ...], here: Any, there: Any, size: int) -> int:
    """Elements that each device sends."""
    if kind == "all_reduce":
        return 2 * (size - 1) * -(-prod(shape) // size)
    if kind in ("all_gather", "reduce_scatter"):
        return (size - 1) * max(_numels(shape, here, size))
    if kind == "all_to_all":
        return (size - 1) * _largest_piece(shape, here, there, size)
    raise ValueError(f"unknown collective {kind!r}")


def _largest_piece(shape: tuple[int, ...], here: Any, there: Any, size: int) -> int:
    if here[0] != there[0]:
        return _piece_numel(shape, here, there, size)
    return _largest_move(_moves(*here[1:], *there[1:], size)) * prod(n for d, n in enumerate(shape) if d != here[0])


# ------------------------------------------------------------------------------------------------------------------- autograd

Primitive = Callable[[Tensor, Any, Any], Tensor]
"""`(x, layout, axis) -> y` without autograd: `layout` is () or the fields of one shard or two, `axis` is (group, size, rank)."""


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
        if y is x and forward is _all_reduce_in_place:
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
            results[places[0]] = _all_reduce(tensors[0], (), axis)
            continue
        flat = on_rank(_concatenate, axis, *tensors)
        for i, total in zip(places, on_rank(_separate, axis, _all_reduce(flat, (), axis), *tensors)):
            results[i] = total
    return results


def _concatenate(rank: int, *xs: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1) for x in xs])


def _separate(rank: int, flat: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
    return tuple(piece.view(x.shape) for piece, x in zip(flat.split([x.numel() for x in like]), like))


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("meshpar: conversions between shardings have no second derivative (backward ran with create_graph=True).")


# ----------------------------------------------------------------------------------------------- primitives: (x, layout, axis) -> y


def _same(x: Tensor, layout: Any, axis: Any) -> Tensor:
    return x


def _all_reduce(x: Tensor, layout: Any, axis: Any) -> Tensor:
    group, _, rank = axis
    return call(functional.all_reduce.default, _held_by_all(x, rank), "sum", group)


def _all_reduce_in_place(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The sum in the memory of `x`, where that is one stretch and not, for autograd, a view of something else; then it is `x` itself."""
    group, _, rank = axis
    if rank < 0 or torch.compiler.is_compiling() or not x.is_contiguous() or (x.requires_grad and is_view(x)):
        return _all_reduce(x, layout, axis)
    with below_autograd():
        functional.wait_tensor.default(functional.all_reduce_.default(x, "sum", group))
    return x


def _keep_on_first(x: Tensor, layout: Any, axis: Any) -> Tensor:
    return on_rank(lambda rank, x: x if rank == 0 else torch.zeros_like(x), axis, x)


def _slice(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """This rank's part, as a copy: a view would keep the whole tensor alive."""
    return on_rank(lambda rank, x: _take(x, layout, axis[1], rank).clone(memory_format=torch.contiguous_format), axis, x)


def _zero_padded(x: Tensor, layout: Any, axis: Any) -> Tensor:
    return on_rank(lambda rank, x: _surround(x, layout, axis[1], rank), axis, x)


def _all_gather(x: Tensor, layout: Any, axis: Any) -> Tensor:
    group, size, rank = axis
    dim, repeat, segments = layout
    if x.dtype in _CARRIERS:
        return _carried(_all_gather, x, layout, axis)
    if len(segments) == 1 and segments[0][0] % size == 0:
        gathered = call(functional.all_gather_into_tensor.default, _held_by_all(x, rank).contiguous(), size, group)
        if dim == 0 and repeat == 1:
            return gathered
        return on_rank(lambda rank, y, x: _ranks_inside(y, x.shape, dim, repeat, size), axis, gathered, x)
    flat = on_rank(lambda rank, x: _padded(x.reshape(-1), max(_numels(x.shape, layout, size))), axis, x)
    gathered = call(functional.all_gather_into_tensor.default, flat, size, group)
    return on_rank(lambda rank, y, x: _join(_unpack(y, _local_shapes(x.shape, layout, size)), layout, size), axis, gathered, x)


def _reduce_scatter(x: Tensor, layout: Any, axis: Any) -> Tensor:
    group, size, rank = axis
    dim, repeat, segments = layout
    if len(segments) == 1 and segments[0][0] % size == 0:
        if dim == 0 and repeat == 1:
            return call(functional.reduce_scatter_tensor.default, _held_by_all(x, rank).contiguous(), "sum", size, group)
        parts = on_rank(lambda rank, x: _ranks_first(x, dim, repeat, size), axis, x)
        mine = call(functional.reduce_scatter_tensor.default, parts, "sum", size, group)
        return on_rank(lambda rank, y, x: y.view(_local_shape(x.shape, layout, size, rank)), axis, mine, x)
    packed = on_rank(lambda rank, x: _pack([_take(x, layout, size, r) for r in range(size)], max(_numels(x.shape, layout, size))), axis, x)
    mine = call(functional.reduce_scatter_tensor.default, packed, "sum", size, group)
    return on_rank(lambda rank, y, x: _unpadded(y, _local_shape(x.shape, layout, size, rank)), axis, mine, x)


def _all_to_all(x: Tensor, layouts: Any, axis: Any) -> Tensor:
    here, there = layouts[:3], layouts[3:]
    if x.dtype in _CARRIERS:
        return _carried(_all_to_all, x, layouts, axis)
    if x.is_complex():
        return torch.view_as_complex(_all_to_all(torch.view_as_real(x), layouts, axis).contiguous())
    if here[0] == there[0]:
        return _cut_anew(x, here, there, axis)
    group, size, _ = axis
    if all(len(segments) == 1 and segments[0][0] % size == 0 for segments in (here[2], there[2])):
        moved = _exchange(on_rank(lambda rank, x: _ranks_first(x, there[0], there[1], size), axis, x), size, group)
        return on_rank(
            lambda rank, y, x: _ranks_inside(y, _local_shape(x.shape, there, size, rank), here[0], here[1], size), axis, moved, x
        )
    parts = on_rank(
        lambda rank, x: _pack([_take(x, there, size, r) for r in range(size)], _piece_numel(x.shape, here, there, size)), axis, x
    )
    moved = _exchange(parts, size, group)
    return on_rank(lambda rank, y, x: _join(_unpack(y, _pieces_for(x.shape, here, there, size, rank)), here, size), axis, moved, x)


def _cut_anew(x: Tensor, here: Any, there: Any, axis: Any) -> Tensor:
    """The exchange between two layouts of the same dim."""
    group, size, _ = axis
    moves = _moves(here[1], here[2], there[1], there[2], size)
    moved = _exchange(on_rank(lambda rank, x: _pack_moves(x, here[0], moves, rank), axis, x), size, group)
    return on_rank(lambda rank, y, x: _unpack_moves(y, x.shape, here[0], moves, rank), axis, moved, x)


# ------------------------------------------------------------------------------------------------------- calls to torch, and ranks


def call(op: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Run a functional collective and wait for it, past the autograd layer that torch registers for it in Python."""
    if torch.compiler.is_compiling():
        return functional.wait_tensor.default(op(x, *args))
    with below_autograd():
        return functional.wait_tensor.default(op(x, *args))


def _exchange(parts: Tensor, size: int, group: str) -> Tensor:
    """Piece q of dim 0 (of `size` equal pieces) goes to rank q."""
    split = [parts.shape[0] // size] * size
    return call(functional.all_to_all_single.default, parts, split, split, group)


def on_rank(fn: Callable[..., Any], axis: tuple[str, int, int], *tensors: Tensor) -> Any:
    """`fn(rank on the axis, *tensors)`, here or for every simulated rank."""
    group, _, rank = axis
    if rank >= 0:
        return fn(rank, *tensors)
    return per_rank(lambda world_rank, *local: fn(axis_rank(group, world_rank), *local), *tensors)


def _held_by_all(x: Tensor, rank: int) -> Tensor:
    """Inside `simulate` a tensor made outside of it, once for all ranks, becomes one per rank: the collectives would pass it over."""
    if rank >= 0 or isinstance(x, LocalTensor):
        return x
    return per_rank(lambda _, x: x, x)


# What no backend moves as it is, and what it travels as.
_CARRIERS = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


def _carried(primitive: Primitive, x: Tensor, layout: Any, axis: Any) -> Tensor:
    """Run a primitive that only moves values on a dtype that the backends know."""
    carrier = _CARRIERS[x.dtype]
    if carrier.itemsize == x.dtype.itemsize:
        return primitive(x.view(carrier), layout, axis).view(x.dtype)
    return primitive(x.to(carrier), layout, axis).to(x.dtype)


# ------------------------------------------------------------------------------------------- even layouts of one segment: reshapes


def _ranks_inside(y: Tensor, local: tuple[int, ...], dim: int, repeat: int, size: int) -> Tensor:
    """`[size * local[0], ...]`, one local tensor after the other, put in global order along `dim`.

    rank 0: | a0 b0 |   rank 1: | a1 b1 |    ->    a0 a1 b0 b1     (repeat 2)
    """
    shape = (*local[:dim], local[dim] * size, *local[dim + 1 :])
    outer = prod(local[:dim]) * repeat
    if outer == 1 or y.numel() == 0:
        return y.view(shape)
    return y.view(size, outer, -1).transpose(0, 1).reshape(shape)


def _ranks_first(x: Tensor, dim: int, repeat: int, size: int) -> Tensor:
    """The slices of all ranks, one after the other: `[size, the slice flattened]`."""
    outer = prod(x.shape[:dim]) * repeat
    inner = x.numel() // (outer * size) if outer else 0
    return x.reshape(outer, size, inner).transpose(0, 1).contiguous().view(size, outer * inner)


# ------------------------------------------------------------------------------------------------------ any layout: take and join


@torch.compiler.assume_constant_result
def _cuts(segments: Segments, size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank and segment: the range it holds inside one stretch."""
    return _cached_cuts(segments, size)


@lru_cache(maxsize=4096)
def _cached_cuts(segments: Segments, size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    starts = [0]
    for units, unit in segments:
        starts.append(starts[-1] + units * unit)
    bounds = [[chunk(units, size, rank) for units, _ in segments] for rank in range(size)]
    return tuple(
        tuple((starts[i] + low * segments[i][1], starts[i] + high * segments[i][1]) for i, (low, high) in enumerate(row)) for row in bounds
    )


def _local_length(layout: Any, size: int, rank: int) -> int:
    return layout[1] * sum(high - low for low, high in _cuts(layout[2], size)[rank])


def _local_shape(shape: tuple[int, ...], layout: Any, size: int, rank: int) -> tuple[int, ...]:
    return (*shape[: layout[0]], _local_length(layout, size, rank), *shape[layout[0] + 1 :])


def _take(x: Tensor, layout: Any, size: int, rank: int) -> Tensor:
    """`rank`'s slice of the whole `x` (a view where that is possible)."""
    dim, repeat, segments = layout
    stretches, along = _stretched(x, dim, repeat)
    pieces = [stretches.narrow(along, low, high - low) for low, high in _cuts(segments, size)[rank]]
    taken = pieces[0] if len(pieces) == 1 else torch.cat(pieces, along)
    return taken if repeat == 1 else taken.flatten(dim, along)


def _join(parts: Sequence[Tensor], layout: Any, size: int) -> Tensor:
    """The whole tensor from the slices of all ranks."""
    dim, repeat, segments = layout
    cuts = _cuts(segments, size)
    places = [0] * size
    pieces = []
    for segment in range(len(segments)):
        for rank in range(size):
            low, high = cuts[rank][segment]
            stretches, along = _stretched(parts[rank], dim, repeat)
            pieces.append(stretches.narrow(along, places[rank], high - low))
            places[rank] += high - low
    joined = torch.cat(pieces, along)
    return joined if repeat == 1 else joined.flatten(dim, along)


def _stretched(x: Tensor, dim: int, repeat: int) -> tuple[Tensor, int]:
    """`x` with the stretches of `dim` as a dim of their own, and the dim inside the stretches."""
    if repeat == 1:
        return x, dim
    return x.unflatten(dim, (repeat, x.shape[dim] // repeat)), dim + 1


def _surround(x: Tensor, layout: Any, size: int, rank: int) -> Tensor:
    """The whole tensor with `x` as `rank`'s slice and zeros as the others."""
    dim, repeat, segments = layout
    if repeat == 1 and len(segments) == 1:
        low, high = _cuts(segments, size)[rank][0]
        return pad(x, (0, 0) * (x.dim() - 1 - dim) + (low, segments[0][0] * segments[0][1] - high))
    parts = [x if r == rank else x.new_zeros(_local_shape(x.shape, layout, size, r)) for r in range(size)]
    return _join(parts, layout, size)


# --------------------------------------------------------------------------------- any layout: pieces padded to one length and back


def _padded(flat: Tensor, length: int) -> Tensor:
    return flat if flat.numel() == length else pad(flat, (0, length - flat.numel()))


def _unpadded(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: prod(shape)].view(shape)


def _pack(pieces: Sequence[Tensor], length: int) -> Tensor:
    """The pieces as rows of one length."""
    return torch.stack([_padded(piece.reshape(-1), length) for piece in pieces]).view(-1)


def _unpack(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [_unpadded(row, shape) for row, shape in zip(flat.view(len(shapes), -1), shapes)]


def _local_shapes(shape: tuple[int, ...], layout: Any, size: int) -> list[tuple[int, ...]]:
    return [_local_shape(shape, layout, size, rank) for rank in range(size)]


def _numels(shape: tuple[int, ...], layout: Any, size: int) -> list[int]:
    return [prod(local) for local in _local_shapes(shape, layout, size)]


def _pieces_for(shape: tuple[int, ...], here: Any, there: Any, size: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what `rank` gets from every rank when `here` becomes `there` on another dim."""
    return _local_shapes(_local_shape(shape, there, size, rank), here, size)


def _piece_numel(shape: tuple[int, ...], here: Any, there: Any, size: int) -> int:
    return max(prod(piece) for rank in range(size) for piece in _pieces_for(shape, here, there, size, rank))


# ---------------------------------------------------------------------------------------- one dim cut anew: which ranges go where

Ranges = tuple[tuple[int, int], ...]
Moves = tuple[tuple[Ranges, ...], ...]


@torch.compiler.assume_constant_result
def _moves(repeat: int, segments: Segments, to_repeat: int, to_segments: Segments, size: int) -> Moves:
    """`moves[p][q]`: the global ranges that rank p holds before and rank q after, ascending."""
    return _cached_moves(repeat, segments, to_repeat, to_segments, size)


@lru_cache(maxsize=1024)
def _cached_moves(repeat: int, segments: Segments, to_repeat: int, to_segments: Segments, size: int) -> Moves:
    here, there = Shard(0, repeat, segments), Shard(0, to_repeat, to_segments)
    after = [there.ranges(size, rank) for rank in range(size)]
    return tuple(tuple(_common(here.ranges(size, rank), wanted) for wanted in after) for rank in range(size))


def _common(a: Ranges, b: Ranges) -> Ranges:
    """The intersection of two ascending lists of ranges.

    >>> _common(((0, 4), (8, 12)), ((2, 9),))
    ((2, 4), (8, 9))
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low < high:
            found.append((low, high))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def _largest_move(moves: Moves) -> int:
    return max(_length(ranges) for row in moves for ranges in row)


def _length(ranges: Ranges) -> int:
    return sum(high - low for low, high in ranges)


def _pack_moves(x: Tensor, dim: int, moves: Moves, rank: int) -> Tensor:
    """What `rank` sends to each rank, padded to one length."""
    rows = x.movedim(dim, 0)
    lengths = [(low, to, high - low) for to, ranges in enumerate(moves[rank]) for low, high in ranges]
    pieces: list[list[Tensor]] = [[rows[:0]] for _ in moves]
    place = 0
    for _, to, length in sorted(lengths):  # the rank's rows lie in global order
        pieces[to].append(rows.narrow(0, place, length))
        place += length
    return _pack([torch.cat(piece) for piece in pieces], _largest_move(moves) * prod(rows.shape[1:]))


def _unpack_moves(y: Tensor, shape: tuple[int, ...], dim: int, moves: Moves, rank: int) -> Tensor:
    """This rank's rows from what every rank sent it, in global order. `shape` is that of its tensor before."""
    rest = (*shape[:dim], *shape[dim + 1 :])
    sent = _unpack(y, [(_length(row[rank]), *rest) for row in moves])
    found: list[tuple[int, Tensor]] = []
    for piece, row in zip(sent, moves):
        lengths = [high - low for low, high in row[rank]]
        found += zip((low for low, _ in row[rank]), piece.split(lengths))
    found.sort(key=lambda item: item[0])
    return torch.cat([sent[0][:0], *(piece for _, piece in found)]).movedim(0, dim).contiguous()
