"""The Python state that an autograd.Function reads beside its arguments: attributes of its class, globals, what its closures hold.

What the loop may change between steps must be read in every step; what the Function itself changes, no parallel program can repeat: forward
runs once more in backward, for every microbatch, on every rank.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

FunctionState = Mapping[str, Any]

_DEPTH, _LONG = 3, 1000


def state_of(cls: type[torch.autograd.Function]) -> FunctionState:
    """Name -> a picture of every number, tensor or container that the methods of a Function may read outside of their arguments."""
    found: dict[str, Any] = {}
    for owner in cls.__mro__[: cls.__mro__.index(torch.autograd.Function)]:
        own = {key: value for key, value in vars(owner).items() if not key.startswith("__") and key not in _SWITCHES}
        found.update({f"{owner.__qualname__}.{key}": value for key, value in own.items()})
        for method in own.values():
            function = getattr(method, "__func__", method)
            if isinstance(function, FunctionType):
                found.update(_around(inspect.unwrap(function)))
    pictures = {name: _picture(value, _DEPTH) for name, value in found.items()}
    return {name: picture for name, picture in pictures.items() if picture is not _CODE}


def changed(before: FunctionState, after: FunctionState) -> tuple[str, ...]:
    """The names whose values differ."""
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


_SWITCHES = frozenset({"generate_vmap_rule", "clear_saved_tensors_on_access", "boxed_grads_call"})
"""What torch reads of a class of Functions."""


def _around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and the cells that a function's code names."""
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not filled yet


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


_CODE = object()
"""The picture of what holds no state."""


def _picture(value: Any, depth: int) -> Any:
    """What can be compared later; _CODE for functions, modules, and classes without values."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, staticmethod | classmethod | property | ModuleType | torch.dtype | torch.device) or value is None:
        return _CODE
    if not depth:
        return _CODE
    if isinstance(value, Mapping):
        return [(str(key), _picture(item, depth - 1)) for key, item in list(value.items())[:_LONG]], len(value)
    if isinstance(value, list | set | deque):
        return [_picture(item, depth - 1) for item in list(value)[:_LONG]], len(value)
    if isinstance(value, tuple | frozenset):
        inner = [_picture(item, depth - 1) for item in list(value)[:_LONG]]
        return _CODE if all(one is _CODE for one in inner) else inner
    if isinstance(value, type) and (value.__module__.partition(".")[0] in _LIBRARIES or issubclass(value, torch.autograd.Function)):
        return _CODE
    held = getattr(value, "__dict__", None)
    if held is None or (callable(value) and not isinstance(value, type)):
        return _CODE
    inner = [(key, _picture(item, depth - 1)) for key, item in held.items() if not key.startswith("__")]
    inner = [(key, picture) for key, picture in inner if picture is not _CODE]
    return inner or _CODE


_LIBRARIES = frozenset({"torch", "builtins", "typing", "collections", "math", "numpy", "meshpar"})
