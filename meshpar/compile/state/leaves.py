"""What a program is made for of every leaf of a batch: of tensors all but their values, of everything else the value itself.

True, 1 and 1.0 are three values, 0.0 and -0.0 two, nan is one: as keys of a dictionary they would be mixed up.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Any

import torch

from meshpar.capture.state.places import described
from meshpar.errors import BatchError

_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_HASHED = (*_VALUES, enum.Enum, range, slice, type, types.FunctionType, types.BuiltinFunctionType, torch.Size)


def describe(leaf: Any) -> Any:
    """A leaf as part of a key. Raises BatchError for an object: what it holds may change, and no key would tell."""
    if isinstance(leaf, torch.Tensor):
        return _tensor(leaf)
    kind = type(leaf)
    if kind is str or kind is int or leaf is None:
        return kind, leaf
    if kind is float or kind is complex or kind is bool or isinstance(leaf, _HASHED):
        return kind, described(leaf), leaf if isinstance(leaf, (types.FunctionType, type, enum.Enum)) else None
    if isinstance(leaf, frozenset):
        return kind, described(leaf)
    if isinstance(leaf, set):
        raise BatchError(f"the batch holds a set, {leaf!r}: its order differs between ranks. Pass a sorted tuple.")
    way = "Pass its fields" if dataclasses.is_dataclass(leaf) else "Pass tensors (torch.as_tensor), numbers and strings"
    raise BatchError(
        f"the batch holds an object of type {kind.__name__}, which is no tensor, number, string, list, tuple or dict: a program would keep "
        f"what is in it now. {way}, or register the type with torch.utils._pytree.register_pytree_node."
    )


def _tensor(x: torch.Tensor) -> tuple[Any, ...]:
    strided = x.layout is torch.strided
    laid_out = None if not strided or x.is_contiguous() else x.stride()
    turned = (x.is_conj(), x.is_neg()) if x.is_complex() else x.is_neg()
    return tuple(x.shape), x.dtype, x.requires_grad, laid_out, x.layout, turned, type(x).__name__
