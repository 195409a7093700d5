"""The expert seam: during capture, routing-dependent code of expert layers is replaced by `dispatch`, `grouped_mm` and `combine`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from meshpar.ops.experts import combine, dispatch, grouped_mm, row_expert

_NAME = "meshpar"


@contextmanager
def seam(model: nn.Module) -> Iterator[None]:
    """Inside, the expert layers of `model` that loop over the tokens of each expert run as grouped matrix products instead."""
    with ExitStack() as stack:
        stack.enter_context(_registered(model))
        yield


@contextmanager
def _registered(model: nn.Module) -> Iterator[None]:
    """Answer for the expert layers that ask transformers' registry how to run. (Not imported here: a model of its kind has imported it.)"""
    registry = getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", None)
    if registry is None:
        yield
        return
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config.__dict__.get(_CHOICE) for key, config in configs.items() if _CHOICE in config.__dict__}
    registry[_NAME] = grouped_experts
    try:
        for key in before:
            configs[key].__dict__[_CHOICE] = _NAME
        yield
    finally:
        for key, choice in before.items():
            configs[key].__dict__[_CHOICE] = choice
        del registry[_NAME]


_CHOICE = "_experts_implementation_internal"


def grouped_experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An expert layer in the registry's terms (stacked weights, maybe biases and gates): `hidden` [T, h], `index`, `weights` [T, k]."""
    x, offsets, perm = dispatch(hidden, index, self.num_experts)
    expert = row_expert(x, offsets) if self.has_bias else None
    into = "gate_up_proj" if self.has_gate else "up_proj"
    y = _project(self, into, x, offsets, expert)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _project(self, "down_proj", y, offsets, expert)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    return combine(y, perm, weights)


def _project(self: Any, name: str, x: Tensor, offsets: Tensor, expert: Tensor | None) -> Tensor:
    weight = getattr(self, name)
    y = grouped_mm(x.to(weight.dtype), weight if self.is_transposed else weight.transpose(1, 2), offsets)
    return y if expert is None else y + getattr(self, f"{name}_bias")[expert]
