"""A model made comparable: without dropout, in one dtype throughout, with every parameter away from its initial value.

Two programs that compute the same function still differ by rounding, by their random numbers, and not at all where parameters are zero or
one. So a comparison to many digits needs a copy of the model in which all three are taken care of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from meshpar._torch import OpOverload, grouped_mm, pytree
from meshpar.capture.copies import Derived
from meshpar.capture.hooks.models import copied
from meshpar.errors import ConfigError
from meshpar.proof.noise import BACKWARDS

NOISE = ("drop", "jitter")
"""Parts of the names of settings that say how much is drawn at random: dropout, attn_pdrop, drop_path_rate, router_jitter_noise."""


def comparable(model: nn.Module, *, dtype: torch.dtype, perturb: float, seed: int) -> nn.Module:
    """A copy of `model` in training mode for comparisons in `dtype`: noise switched off, parameters moved by `perturb` times a normal draw.

    Fresh models hide bugs: with zero biases and unit norm weights a bias added twice, or the gradient of a norm, looks right.
    Raises ConfigError for a model without memory.
    """
    bare = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if bare:
        raise ConfigError(
            f"{bare[0]} is on the meta device and has no values to compare with. Build the model outside of torch.device('meta') and "
            f"mp.meta(), with fewer layers if it is too big."
        )
    model = copied(model).train()
    without_noise(model)
    cast(model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):  # ranks may have registered them in other orders
            parameter.grad = None
            if parameter.is_floating_point() and perturb:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * perturb)
    return model


def without_noise(model: nn.Module) -> nn.Module:
    """Set to zero, in place, all that makes the training forward random: dropout layers, and settings named so on modules and configs."""
    seen: set[int] = set()
    for module in model.modules():
        if type(module).__module__ == nn.Dropout.__module__ and isinstance(getattr(module, "p", None), float):
            setattr(module, "p", 0.0)  # noqa: B010  (a plain attribute, whatever nn.Module says)
        for value in (module, *vars(module).values()):
            _silence(value, seen, depth=3)
    return model


def _silence(value: Any, seen: set[int], depth: int) -> None:
    """Zero the numbers of `value` named as noise, and those of the settings it holds (a configuration of a part, for instance)."""
    if depth == 0 or id(value) in seen or not _holds_settings(value):
        return
    seen.add(id(value))
    for name, setting in list(vars(value).items()):
        if isinstance(setting, float) and any(word in name.lower() for word in NOISE):
            setattr(value, name, 0.0)
        elif not isinstance(setting, nn.Module):
            _silence(setting, seen, depth - 1)


def _holds_settings(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    return hasattr(value, "__dict__") and not isinstance(value, (type, torch.Tensor)) and not callable(value)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`: of a batch (returned), or of a module (in place: parameters, buffers, tensors that are attributes).

    Complex ones become as wide; `nn.Module.to` would drop their imaginary parts.
    """
    if not isinstance(value, nn.Module):
        return pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_floating(leaf) else leaf, value)
    value._apply(lambda t: t.to(dtype) if t.is_floating_point() else t.to(dtype.to_complex()) if t.is_complex() else t)
    for module in value.modules():
        for name, attribute in list(vars(module).items()):
            if name not in _OF_TORCH and (held := _cast_held(attribute, dtype)) is not attribute:
                setattr(module, name, held)
    return value


_OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes in which a module keeps its parameters, buffers, children and hooks."""


def _cast_held(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or a container with those in it cast: a list or dict is the same one, and others may hold it too."""
    if type(value) in (list, dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _cast_held(item, dtype)
        return value
    if type(value) is tuple:
        items = tuple(_cast_held(item, dtype) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value.to(dtype) if _is_floating(value) else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not isinstance(value, Derived)


@contextmanager
def only(dtype: torch.dtype) -> Iterator[None]:
    """Inside, whatever asks for a narrower floating dtype gets `dtype`, and so does what asks for none.

    Many models compute norms, softmax and rotary tables in float32 whatever the dtype of the rest; a float64 comparison of two such
    programs ends at 1e-7, where real mistakes hide. Works for eager code and for capture alike (torch.export calls the same functions).

    >>> with only(torch.float64):
    ...     torch.ones(1).float().dtype
    torch.float64
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Widen(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


_CASTS = {torch.Tensor.float: torch.float32, torch.Tensor.half: torch.float16, torch.Tensor.bfloat16: torch.bfloat16}
_BITS = {torch.Tensor.view}
"""Functions for which a dtype says how to read bits, not how to round."""


class _Widen(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is not OpOverload:  # (whose hash is a call)
            if func in BACKWARDS:
                with self:
                    return BACKWARDS[func](*args, **kwargs)
            if func in _CASTS:
                return args[0].to(self._wide(_CASTS[func]), **kwargs)
            if func in _BITS:
                return func(*args, **kwargs)
            if func is grouped_mm and args[0].dtype == torch.float64 and args[1].ndim == 3 and kwargs.get("bias") is None:
                return torch.ops.meshpar.grouped_mm(*args[:2], kwargs["offs"])  # torch has none in float64
        if torch.dtype in map(type, args):
            args = tuple(self._wide(a) for a in args)
        if torch.dtype in map(type, kwargs.values()):
            kwargs = {k: self._wide(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _wide(self, value: Any) -> Any:
        narrower = isinstance(value, torch.dtype) and value.is_floating_point and 2 <= value.itemsize < self.dtype.itemsize
        return self.dtype if narrower else value
