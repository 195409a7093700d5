"""The model that parallelize was given keeps its parameters, and nothing trains them: what is made of those as well is told so."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from meshpar.errors import ConfigError


def watch_originals(model: nn.Module, parallel: nn.Module) -> None:
    """As long as `parallel` lives: warn of another model that is parallelized and shares parameters with `model`, and refuse steps of an
    optimizer on the parameters of `model` that finds no gradient at all, or holds those of `parallel` too."""
    originals = _Originals(model, parallel)
    for other in list(_LIVING.values()):
        if not other.is_of(model) and (shared := [name for name, p in model.named_parameters() if other.name(p) is not None]):
            warnings.warn(
                f"{type(model).__name__} shares {_listed(shared)} with {other.given}, which was parallelized before: the two parallel "
                "models hold copies of their own, which are trained apart. To train what they share once, put both into one module, "
                "whose forward calls them, and parallelize that.",
                stacklevel=4,
            )
    _LIVING[parallel] = originals
    _look_before_steps()


@cache
def _look_before_steps() -> None:
    """Once in a process, for good: what is registered and removed while an optimizer walks through its hooks (models die when the garbage
    collector likes) would end its step."""

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for originals in list(_LIVING.values()):
            originals.look(optimizer)

    register_optimizer_step_pre_hook(look)


class _Originals:
    """The parameters of a model that was parallelized."""

    def __init__(self, model: nn.Module, parallel: nn.Module) -> None:
        self.given = type(model).__name__
        self._model, self._parallel = weakref.ref(model), weakref.ref(parallel)
        self._known = {id(parameter): (name, weakref.ref(parameter)) for name, parameter in model.named_parameters()}
        self._looked_at: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()

    def is_of(self, model: nn.Module) -> bool:
        return self._model() is model

    def name(self, parameter: torch.Tensor) -> str | None:
        """What the model calls one of its parameters; None for any other tensor."""
        found = self._known.get(id(parameter))
        return found[0] if found is not None and found[1]() is parameter else None

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step of any optimizer."""
        first = next(_parameters(optimizer), None)
        if first is not None and self.name(first) is not None and all(p.grad is None for p in _parameters(optimizer)):
            raise ConfigError(
                f"this {type(optimizer).__name__} was made on the parameters of the model given to parallelize, which have no gradients: "
                f"pm.train_step trains those of the parallel model. Make it anew, after parallelize: "
                f"{type(optimizer).__name__}(pm.parameters(), ...)."
            )
        if self._looked_at.get(optimizer) != len(optimizer.param_groups):
            self._refuse_both(optimizer)
            self._looked_at[optimizer] = len(optimizer.param_groups)

    def _refuse_both(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters of the model that are tied to something outside of it, which the optimizer holds beside the parallel model's."""
        parallel = self._parallel()
        names = [name for p in _parameters(optimizer) if (name := self.name(p)) is not None]
        ours = {id(p) for p in parallel.parameters()} if names and parallel is not None else set()
        if any(id(p) in ours for p in _parameters(optimizer)):
            raise ConfigError(
                f"this {type(optimizer).__name__} holds parameters of the parallel model, and {_listed(names)} of the {self.given} that "
                "was given to parallelize: a module outside of it shares them, but the parallel model has copies of its own, so that the "
                "two would be trained apart. Put that module into the model, so that forward calls it, and parallelize both together."
            )


_LIVING: weakref.WeakKeyDictionary[nn.Module, _Originals] = weakref.WeakKeyDictionary()
"""By parallel model."""


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
