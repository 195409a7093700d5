"""Whether a state dict fits a parallel model: everything that does not, said at once, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from meshpar._torch import LocalTensor, part_here
from meshpar.errors import ConfigError, StateDictError, raise_all
from meshpar.init.fit import FLOATS, Fact, Words, fit, short
from meshpar.init.weights import tensor_groups

EXTRA_STATE = "_extra_state"

_WORDS = Words(
    missing="Missing key in state_dict: {}.",
    unexpected="Unexpected key in state_dict: {}.",
    shape="size mismatch for {}: {} in the state dict, {} in the model.",
    to_skip_missing="To load the rest: load_state_dict(state, strict=False), which returns the names.",
    to_skip_unexpected="To leave what is unexpected: load_state_dict(state, strict=False), which returns the names.",
    to_cast="",
)


def check_state(module: nn.Module, original: nn.Module, state: Mapping[str, Any], *, strict: bool, assign: bool) -> None:
    """Refuse a state dict that does not fit. `module`: this rank's tensors; `original`: the model, with all names.

    Missing are names that this rank has. Without `strict`, missing and unexpected names are left to torch, which returns them. Floating
    values are cast to the model's dtypes, as torch does, unless they would become infinite. Raises StateDictError; ConfigError for
    `assign`.
    """
    if assign:
        raise ConfigError(
            "load_state_dict(assign=True) would put other tensors in the place of the parallel ones. Leave assign out: values are copied."
        )
    groups = tensor_groups(original)
    facts = {name: Fact(tuple(t.shape), t.dtype) for group, t in groups for name in group}
    facts |= {name: Fact(tuple(t.shape), t.dtype) for name, t in _own(module)}  # dtypes as they are here
    own = {name for name, _ in _own(module)}
    known = [(name,) for name in facts]  # as in torch, each of the names of a tied tensor is asked for
    found = {n: Fact(tuple(v.shape), v.dtype) for n, v in state.items() if isinstance(v, torch.Tensor)}
    accepted = "error" if strict else "skip"
    fitted = fit(known, facts, found, _WORDS, missing=accepted, unexpected=accepted, casts=True, needed=own)
    complaints = list(fitted.complaints)
    complaints += _others(state) if strict else []
    complaints += _infinite(state, facts, own)
    raise_all(StateDictError, "the state dict does not fit the model:", complaints)


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for group, tensor in tensor_groups(module) for name in group]


def _others(state: Mapping[str, Any]) -> list[str]:
    """What is no tensor: the extra state of modules, which a parallel model does not keep."""
    extra = [name for name in state if name.rpartition(".")[2] == EXTRA_STATE]
    return [
        f"{name}: a parallel model keeps no extra state of its modules. To leave it: load_state_dict(state, strict=False)."
        for name in extra
    ]


def _infinite(state: Mapping[str, Any], facts: Mapping[str, Fact], own: Collection[str]) -> list[str]:
    """Values that a cast to a narrower dtype would make infinite; read only where there is such a cast."""
    complaints = []
    for name, value in state.items():
        if name not in own or not isinstance(value, torch.Tensor) or value.is_meta or not {value.dtype, facts[name].dtype} <= set(FLOATS):
            continue
        largest = torch.finfo(facts[name].dtype).max
        part = part_here(value)
        if largest >= torch.finfo(value.dtype).max or isinstance(part, LocalTensor):
            continue
        wrong = part.isfinite() & (part.abs() > largest)
        if wrong.any():
            complaints.append(f"{name}: {int(wrong.sum())} values do not fit {short(facts[name].dtype)} and would become infinite.")
    return complaints
