"""Hooks that act in backward, as operators of a graph: an identity whose gradient is what the user's hook makes of it.

    h.register_hook(f)                     ->     h = hooked([h], "f#0")             gradient: f(gradient)

A hook is handed the gradient of the whole value, so `hooked` is never given a part of it, nor a value whose gradient is a pending sum.
`hooked_parts` is the same for a hook that was seen to treat every element by itself: it may be handed a part, and is watched all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

from meshpar._torch import OpOverload, TorchDispatchMode, pytree, written_arguments
from meshpar.errors import CaptureError

HookCall = Callable[[tuple[Tensor, ...]], "Sequence[Tensor | None] | None"]
"""The gradients of some values -> what replaces them; None, as a whole or for one of them, leaves them as they are."""


@dataclass(eq=False)
class Hook:
    """What a user registered: `told` names it and its place, `call` runs it, `linear` says that it may act on each of several summands."""

    name: str
    told: str
    call: HookCall
    stale: Stale | None = None
    parts: bool = False
    """Whether it was seen to treat every element by itself."""
    linear: bool = False
    """Whether it was seen to be linear in every element, so that it may act on each of several summands."""
    pair: str = ""
    """The same for the two hooks around one call of a module, which hand each other gradients."""
    removed: bool = False
    begin: Callable[[], object] | None = None
    """Called before the gradients arrive, once for all simulated ranks."""


_KNOWN: WeakValueDictionary[str, Hook] = WeakValueDictionary()
"""Hooks by the name that stands in a graph. Whoever holds the graph holds them (`Captured.hooks`)."""


def learn(hook: Hook) -> str:
    """Let the operators know a hook. Its name in a graph: `stable` gives the same on all ranks."""
    count = 0
    while f"{hook.name}#{count}" in _KNOWN:
        count += 1  # another capture of the same forward, in this process
    name = f"{hook.name}#{count}"
    _KNOWN[name] = hook
    return name


def known(name: str) -> Hook:
    """The hook that `learn` gave this name."""
    return _KNOWN[name]


class Stale:
    """The tensors of the model as it was given: they are not those that are trained, so a hook that reads them reads old values."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._names: dict[int, tuple[ReferenceType[Tensor], str]] = {id(tensor): (ref(tensor), name) for name, tensor in named.items()}

    def __call__(self, tensor: Tensor) -> str | None:
        """The name of the parameter or buffer that a tensor is, if it is one."""
        found = self._names.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None


class HookWatch(TorchDispatchMode):
    """Runs a hook and sees what it does. Raises CaptureError for what would not be what the hook does on one device."""

    def __init__(self, hook: Hook, grads: Sequence[Tensor], *, parts: bool) -> None:
        super().__init__()
        self.hook, self.parts = hook, parts
        self.memory = {grad.untyped_storage()._cdata for grad in grads}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._look(leaf)
        if any(one.untyped_storage()._cdata in self.memory for one in written_arguments(func, args, kwargs)):
            raise CaptureError(
                f"{self.hook.told} overwrites the gradient that it is handed.\n  Return another tensor: g * 0.5, not g.mul_(0.5)."
            )
        if self.parts and not alone(func):
            with self:  # some operators are made of others
                inside = func.decompose(*args, **kwargs)
            if inside is not NotImplemented:
                return inside
            raise CaptureError(
                f"{self.hook.told} treated every element by itself when the program was made, and now calls {func}.\n"
                "  It may have been handed a part of the gradient. Let it do the same in every step."
            )
        return func(*args, **kwargs)

    def _look(self, tensor: Tensor) -> None:
        name = None if self.hook.stale is None else self.hook.stale(tensor)
        if name is not None or tensor.is_meta:
            refuse_reading(self.hook, f"{name!r} of the model" if name else "a tensor of the model")


def of_torch(fn: Any) -> bool:
    """Whether torch itself registered a function as a hook."""
    while isinstance(fn, partial):
        fn = fn.func
    module = getattr(fn, "__module__", None) or type(fn).__module__
    return module == "torch" or module.startswith("torch.")


