"""How many rows there are: where a forward makes a tensor whose size depends on the batch, the size is that of the example, and checked.

    x[mask]                                as many of every sample: gather(x, 1, the first k of argsort(~mask)), and expect(mask.sum(1), k)
                                           else: x[nonzero_static(mask, size=n)], and expect(mask.sum(), n)
    mask.nonzero()                         nonzero_static(mask, size=n), and expect(mask.sum(), n)
    x.unique_consecutive()                 x[nonzero_static(x != the one before, size=n)], and expect(the number of these, n)
    x.repeat_interleave(lengths)           with output_size=n, and expect(lengths.sum(), n)

A graph that takes any number of rows is better where it can be had (see `selections`), so this is for the forwards where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import meshpar.ops.expect  # noqa: F401  (registers meshpar::expect)
from meshpar.capture import blame

KnownNumbers = Callable[[Tensor], "Sequence[int] | None"]
"""The elements of a tensor for the example, if it is made of the batch alone."""


def followed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers: KnownNumbers) -> Any:
    """What `func(*args, **kwargs)` is at the size that it has for the example; None where it is not ours, or the size would not hold."""
    if func in _CHOICES and not kwargs and len(args) == 2:
        mask = mask_of(*args) if func is Tensor.__getitem__ else _as_wide(*args)
        return None if mask is None else _chosen(args[0], mask, numbers)
    if func in _POSITIONS and args and isinstance(args[0], Tensor) and args[0].dim() and len(args) == 1:
        found = _positions(args[0], numbers)
        as_tuple = func is torch.where or bool(kwargs.get("as_tuple", False))
        return found.unbind(1) if found is not None and as_tuple else found
    if func in _REPEATS:
        return _repeated(func, args, dict(kwargs), numbers)
    if func in _DISTINCT and _is_plain(args, kwargs):
        return _distinct(args[0] if func in (torch.unique_consecutive, Tensor.unique_consecutive) else args[0].sort().values, numbers)
    return None


def is_sized_by_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the size of the result depends on values."""
    if func in _CHOICES:
        return len(args) == 2 and (func is not Tensor.__getitem__ or mask_of(*args) is not None)
    if func in _POSITIONS:
        return len(args) == 1
    if func in _DISTINCT:
        return _is_plain(args, kwargs)
    return func in _REPEATS and any(isinstance(one, Tensor) for one in (*args[1:2], kwargs.get("repeats")))


def mask_of(tensor: Any, index: Any) -> Tensor | None:
    """The mask of `tensor[mask]` or `tensor[mask, :]`."""
    mask, *rest = index if isinstance(index, tuple) and index else (index,)
    if not isinstance(tensor, Tensor) or not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.dim():
        return None
    if any(isinstance(one, Tensor) or one != slice(None) for one in rest):
        return None
    known = all(isinstance(n, int) for n in (*mask.shape, *tensor.shape))
    return mask if known and mask.shape == tensor.shape[: mask.dim()] else None


def _as_wide(tensor: Any, mask: Any) -> Tensor | None:
    """The mask of a `masked_select`, which may be broadcast to the tensor."""
    known = isinstance(tensor, Tensor) and isinstance(mask, Tensor) and all(isinstance(n, int) for n in (*mask.shape, *tensor.shape))
    if not known or torch.broadcast_shapes(tensor.shape, mask.shape) != tensor.shape:
        return None
    return mask_of(tensor, mask.expand(tensor.shape))


def _chosen(tensor: Tensor, mask: Tensor, numbers: KnownNumbers) -> Tensor | None:
    samples, rest = mask.shape[0], tensor.shape[mask.dim() :]
    flat = mask.reshape(samples, -1)
    counts = flat.sum(1)
    each = numbers(counts)
    if each is None:
        return None
    if len(set(each)) > 1 or not each[0]:
        found = _positions(mask, numbers)
        return None if found is None else tensor[found.unbind(1)]
    for bound in (counts.amin(), counts.amax()):
        torch.ops.meshpar.expect(bound, each[:1], blame.here())
    if each[0] == flat.shape[1]:
        return tensor.reshape(-1, *rest).clone()
    order = torch.argsort(flat.logical_not(), dim=1, stable=True)[:, : each[0]]
    places = order.reshape(samples, each[0], *(1 for _ in rest)).expand(samples, each[0], *rest)
    return tensor.reshape(samples, flat.shape[1], *rest).gather(1, places).reshape(samples * each[0], *rest)


def _positions(mask: Tensor, numbers: KnownNumbers) -> Tensor | None:
    count = mask.count_nonzero()
    found = numbers(count)
    if found is None:
        return None
    torch.ops.meshpar.expect(count, found, blame.here())
    return torch.nonzero_static(mask, size=found[0])


def _is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the distinct numbers of a row are asked for, and nothing else."""
    return len(args) == 1 and args[0].dim() == 1 and args[0].numel() > 1 and not any(v for k, v in kwargs.items() if k != "sorted")


def _distinct(row: Tensor, numbers: KnownNumbers) -> Tensor | None:
    changes = torch.cat([torch.ones_like(row[:1], dtype=torch.bool), row[1:] != row[:-1]])
    found = _positions(changes, numbers)
    return None if found is None else row[found[:, 0]]


def _repeated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: KnownNumbers) -> Tensor | None:
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
    if not isinstance(repeats, Tensor) or kwargs.get("output_size") is not None or not args:
        return None
    if repeats.dim() != 1 or ("repeats" not in kwargs and len(args) == 1):  # (repeats alone: what is repeated is a range)
        return None
    total = repeats.sum()
    found = numbers(total)
    if found is None:
        return None
    torch.ops.meshpar.expect(total, found, blame.here())
    dim = kwargs.pop("dim", args[2] if len(args) > 2 else None)
    each = args[0].numel() if dim is None else args[0].shape[dim]
    return func(args[0], repeats, dim=dim, output_size=found[0] * (each if repeats.shape[0] == 1 else 1))


_CHOICES = frozenset({Tensor.__getitem__, Tensor.masked_select, torch.masked_select})
_POSITIONS = frozenset({torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where})
_DISTINCT = frozenset({torch.unique_consecutive, torch.unique, Tensor.unique_consecutive, Tensor.unique})
_REPEATS = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})
