"""autograd.Functions in a forward: a graph keeps what they compute and forgets their backward, so that backward must say nothing new.

And `module.to(...)`, which a graph would not see either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from meshpar._torch import FakeTensor
from meshpar.capture.blame import here
from meshpar.capture.stand_in import aside
from meshpar.errors import CaptureError
from meshpar.ops.own_backward import operator_of


@contextmanager
def casting_nothing() -> Iterator[None]:
    """Inside, `module.to(...)` of what is there already does nothing. Raises CaptureError where it would change a parameter."""
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        tensors = (*self.parameters(recurse), *self.buffers(recurse))
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return original(self, fn, recurse)  # a stand-in
        for before, after in ((tensor, fn(tensor)) for tensor in tensors):
            if (before.dtype, before.device, before.shape) != (after.dtype, after.device, after.shape):
                raise CaptureError(
                    f"The forward turns the parameters of its {type(self).__name__} from {before.dtype} on {before.device} to "
                    f"{after.dtype} on {after.device}{here()}.\n"
                    "  Convert the module once, outside of forward, or cast the values that it computes with."
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Inside, every `autograd.Function` that runs is recorded as what its forward does, if its backward is the derivative of that.

    One with another backward, or one that cannot be compared, becomes one operator. The comparison runs on small random tensors in float64.
    Reentrant checkpoints only call what they wrap. Raises CaptureError for a Function that is neither.
    """
    agreed: dict[tuple[Any, ...], bool] = {}
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return args[0](*args[2:])
        ours = cls.__module__.partition(".")[0] in ("torch", "meshpar")
        traced = any(isinstance(arg, FakeTensor) and arg.requires_grad for arg in args)
        if ours or not traced or not torch.is_grad_enabled():
            return original.__func__(cls, *args, **kwargs)
        key = (cls, *(tuple(arg.shape) if isinstance(arg, Tensor) else str(arg) for arg in args))
        if key not in agreed:
            likes = tuple(_Like(arg) if isinstance(arg, Tensor) else arg for arg in args)
            agreed[key] = aside(lambda: _agrees(cls, likes))
        return original.__func__(cls, *args, **kwargs) if agreed[key] else _as_operator(model, cls, args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _as_operator(model: nn.Module, cls: Any, args: tuple[Any, ...]) -> Any:
    modules = [arg for arg in args if isinstance(arg, nn.Module)]
    if modules:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured{here()}: {cls.__qualname__} ({cls.__module__}) is an autograd.Function that is "
            f"handed a {type(modules[0]).__name__}. What its backward does with the parameters in there is seen neither in a graph nor "
            "in an operator, whose gradients are those of the tensors that it is given.\n"
            "  Call the modules in forward itself and leave the Function out. If it is there to save memory (reversible layers), "
            'ParallelConfig(recompute="full") does that.'
        )
    try:
        call = aside(lambda: operator_of(cls, args))
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {cls.__qualname__} ({cls.__module__}) is an autograd.Function whose "
            f"backward is not the derivative of its forward, and no operator can be made of it: {error}.\n"
            "  Make it one with torch.library.custom_op and register_autograd: that stays one node."
        ) from error
    return call(*(arg for arg in args if isinstance(arg, Tensor)))


class _Like:
    """What a tensor looked like, at most 3 long along any dim."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = [min(int(n), 3) for n in tensor.shape]
        self.dtype = tensor.dtype
        self.requires_grad = tensor.requires_grad

    def made(self, generator: torch.Generator) -> Tensor:
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) < 0.7
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype)
        return torch.randn(self.shape, dtype=torch.double, generator=generator).requires_grad_(self.requires_grad)


class _Context:
    """The `ctx` of a forward that runs by itself."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    mark_non_differentiable = mark_dirty = set_materialize_grads = save_for_forward = save_for_backward


def _agrees(cls: Any, likes: tuple[Any, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    args = tuple(like.made(generator) if isinstance(like, _Like) else like for like in likes)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    try:
        with torch.enable_grad():
            theirs = cls.apply(*args)
            own_context = cls.setup_context is torch.autograd.Function.setup_context
            leading = (_Context(args),) if own_context else ()
            # Without writes in place, which autograd would refuse where they follow what was saved.
            plain = torch.func.functionalize(lambda *given: cls.forward(*leading, *given))(*args)
        gradients = [torch.autograd.grad(_total(value), wanted, allow_unused=True, materialize_grads=True) for value in (theirs, plain)]
    except Exception:  # whatever it is, the two could not be compared
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def _total(value: Any) -> Tensor:
    """A number that depends on every element of every floating result, each with another weight."""
    parts = [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor) and part.requires_grad]
    weights = [torch.linspace(0.5, 1.5, part.numel(), dtype=part.dtype).view(part.shape) for part in parts]
    return torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum()
