"""What conversions are made of: one collective, or none, from a tensor to a tensor, without autograd.

All have one signature, `(x, layout, axis) -> y`: `layout` is () or the fields of one shard or two, `axis` is (group, size, rank).
Those that send can be started apart from being waited for:

    y = all_gather(x, layout, axis)             finish = STARTS[all_gather](x, layout, axis)
                                                ...                                             (x must not change)
                                                y = finish()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar._torch import LocalTensor, below_autograd, functional, is_view, resolve_process_group
from meshpar.ops.layouts import (
    join,
    local_shape,
    local_shapes,
    moves_between,
    numels,
    pack,
    pack_moves,
    padded,
    piece_numel,
    pieces_for,
    ranks_first,
    ranks_inside,
    surround,
    take,
    unpack,
    unpack_moves,
    unpadded,
)
from meshpar.simulate import axis_rank, per_rank

Primitive = Callable[[Tensor, Any, Any], Tensor]
"""`(x, layout, axis) -> y` without autograd: `layout` is () or the fields of one shard or two, `axis` is (group, size, rank)."""
Finish = Callable[[], Tensor]
"""Waits for a collective that was started, and gives its result. To be called once."""
Starting = Callable[[Tensor, Any, Any], Finish]
"""A primitive that sends, in two: what it returns waits."""


def same(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The tensor itself."""
    return x


