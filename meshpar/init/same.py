"""Whether two names of one tensor were given the same values: bit by bit, slab by slab, and only where this rank looks.

Bits, not numbers: 0.0 is not -0.0, a NaN is that NaN. Floating values of two dtypes are the same if they are the same numbers exactly, that
is bit by bit in a dtype that holds both; what would be equal only after rounding is not the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from meshpar._torch import LocalTensor, local_of
from meshpar.init.fit import FLOATS, short
from meshpar.init.weights import Lazy, Ranges, read

SLAB = 16 << 20
"""Bytes of each tensor that are looked at together."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}

Initial = torch.Tensor | Lazy


def difference(one: Initial, other: Initial, ranges: Ranges = ()) -> str:
    """Where two tensors begin to differ within `ranges`, in words; empty where they do not. Holds two slabs at a time.

    >>> difference(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    '0.0 and -0.0 at [1]'
    """
    if tuple(one.shape) != tuple(other.shape):
        return f"shapes {list(one.shape)} and {list(other.shape)}"
    if one.dtype != other.dtype and not (one.dtype in FLOATS and other.dtype in FLOATS):
        return f"{short(one.dtype)} and {short(other.dtype)}"
    if _is_shared(one, other):
        return ""
    dtype = torch.promote_types(one.dtype, other.dtype) if one.dtype != other.dtype else one.dtype
    for part in slabs(tuple(one.shape), dtype.itemsize, ranges):
        x, y = (read(value, part).detach().cpu().to(dtype).contiguous() for value in (one, other))
        if not torch.equal(_bits(x), _bits(y)):
            return _first(x, y, part)
    return ""


def slabs(shape: tuple[int, ...], itemsize: int, ranges: Ranges) -> Iterator[Ranges]:
    """Cut the part that `ranges` name into parts of few bytes, along the first dim.

    >>> list(slabs((5, 2), 4, [(1, 0, 1)]))
    [[(1, 0, 1), (0, 0, 5)]]
    """
    if not shape:
        yield ()
        return
    rest = [r for r in ranges if r[0] != 0]
    row = itemsize
    for dim, size in enumerate(shape[1:], 1):
        row *= sum(stop - start for d, start, stop in rest if d == dim) if any(d == dim for d, _, _ in rest) else size
    step = max(SLAB // max(row, 1), 1)
    for _, start, stop in [r for r in ranges if r[0] == 0] or [(0, 0, shape[0])]:
        for low in range(start, stop, step):
            yield [*rest, (0, low, min(low + step, stop))]


def difference_of_dtensors(one: torch.Tensor, other: torch.Tensor) -> str:
    """`difference` of tensors of which one or both are DTensors. Collective over their meshes; all ranks of these say the same.

    Two that lie alike are compared part by part, and only a word travels; others are gathered whole on every rank, which is what loading
    such a tensor costs too.
    """
    if isinstance(one, DTensor) and isinstance(other, DTensor) and _lie_alike(one, other):
        return _difference_of_parts(one, other)
    return difference(_whole(one), _whole(other))


def _lie_alike(one: DTensor, other: DTensor) -> bool:
    return (one.device_mesh, one.placements, one.shape) == (other.device_mesh, other.placements, other.shape)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _difference_of_parts(one: DTensor, other: DTensor) -> str:
    parts = local_of(one), local_of(other)
    if isinstance(parts[0], LocalTensor) and isinstance(parts[1], LocalTensor):
        ranks = ((parts[0]._local_tensors[rank], parts[1]._local_tensors[rank]) for rank in parts[0]._local_tensors)
        return next((found for pair in ranks if (found := difference(*pair))), "")
    found = difference(*parts)
    wrong = torch.tensor([bool(found)], dtype=torch.int32, device=parts[0].device)
    for dim in range(one.device_mesh.ndim):
        torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX, group=one.device_mesh.get_group(dim))
    return (f"{found} of this rank's part" if found else "in another rank's part") if wrong.item() else ""


def _is_shared(one: Initial, other: Initial) -> bool:
    """Whether they lie at the same place in memory, or nowhere."""
    if isinstance(one, Lazy) or isinstance(other, Lazy):
        return one is other
    if one.is_meta or other.is_meta:
        return True
    facts = [(t.data_ptr(), t.stride(), t.dtype, t.device) for t in (one, other)]
    return one is other or (facts[0] == facts[1] and facts[0][0] != 0)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(_WORDS[tensor.dtype.itemsize])


def _first(x: torch.Tensor, y: torch.Tensor, part: Ranges) -> str:
    """The first element that differs; counted within what was read where this is made of several stretches."""
    width = 2 if x.dtype.itemsize == 16 else 1
    at = int((_bits(x) != _bits(y)).nonzero()[0]) // width
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), x.shape)] if x.dim() else []
    for dim in range(x.dim()):
        own = [start for d, start, _ in part if d == dim]
        index[dim] += own[0] if len(own) == 1 else 0
    return f"{x.reshape(-1)[at].item()} and {y.reshape(-1)[at].item()}" + (f" at {index}" if index else "")
