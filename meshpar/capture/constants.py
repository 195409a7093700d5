"""Values a forward computes from nothing but numbers are known during capture: `if mask_is_causal:` may ask for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from meshpar._torch import OpOverload, TorchDispatchMode, pytree, without_modes


class Known(TorchFunctionMode):
    """Remembers how every tensor came about that depends on no input, parameter or buffer, and answers questions about its values.

    mask = torch.full((4, 4), -inf).triu(1)            remembered: full, triu
    if bool((mask == other).all()): ...                computed for real when asked; a value that depends on the batch is refused by export
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Callable[[], Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(id(leaf) in self._known for leaf in leaves)
        if func in _QUESTIONS and leaves and known:
            answer = self._answer(func, args, kwargs)
            if answer is not None:
                return answer
        result = func(*args, **kwargs)
        if _writes(func, kwargs):
            if any(id(leaf) in self._known for leaf in leaves):
                self._known.clear()  # whatever shares memory with what was written to
        elif known and (leaves or func in _SOURCES):
            self._remember(func, args, kwargs, result)
        return result

    def _remember(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        recipe = pytree.tree_map(self._recipe, (args, kwargs))

        def compute() -> Any:
            made_args, made_kwargs = pytree.tree_map(lambda leaf: leaf.compute() if isinstance(leaf, _Recipe) else leaf, recipe)
            return func(*made_args, **made_kwargs)

        if isinstance(result, Tensor):
            self._known[id(result)] = (result, compute)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._known[id(item)] = (item, lambda index=index: compute()[index])  # type: ignore[misc]

    def _recipe(self, leaf: Any) -> Any:
        return _Recipe(self._known[id(leaf)][1]) if isinstance(leaf, Tensor) else leaf

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        made_args, made_kwargs = pytree.tree_map(self._recipe, (args, dict(kwargs)))
        try:
            with torch._C.DisableTorchFunction(), without_modes(), _Settled():
                values = pytree.tree_map(lambda leaf: leaf.compute() if isinstance(leaf, _Recipe) else leaf, (made_args, made_kwargs))
                return func(*values[0], **values[1])
        except _Unsettled:
            return None


class _Recipe:
    """A value that can be computed again."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute


class _Unsettled(Exception):
    """The value is another one each time."""


class _Settled(TorchDispatchMode):
    """Refuses operators whose result is not settled by their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if isinstance(func, OpOverload) and (torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name):
            raise _Unsettled
        return func(*args, **(kwargs or {}))


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITERS or "out" in kwargs


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")
_WRITERS = frozenset({"__setitem__", "__set__", *(f"__i{name}__" for name in _IN_PLACE)})
_SOURCES = frozenset(
    {
        torch.full,
        torch.zeros,
        torch.ones,
        torch.arange,
        torch.eye,
        torch.tensor,
        torch.linspace,
        torch.tril_indices,
        torch.triu_indices,
    }
)
_QUESTIONS = frozenset(
    {
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.item,
        Tensor.tolist,
        Tensor.equal,
        Tensor.is_nonzero,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    }
)
