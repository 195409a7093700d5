"""Whether a batch is what the model's forward takes, by names and kinds, before anything is captured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from meshpar.errors import BatchError, near, raise_all


def check_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise BatchError with all that the forward cannot be called with.

    >>> check_call(nn.Linear(2, 2), (), {"input": torch.ones(1, 2)})
    """
    name = f"{type(model).__name__}.forward"
    parameters = inspect.signature(model.forward).parameters
    complaints = _dict_by_position(parameters, args) or [*_names(parameters, args, kwargs), *_missing(parameters, args, kwargs)]
    takes = ", ".join(p.name if p.default is p.empty else f"{p.name}=" for p in parameters.values() if p.kind not in _ANY)
    raise_all(BatchError, f"{name}({takes}) cannot be called with this batch:", complaints)
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()), None)
    if first is not None and first.shape[0] == 0:
        raise BatchError(
            f"the batch has no samples: its first tensor has shape {list(first.shape)}. Every data rank has as many samples as the others; "
            "leave out a step for which there are none, on all ranks."
        )


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _dict_by_position(parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...]) -> list[str]:
    """A batch that was handed over whole, where its entries were meant."""
    batch = args[0] if len(args) == 1 else None
    if not isinstance(batch, Mapping) or not batch or not all(key in parameters for key in batch):
        return []
    return ["its entries are keyword arguments, and it is given as one positional one. Write **batch (or example=batch)."]


def _names(parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    kinds = [p.kind for p in parameters.values()]
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = []
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(args) > len(positional):
        found.append(f"it gives {len(args)} positional arguments, of {len(positional)} at most.")
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        found += [f"{name} is none of its arguments.{near(name, parameters)}" for name in kwargs if name not in parameters]
    return found + [f"{name} is given twice, by position and by name." for name in positional[: len(args)] if name in kwargs]


def _missing(parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    given = {*kwargs, *[p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]}
    wanted = [p for p in parameters.values() if p.default is p.empty and p.kind not in _ANY and p.name not in given]
    return [f"{p.name} is missing, which has no default." for p in wanted]
