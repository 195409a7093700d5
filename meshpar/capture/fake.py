"""Stand-ins without memory: during capture every parameter, buffer and input of the model is a fake tensor on the real device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from meshpar._torch import FakeTensorMode


@contextmanager
def faked(model: nn.Module, device: torch.device, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Iterator[Mapping[int, str]]:
    """Inside, `model` holds fake tensors on `device`; afterwards it is what it was, whatever happened.

    Floating parameters have `dtype`, if one is given: the model computes in it.

    Ties survive: one tensor under two names becomes one fake under two names. Yields the canonical (first) name of every parameter and
    buffer by the `id` of its fake.
    """

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        return fake_of(tensor, device, mode, dtype=dtype if isinstance(tensor, nn.Parameter) else None)

    with replaced(model, stand_in) as names:
        yield names


@contextmanager
def replaced(model: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Mapping[int, str]]:
    """Inside, `model` holds what `stand_in` gives for each of its tensors, the same for ties; afterwards it is what it was.

    A parameter that a module holds as a plain attribute too is registered there for that time: else it would be taken for a constant.
    Yields the first name of every parameter and buffer by the `id` of what stands for it.
    """
    saved = [(module, _copy_of(module)) for module in model.modules()]
    made: dict[int, torch.Tensor] = {}
    try:
        for module, _ in saved:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = made[id(tensor)] if id(tensor) in made else made.setdefault(id(tensor), stand_in(tensor))
        names = _names(model)
        for module, _ in saved:
            for name, value in list(module.__dict__.items()):
                if isinstance(value, nn.Parameter) and id(value) in made and name not in module._parameters:
                    module._parameters[name] = made[id(value)]  # type: ignore[assignment]
                    del module.__dict__[name]
                elif isinstance(value, torch.Tensor) and value.is_meta:  # not a buffer, but on a device the others left
                    module.__dict__[name] = made.setdefault(id(value), stand_in(value))
        yield names
    finally:
        for module, before in saved:
            _restore(module, before)


def fake_of(
    tensor: torch.Tensor,
    device: torch.device,
    mode: AbstractContextManager[Any],
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A stand-in for `tensor` on `device`, made in `mode`: of its strides, or contiguous in another `shape`; a floating one in `dtype`."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    with mode:
        if shape is None:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        else:
            fake = torch.empty(shape, dtype=dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), name)
    return names


def _copy_of(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, and copies of the tables that the swap writes to, and of those of hooks, which a first forward may fill."""
    before = dict(module.__dict__)
    for name in _tables(before):
        before[name] = before[name].copy()
    return before


def _tables(attributes: Mapping[str, Any]) -> list[str]:
    hooks = (name for name, value in attributes.items() if name.startswith("_") and "hooks" in name and isinstance(value, dict))
    return ["_parameters", "_buffers", "_modules", *hooks]


_REGISTERED: WeakKeyDictionary[nn.Module, dict[str, dict[Any, Any]]] = WeakKeyDictionary()
"""Module -> the hooks that the last forward registered on it, by their table."""


def keep_registered(model: nn.Module) -> None:
    """Put hooks back that a captured forward registered on modules of `model`: to be done with the attributes that it left behind."""
    for module in model.modules() if _REGISTERED else ():
        for name, hooks in _REGISTERED.pop(module, {}).items():
            module.__dict__[name].update(hooks)


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    _REGISTERED.pop(module, None)
    for name in _tables(before):
        live = module.__dict__[name]
        if "hooks" in name and (added := {key: hook for key, hook in live.items() if key not in before[name]}):
            _REGISTERED.setdefault(module, {})[name] = added
        live.clear()
        live.update(before[name])
        before[name] = live
    module.__dict__.clear()
    module.__dict__.update(before)
