"""The hooks of the model that was given: those on its parameters and modules, seen whenever a step begins, and kept by copies of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from torch import nn

from meshpar._torch import global_hooks
from meshpar.capture import copies
from meshpar.capture.hooks.kept import Given, fn_name
from meshpar.errors import ConfigError
from meshpar.ops.hooks import of_torch

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
                    f"{fn_name(hook)} is registered as a hook on all modules at once (register_module_...): a parallel model has other "
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


def hand_on_library_hooks(original: nn.Module, copy: nn.Module, before: Mapping[str, Sequence[frozenset[int]]]) -> None:
    """Register forward hooks on a copy that an installed package registered on the original since: with the attributes that say so.

    `before`: those that there were, see `forward_hooks`. Those that the copy's own forward registered are not registered again.
    """
    for path, keys in before.items():
        for name, known, table in zip(_FORWARD, keys, _tables(original.get_submodule(path), _FORWARD), strict=True):
            new = {key: hook for key, hook in table.items() if key not in known and _of_library(hook)}
            if not new:
                continue
            module = copy.get_submodule(path)
            own: dict[int, Any] = getattr(module, name)
            there = Counter(getattr(hook, "__code__", hook) for hook in own.values())
            for key, hook in new.items():
                code = getattr(hook, "__code__", hook)
                there[code] -= 1
                if there[code] < 0 and key not in own:
                    own[key] = hook
                    for more in (f"{name}_with_kwargs", f"{name}_always_called"):
                        if key in getattr(original.get_submodule(path), more, {}):
                            getattr(module, more)[key] = True


def forward_hooks(model: nn.Module) -> dict[str, tuple[frozenset[int], ...]]:
    """The keys of the forward hooks of every module."""
    return {path: _keys(_tables(module, _FORWARD)) for path, module in model.named_modules()}


def _refuse_after(model: nn.Module) -> None:
    found = [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]
    if found:
        raise ConfigError(
            f"{', '.join(found[:3])}{' and others' if len(found) > 3 else ''}: hooks after accumulation get the parameter itself, and "
            "those of the parallel model are others.\n"
            "  Register them on these: for p in pm.parameters(): p.register_post_accumulate_grad_hook(hook)."
        )


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
