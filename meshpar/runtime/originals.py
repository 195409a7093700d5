"""The model that parallelize was given keeps its parameters, and nothing trains them: an optimizer made on those is told so."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from meshpar.errors import ConfigError


def watch_originals(model: nn.Module, parallel: nn.Module) -> None:
    """As long as `parallel` lives, a step of an optimizer on the parameters of `model` that finds no gradient at all is refused."""
    known: dict[int, weakref.ref[torch.Tensor]] = {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}
    weakref.finalize(parallel, register_optimizer_step_pre_hook(_refusing(known)).remove)


def _refusing(known: dict[int, weakref.ref[torch.Tensor]]) -> Callable[..., None]:
    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        held = known.get(id(first))
        if held is None or held() is not first:
            return
        if any(p.grad is not None for p in _parameters(optimizer)):
            return  # the model is trained too, beside the parallel one
        raise ConfigError(
            f"this {type(optimizer).__name__} was made on the parameters of the model given to parallelize, which have no gradients: "
            f"pm.train_step trains those of the parallel model. Make it anew, after parallelize: "
            f"{type(optimizer).__name__}(pm.parameters(), ...)."
        )

    return look


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
