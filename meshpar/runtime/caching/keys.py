"""The cache that programs take and give back: keys and values of every layer, as a pytree of tensors.

    taken by a forward     keys and values of the positions before, [samples, heads, before, width] each
    given back             those of the positions that it was called with, [samples, heads, new, width]

A layer attends to both, in this order. Nothing is written in place, so that a forward with a cache is a function of tensors as any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, cat, nn

from meshpar._torch import pytree

Pair = tuple[Any, Any]
"""The keys and the values of one layer; None where a layer has none."""

_NAMES = ("cache", "past_key_values")
"""What forwards of transformers call a cache: the present name first."""


def cache_name(model: nn.Module) -> str | None:
    """What the forward of `model` calls its cache, if it takes one."""
    known = inspect.signature(type(model).forward).parameters
    return next((name for name in _NAMES if name in known), None)


@cache
def keys_and_values() -> type[Any]:
    """The type of such a cache, made of one pair for each layer: a cache of transformers, and a pytree."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):
        """Keys and values of one layer; what a forward adds is known apart."""

        def __init__(self, pair: Pair = (None, None)) -> None:
            super().__init__()
            self.keys, self.values = self.added = pair
            self.is_initialized = self.keys is not None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.added = key_states, value_states
            if self.is_initialized:
                key_states, value_states = cat([self.keys, key_states], dim=-2), cat([self.values, value_states], dim=-2)
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states

    class KeysAndValues(Cache):
        """One layer for each pair, and more when a forward adds to them."""

        def __init__(self, pairs: Sequence[Pair]) -> None:
            super().__init__(layer_class_to_replicate=Layer)
            self.layers = [Layer(pair) for pair in pairs]

    pytree.register_pytree_node(
        KeysAndValues,
        lambda kept: ([layer.added for layer in kept.layers], None),
        lambda pairs, _: KeysAndValues(list(pairs)),
        flatten_with_keys_fn=lambda kept: ([(pytree.SequenceKey(i), layer.added) for i, layer in enumerate(kept.layers)], None),
    )
    return KeysAndValues


def is_cache(value: Any) -> bool:
    """Whether a value is one."""
    return keys_and_values.cache_info().currsize > 0 and isinstance(value, keys_and_values())


@cache
def handle() -> Callable[..., Any]:
    """The type of what stands for a cache in transformers' loop: `positions` and `reorder` are asked, tensors stay with the programs."""
    from transformers.cache_utils import Cache

    class Handle(Cache):
        """A cache that another object holds."""

        is_compileable, is_linear, is_sliding = False, [False], [False]

        def __init__(self, positions: Callable[[], int], reorder: Callable[[Tensor], None]) -> None:
            super().__init__(layers=[])
            self._positions, self.reorder_cache = positions, reorder

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self._positions()

    return Handle
