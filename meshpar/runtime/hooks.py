"""Hooks on parameters, called by the engine: once per step, on every rank that has the parameter, with the whole gradient of the step.

A hook on a parameter acts on its gradient before that is added to `.grad`, and on one device that is the gradient of the whole batch. In a
parallel step no single backward has it: it is summed over data ranks, microbatches, stages and uses, and cut. So hooks are taken off the
parameters while a step runs, and called at its end:

    p.register_hook(f)                            f(whole gradient, in the original order, a plain tensor); what it returns is cut again
    p.register_post_accumulate_grad_hook(f)       f(p), after that; p is the parameter of the parallel model, p.grad is complete
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from meshpar._torch import maybe_disable_local_tensor_mode, part_here
from meshpar.capture.hooks.models import ModelHooks, fn_name, refuse_global
from meshpar.errors import ConfigError
from meshpar.ops.hooks import Hook, HookWatch, of_torch, replaced
from meshpar.runtime.parameters.specs import from_true, gathered, spec_of


class StepHooks:
    """The hooks that act on the parameters of one parallel model: those of the model it was made from, and its own."""

    def __init__(self, model: ModelHooks) -> None:
        self._model = model
        self._seen = -1
        self._own: tuple[str, ...] = ()
        self._counts: dict[str, int] = {}
        self._agreed: dict[str, int] = {}
        self.changed = False

    def outside_steps(self, module: nn.Module) -> None:
        """Raise ConfigError where hooks on parameters would be called in a backward that is not ours, and refuse what `check` refuses."""
        self.check(module)
        if torch.is_grad_enabled() and (self._model.any or self._own):
            raise ConfigError(
                "there are hooks on parameters, and in pm(**batch); loss.backward() no place where a gradient is complete and not yet "
                "added to .grad.\n  Train with pm.train_step(**batch), which calls them; to see outputs: with torch.no_grad(): pm(**batch)."
            )

    def check(self, module: nn.Module) -> None:
        """Learn what hooks there are now. Raises ConfigError for hooks that would be lost."""
        refuse_global()
        self._model.unchanged()
        if self._seen != RemovableHandle.next_id:
            self._model.look()
            self._counts = {
                name: len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for name, p in module.named_parameters()
            }
            self._own = tuple(name for name, count in self._counts.items() if count)
            for name in self._counts:
                self._counts[name] += len(self._model.of(name))
            self._seen = RemovableHandle.next_id
            self.changed = self._counts != self._agreed and any((*self._counts.values(), *self._agreed.values()))

    def counts(self) -> dict[str, int]:
        """How many hooks there are on each parameter of this rank's part of the model."""
        return self._counts

    def agreed(self) -> None:
        """Ranks that have a parameter have as many hooks on it."""
        self._agreed, self.changed = dict(self._counts), False

    def done(self) -> None:
        """What was registered in a step was registered by torch."""
        self._seen = RemovableHandle.next_id

    @contextmanager
    def acting(self, module: nn.Module) -> Iterator[None]:
        """Around the forward and backward of a step. Collective over the meshes of the parameters that have hooks."""
        self.check(module)
        if not self._model.any and not self._own:
            yield
            self.done()
            return
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and (self._model.of(name) or name in self._own)}
        earlier = {name: parameter.grad for name, parameter in parameters.items()}
        own = {name: _taken_off(parameter) for name, parameter in parameters.items()}
        try:
            yield
        except BaseException:
            for name, parameter in parameters.items():
                parameter.grad = earlier[name]
            raise
        finally:
            for name, parameter in parameters.items():
                parameter._backward_hooks, parameter._post_accumulate_grad_hooks = own[name]
        for name, parameter in parameters.items():
            before, after = ({} if table is None else table for table in own[name])
            self._act(name, parameter, [*self._model.of(name).values(), *before.values()], earlier[name])
            for hook in list(after.values()) if parameter.grad is not None else ():
                hook(parameter)
        self.done()

    @torch.no_grad()
    def _act(self, name: str, parameter: nn.Parameter, hooks: Sequence[Callable[..., Any]], earlier: torch.Tensor | None) -> None:
        grad = parameter.grad
        if grad is None:  # nothing to call a hook with
            parameter.grad = earlier
            return
        if hooks:
            grad = self._hooked(name, parameter, grad, hooks)
        if earlier is not None:
            part_here(earlier).add_(part_here(grad))
        parameter.grad = grad if earlier is None else earlier

    def _hooked(self, name: str, parameter: nn.Parameter, grad: torch.Tensor, hooks: Sequence[Callable[..., Any]]) -> torch.Tensor:
        spec = spec_of(parameter)
        whole = gathered(grad, spec)
        with maybe_disable_local_tensor_mode():
            for fn in hooks:
                hook = Hook(name, f"The hook {fn_name(fn)} on the parameter {name!r}", lambda grads: None, self._model.given.stale)
                with HookWatch(hook, (), parts=False):
                    returned = fn(whole)
                (whole,) = replaced(hook.told, (whole,), (returned,))
        if not isinstance(grad, DTensor):
            return whole
        assert spec is not None
        return from_true(whole, spec, grad)


def _taken_off(parameter: nn.Parameter) -> tuple[Any, Any]:
    """A parameter's own hooks, which autograd does not see until they are back; and its gradient starts anew."""
    own = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    parameter._backward_hooks, parameter._post_accumulate_grad_hooks, parameter.grad = None, None, None  # type: ignore[assignment]
    return own


# ---- modules of a parallel model -------------------------------------------------------------------------------------------------------


def refusing(*names: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A class decorator: these ways to register hooks on a module of a parallel model are refused, unless torch or meshpar uses them."""

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        for name in names:
            setattr(cls, name, _refusing(name, getattr(cls, name)))
        return cls

    return decorate


def _refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def register(self: nn.Module, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if of_torch(hook) or (getattr(hook, "__module__", None) or "").startswith("meshpar."):
            return original(self, hook, *args, **kwargs)
        raise ConfigError(
            f"{name} on a module of a parallel model: it does not run the original's forward, only its share of a program.\n"
            "  Register the hook on the model, before parallelize: it becomes part of the program."
        )

    register.__name__ = name
    return register