def refuse_reading(hook: Hook, what: str) -> None:
    """Raise CaptureError: a hook reads what only the forward, or the model before it was made parallel, has."""
    raise CaptureError(
        f"{hook.told} reads {what} beside the gradient. In a parallel program that tensor lies elsewhere, cut, or gathered for a moment.\n"
        "  Let the hook use nothing but the gradient and constants of its own, or write an autograd.Function that is handed the tensor."
    )


def alone(func: Any) -> bool:
    """Whether an operator treats every element by itself."""
    return isinstance(func, OpOverload) and (torch.Tag.pointwise in func.tags or func._schema.name in COPIES)


COPIES = frozenset({"aten::detach", "aten::clone", "aten::alias", "aten::_to_copy", "aten::zeros_like", "aten::ones_like", "prim::device"})


def act(hook: Hook, grads: Sequence[Tensor], *, parts: bool) -> list[Tensor]:
    """The gradients after a hook. Raises CaptureError if it returns what is no gradient of the same values."""
    with HookWatch(hook, grads, parts=parts):
        returned = hook.call(tuple(grads))
    return replaced(hook.told, grads, returned)


def replaced(told: str, grads: Sequence[Tensor], returned: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The gradients, each replaced by what a hook returned for it, if anything. Raises CaptureError for anything of another kind."""
    found = [grad if new is None else new for grad, new in zip(grads, returned or [None] * len(grads), strict=True)]
    for grad, new in zip(grads, found, strict=True):
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (grad.shape, grad.dtype, grad.device):
            raise CaptureError(
                f"{told} was handed {_kind(grad)} and returned {_kind(new)}.\n  Return a gradient of the same kind, or None."
            )
    return found


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


# ---- the operators ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("meshpar::hooked", mutates_args=())
def hooked(values: list[Tensor], name: str) -> list[Tensor]:
    """The same values; in backward, their gradients go through the hook called `name` together."""
    return [value.clone() for value in values]


@torch.library.custom_op("meshpar::hooked_parts", mutates_args=())
def hooked_parts(value: Tensor, name: str) -> Tensor:
    """The same value; in backward, every element of its gradient goes through the hook called `name`."""
    return value.clone()


@torch.library.custom_op("meshpar::hook_grads", mutates_args=())
def hook_grads(grads: list[Tensor], name: str, parts: bool) -> list[Tensor]:
    """The gradient of `hooked` and `hooked_parts`: what the hook makes of the gradients. On simulated ranks every rank calls it."""
    memory = {grad.untyped_storage()._cdata for grad in grads}
    found = act(known(name), grads, parts=parts)
    return [new.clone() if new.untyped_storage()._cdata in memory else new for new in found]


@hooked.register_fake
def _(values: list[Tensor], name: str) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


@hooked_parts.register_fake
def _(value: Tensor, name: str) -> Tensor:
    return torch.empty_like(value)


@hook_grads.register_fake
def _(grads: list[Tensor], name: str, parts: bool) -> list[Tensor]:
    return [torch.empty_like(grad) for grad in grads]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.name, several = inputs[1], isinstance(output, (list, tuple))
    ctx.like = [(one.shape, one.dtype, one.device) for one in (output if several else (output,))]


def _hooked_backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    full = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
    ]
    begin = known(ctx.name).begin
    if begin is not None:
        begin()
    return torch.ops.meshpar.hook_grads(full, ctx.name, False), None


def _parts_backward(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.meshpar.hook_grads([grad], ctx.name, True)[0], None


hooked.register_autograd(_hooked_backward, setup_context=_remember)
hooked_parts.register_autograd(_parts_backward, setup_context=_remember)

WHOLE, PARTS = torch.ops.meshpar.hooked.default, torch.ops.meshpar.hooked_parts.default
"""The operators in a graph."""


def stable(text: str) -> str:
    """A description of nodes without what tells the captures of one process apart."""
    return re.sub(r"#\d+", "", text) if "meshpar.hooked" in text else text
