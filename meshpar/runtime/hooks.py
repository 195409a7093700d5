"""Hooks on parameters, called by the engine: once per step, on every rank that has the parameter, with the whole gradient of the step.

A hook on a parameter acts on its gradient before that is added to `.grad`, and on one device that is the gradient of the whole batch. In a
parallel step no single backward has it: it is summed over data ranks, microbatches, stages and uses, and cut. So hooks are taken off the
parameters while a step runs, and called at its end:

    p.register_hook(f)                            f(whole gradient, in the original order, a plain tensor); what it returns is cut again
    p.register_post_accumulate_grad_hook(f)       f(p), after that; p is the parameter of the parallel model, p.grad is complete
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .._torch import global_hooks, local_of, maybe_disable_local_tensor_mode
from ..capture import copies
from ..capture.hooks import Given
from ..errors import ConfigError
from ..ops.hooks import Hook, Watch, of_torch, replaced
from .parameters import from_true, gathered, spec_of

Table = Mapping[int, Callable[..., Any]]
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_MODULE = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
_STATE = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def refuse_global() -> None:
    """Raise ConfigError while somebody's hooks are registered for all modules at once: they would act on our own modules too."""
    for table in global_hooks():
        for hook in table.values() if table else ():
            if not of_torch(hook):
                raise ConfigError(
                    f"{_name(hook)} is registered as a hook on all modules at once (register_module_...): a parallel model has other "
                    "modules.\n  Register it on each module of the model before parallelize: "
                    "for module in model.modules(): module.register_forward_hook(hook)."
                )


class ModelHooks:
    """The hooks of the model that was given, as they are now: removing one works at any time, also when the model itself is gone."""

    def __init__(self, model: nn.Module) -> None:
        refuse_global()
        _refuse_after(model)
        self.given = Given(model)
        self._parameters = {name: ref(parameter) for name, parameter in model.named_parameters()}
        self._tables: dict[str, Table] = {}
        self._modules = {path: ref(module) for path, module in model.named_modules()}
        self._before = {path: _keys(_tables(module)) for path, module in model.named_modules()}
        forward = ((path, _tables(module, _FORWARD)) for path, module in model.named_modules())
        self._state = [path for path, module in model.named_modules() if not all(map(_of_library, _state_hooks(module)))]
        self._forward = [(path, _keys(tables), tables) for path, tables in forward if any(tables)]
        self.look()

    def look(self) -> None:
        """See what was registered since. Raises ConfigError for hooks on modules: the program was made without them."""
        for name, reference in self._parameters.items():
            parameter = reference()
            if parameter is not None and parameter._backward_hooks is not None:
                self._tables[name] = parameter._backward_hooks
        for path, module in ((path, reference()) for path, reference in self._modules.items()):
            if module is None or not any(_tables(module)):
                continue
            pairs = zip(self._before[path], _tables(module), strict=True)
            if any(key not in before and not _of_library(hook) for before, table in pairs for key, hook in table.items()):
                raise ConfigError(
                    f"a hook was registered on {path or 'the model'!r} of the given model after parallelize: the parallel model is a "
                    "program of its own, made before.\n  Register it first, or call parallelize again."
                )

    def unchanged(self) -> None:
        """Raise ConfigError if a forward hook was removed: it is part of the program."""
        for path, keys, tables in self._forward:
            if any(not key <= table.keys() for table, key in zip(tables, keys, strict=True)):
                raise ConfigError(
                    f"a forward hook of {path or 'the model'!r} of the given model was removed, and is part of the program that was made "
                    "with it.\n  Call parallelize again."
                )

    def refuse_state(self) -> None:
        """Raise ConfigError if hooks of the model change its state dicts: they would be lost."""
        if self._state:
            raise ConfigError(
                f"{', '.join(repr(path) if path else 'the model' for path in self._state)}: there are hooks on state_dict() or "
                "load_state_dict() of the given model, which a parallel model does not run: its names and values are those of parameters "
                "and buffers.\n  Use mp.checkpoint.save and load, or do with the state dict yourself what the hooks do, after removing "
                "them."
            )

    def of(self, name: str) -> Table:
        """The hooks on a parameter."""
        return self._tables.get(name, {})

    @property
    def any(self) -> bool:
        """Whether there is a hook on any parameter."""
        return any(self._tables.values())


def _tables(module: nn.Module, names: Sequence[str] = _MODULE) -> tuple[Table, ...]:
    return tuple(getattr(module, name) for name in names)


def _state_hooks(module: nn.Module) -> list[Any]:
    found = (hook for table in _tables(module, _STATE) for hook in table.values())
    return [getattr(hook, "hook", hook) for hook in found]  # (torch wraps those of loading)


def _keys(tables: Sequence[Table]) -> tuple[frozenset[int], ...]:
    return tuple(map(frozenset, tables))


def _of_library(hook: Any) -> bool:
    """Whether an installed package registered a hook: such do when a model runs, to collect its outputs."""
    path = getattr(getattr(hook, "__code__", None), "co_filename", "")
    return of_torch(hook) or "site-packages" in path or "dist-packages" in path


def _refuse_after(model: nn.Module) -> None:
    found = [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]
    if found:
        raise ConfigError(
            f"{', '.join(found[:3])}{' and others' if len(found) > 3 else ''}: hooks after accumulation get the parameter itself, and "
            "those of the parallel model are others.\n"
            "  Register them on these: for p in pm.parameters(): p.register_post_accumulate_grad_hook(hook)."
        )


class StepHooks:
    """The hooks that act on the parameters of one parallel model: those of the model it was made from, and its own."""

    def __init__(self, model: ModelHooks) -> None:
        self._model = model
        self._seen = -1
        self._own: tuple[str, ...] = ()

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
            found = ((name, p) for name, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks)
            self._own = tuple(name for name, _ in found)
            self._seen = RemovableHandle.next_id

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
            _local(earlier).add_(_local(grad))
        parameter.grad = grad if earlier is None else earlier

    def _hooked(self, name: str, parameter: nn.Parameter, grad: torch.Tensor, hooks: Sequence[Callable[..., Any]]) -> torch.Tensor:
        spec = spec_of(parameter)
        whole = gathered(grad, spec)
        with maybe_disable_local_tensor_mode():
            for fn in hooks:
                hook = Hook(name, f"The hook {_name(fn)} on the parameter {name!r}", lambda grads: None, self._model.given.stale)
                with Watch(hook, (), parts=False):
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


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor


def _name(fn: Any) -> str:
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))


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


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model with the hooks on its parameters, which a copy of it leaves behind."""
    new = copies.copied(model)
    attach(new, of_parameters(model))
    return new


ParameterHooks = Mapping[str, tuple[tuple[Callable[..., Any], ...], tuple[Callable[..., Any], ...]]]
"""Parameter -> its hooks before and after accumulation."""


def of_parameters(model: nn.Module) -> ParameterHooks:
    """The hooks on the parameters of a model."""
    tables = {n: (p._backward_hooks or {}, p._post_accumulate_grad_hooks or {}) for n, p in model.named_parameters()}
    return {n: (tuple(before.values()), tuple(after.values())) for n, (before, after) in tables.items() if before or after}


def attach(model: nn.Module, hooks: ParameterHooks) -> None:
    """Register hooks on the parameters of a copy that has none."""
    parameters = dict(model.named_parameters())
    for name, (before, after) in hooks.items():
        for hook in before:
            parameters[name].register_hook(hook)
        for hook in after:
            parameters[name].register_post_accumulate_grad_hook(hook)