def all_reduce(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The sum over the axis."""
    return _start_all_reduce(x, layout, axis)()


def _start_all_reduce(x: Tensor, layout: Any, axis: Any) -> Finish:
    group, _, rank = axis
    return begin(functional.all_reduce.default, _held_by_all(x, rank), "sum", group)


def all_reduce_in_place(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The sum in the memory of `x`, where that is one stretch and not, for autograd, a view of something else; then it is `x` itself."""
    return _start_all_reduce_in_place(x, layout, axis)()


def _start_all_reduce_in_place(x: Tensor, layout: Any, axis: Any) -> Finish:
    group, _, rank = axis
    if rank < 0 or torch.compiler.is_compiling() or not x.is_contiguous() or (x.requires_grad and is_view(x)):
        return _start_all_reduce(x, layout, axis)
    finish = begin(functional.all_reduce_.default, x, "sum", group)

    def itself() -> Tensor:
        finish()
        return x

    return itself


def keep_on_first(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The tensor on the axis's first rank, zeros on the others."""
    return on_rank(lambda rank, x: x if rank == 0 else torch.zeros_like(x), axis, x)


def own_slice(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """This rank's part, as a copy: a view would keep the whole tensor alive."""
    return on_rank(lambda rank, x: take(x, layout, axis[1], rank).clone(memory_format=torch.contiguous_format), axis, x)


def zero_padded(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The whole tensor with zeros for the slices of other ranks."""
    return on_rank(lambda rank, x: surround(x, layout, axis[1], rank), axis, x)


def all_gather(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """The whole tensor from the slices of all ranks, in global order."""
    return _start_all_gather(x, layout, axis)()


def _start_all_gather(x: Tensor, layout: Any, axis: Any) -> Finish:
    group, size, rank = axis
    dim, repeat, segments = layout
    if x.dtype in _CARRIERS:
        return _carried(_start_all_gather, x, layout, axis)
    if len(segments) == 1 and segments[0][0] % size == 0:
        gathered = begin(functional.all_gather_into_tensor.default, _held_by_all(x, rank).contiguous(), size, group)
        if dim == 0 and repeat == 1:
            return gathered
        return lambda: on_rank(lambda rank, y, x: ranks_inside(y, x.shape, dim, repeat, size), axis, gathered(), x)
    flat = on_rank(lambda rank, x: padded(x.reshape(-1), max(numels(x.shape, layout, size))), axis, x)
    parts = begin(functional.all_gather_into_tensor.default, flat, size, group)
    return lambda: on_rank(lambda rank, y, x: join(unpack(y, local_shapes(x.shape, layout, size)), layout, size), axis, parts(), x)


def reduce_scatter(x: Tensor, layout: Any, axis: Any) -> Tensor:
    """This rank's slice of the sum over the axis."""
    return _start_reduce_scatter(x, layout, axis)()


def _start_reduce_scatter(x: Tensor, layout: Any, axis: Any) -> Finish:
    group, size, rank = axis
    dim, repeat, segments = layout
    if len(segments) == 1 and segments[0][0] % size == 0:
        if dim == 0 and repeat == 1:
            return begin(functional.reduce_scatter_tensor.default, _held_by_all(x, rank).contiguous(), "sum", size, group)
        parts = on_rank(lambda rank, x: ranks_first(x, dim, repeat, size), axis, x)
        mine = begin(functional.reduce_scatter_tensor.default, parts, "sum", size, group)
        return lambda: on_rank(lambda rank, y, x: y.view(local_shape(x.shape, layout, size, rank)), axis, mine(), x)
    packed = on_rank(lambda rank, x: pack([take(x, layout, size, r) for r in range(size)], max(numels(x.shape, layout, size))), axis, x)
    own = begin(functional.reduce_scatter_tensor.default, packed, "sum", size, group)
    return lambda: on_rank(lambda rank, y, x: unpadded(y, local_shape(x.shape, layout, size, rank)), axis, own(), x)


def all_to_all(x: Tensor, layouts: Any, axis: Any) -> Tensor:
    """The slice of this rank in a second layout from those of a first one; `layouts` are the fields of both."""
    return _start_all_to_all(x, layouts, axis)()


def _start_all_to_all(x: Tensor, layouts: Any, axis: Any) -> Finish:
    here, there = layouts[:3], layouts[3:]
    if x.dtype in _CARRIERS:
        return _carried(_start_all_to_all, x, layouts, axis)
    if x.is_complex():
        real = _start_all_to_all(torch.view_as_real(x), layouts, axis)
        return lambda: torch.view_as_complex(real().contiguous())
    if here[0] == there[0]:
        return _cut_anew(x, here, there, axis)
    group, size, _ = axis
    if all(len(segments) == 1 and segments[0][0] % size == 0 for segments in (here[2], there[2])):
        moved = _exchange(on_rank(lambda rank, x: ranks_first(x, there[0], there[1], size), axis, x), size, group)
        return lambda: on_rank(
            lambda rank, y, x: ranks_inside(y, local_shape(x.shape, there, size, rank), here[0], here[1], size), axis, moved(), x
        )
    parts = on_rank(lambda rank, x: pack([take(x, there, size, r) for r in range(size)], piece_numel(x.shape, here, there, size)), axis, x)
    pieces = _exchange(parts, size, group)
    return lambda: on_rank(lambda rank, y, x: join(unpack(y, pieces_for(x.shape, here, there, size, rank)), here, size), axis, pieces(), x)


def _cut_anew(x: Tensor, here: Any, there: Any, axis: Any) -> Finish:
    """The exchange between two layouts of the same dim."""
    group, size, _ = axis
    moves = moves_between(here[1], here[2], there[1], there[2], size)
    moved = _exchange(on_rank(lambda rank, x: pack_moves(x, here[0], moves, rank), axis, x), size, group)
    return lambda: on_rank(lambda rank, y, x: unpack_moves(y, x.shape, here[0], moves, rank), axis, moved(), x)


def call(op: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Run a functional collective and wait for it, past the autograd layer that torch registers for it in Python."""
    return begin(op, x, *args)()


def begin(op: Callable[..., Tensor], x: Tensor, *args: Any) -> Finish:
    """Starting a functional collective; what is returned waits for it. `x` must be kept as it is until then."""
    if torch.compiler.is_compiling():
        flying = op(x, *args)
        return lambda: functional.wait_tensor.default(flying)
    with below_autograd():
        flying = op(x, *args)

    def finish() -> Tensor:
        with below_autograd():
            return functional.wait_tensor.default(flying)

    return finish


def _exchange(parts: Tensor, size: int, group: str) -> Finish:
    """Piece q of dim 0 (of `size` equal pieces) goes to rank q."""
    split = [parts.shape[0] // size] * size
    return begin(functional.all_to_all_single.default, parts, split, split, group)


def start_rotated(x: Tensor, axis: Any) -> Finish:
    """What the neighbour before had: every rank sends its `x` (one dim) to the next one, the last to the first."""
    group, size, rank = axis
    if size == 1:
        return lambda: x
    if rank < 0:
        parts = on_rank(lambda r, x: torch.cat([x if q == (r + 1) % size else torch.zeros_like(x) for q in range(size)]), axis, x)
        moved = _exchange(parts, size, group)
        return lambda: on_rank(lambda r, y: y.unflatten(0, (size, -1))[(r - 1) % size].clone(), axis, moved())
    return start_shift(x, 1, axis)


def start_shift(x: Tensor, by: int, axis: Any) -> Finish:
    """What the rank `by` before this one had: every rank sends its `x` (dim 0 is its first) to the one `by` after it. Not simulated."""
    group, size, rank = axis
    sent, received = ([x.shape[0] if q == at % size else 0 for q in range(size)] for at in (rank + by, rank - by))
    return begin(functional.all_to_all_single.default, x.contiguous(), received, sent, group)


Parcel = tuple[Tensor, int, int]
"""A tensor of one stretch, the rank of the group that it goes to or comes from, and a tag."""


def start_messages(gone: Sequence[Parcel], come: Sequence[Parcel], group: str) -> Callable[[], None]:
    """Sending some tensors and receiving others, each between two ranks; what is returned waits for all. Not simulated."""
    between = resolve_process_group(group)
    works = [between.recv([x], peer, tag) for x, peer, tag in come] + [between.send([x], peer, tag) for x, peer, tag in gone]

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def exchanged(parts: tuple[Tensor, ...], received: Sequence[Sequence[int]], axis: Any) -> Tensor:
    """The rows that all ranks have for this one, one rank's after the other's. `parts`: by rank, the rows `[n, c]` that go there.

    `received`: for each rank of the axis, how many rows come from each.
    """
    group, size, rank = axis
    if rank >= 0:
        sent = [part.shape[0] for part in parts]
        return call(functional.all_to_all_single.default, torch.cat(parts), list(received[rank]), sent, group)
    most = max(max(counts) for counts in received)
    even = on_rank(lambda _, *parts: torch.cat([pad(part, (0, 0, 0, most - part.shape[0])) for part in parts]), axis, *parts)
    moved = _exchange(even, size, group)()
    found: Tensor = on_rank(lambda r, y: torch.cat([y[q * most : q * most + count] for q, count in enumerate(received[r])]), axis, moved)
    return found


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


def _carried(start: Starting, x: Tensor, layout: Any, axis: Any) -> Finish:
    """Starting a primitive that only moves values on a dtype that the backends know."""
    carrier = _CARRIERS[x.dtype]
    if carrier.itemsize == x.dtype.itemsize:
        viewed = start(x.view(carrier), layout, axis)
        return lambda: viewed().view(x.dtype)
    widened = start(x.to(carrier), layout, axis)
    return lambda: widened().to(x.dtype)


STARTS: Mapping[Primitive, Starting] = {
    all_reduce: _start_all_reduce,
    all_reduce_in_place: _start_all_reduce_in_place,
    all_gather: _start_all_gather,
    reduce_scatter: _start_reduce_scatter,
    all_to_all: _start_all_to_all,
}
"""Primitive -> how to start it without waiting; those that send nothing are not here."""
