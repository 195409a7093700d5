"""What the ranks of a mesh must have alike before a program is built: the captured graph, the parameters, and their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..capture import text
from ..capture.captured import Captured
from ..mesh import agree_on_lines
from .record import mark_of

_ORDER = (
    "Every rank must pass the same model and build it in the same way. What differs from process to process is the order of a set of "
    "strings: where the forward or the constructor loops over one and the order matters (a sum of floats, a list, the first that is "
    "found), write `for name in sorted(names)`."
)
_VALUES = (
    "Every rank takes its part of the values of its own model, so all must have the same ones: call torch.manual_seed with the same number "
    "on all ranks before the model is built, build its modules in the same order (`for name in sorted(names)` where names are a set of "
    "strings, which every process orders in its own way), or pass weights=PATH."
)


def agree_on_graph(captured: Captured, parameters: Mapping[str, tuple[tuple[int, ...], str, bool]], mesh: DeviceMesh) -> None:
    """Raise PlanError on every rank, with the first lines that differ, unless all have captured the same graph. Collective."""
    held = [f"{name}: {dtype} {list(shape)}{'' if trains else ', frozen'}" for name, (shape, dtype, trains) in sorted(parameters.items())]
    agree_on_lines([*text.lines(captured), *held], lambda: [*text.shown(captured), *held], mesh, "the model's captured graph", _ORDER)


def agree_on_values(model: nn.Module, mesh: DeviceMesh, *, filled: bool) -> None:
    """Raise PlanError on every rank, with the first tensors that differ, unless the model holds the same values everywhere. Collective.

    Large tensors are compared in places. `filled`: whether parameters get their values from elsewhere, and only buffers are compared.
    """
    tensors = dict(model.named_buffers()) if filled else {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:8]
    held = [f"{name}: {_value(tensor, f'{state} {place}')}" for place, (name, tensor) in enumerate(tensors.items())]
    agree_on_lines(sorted(held), lambda: sorted(held), mesh, "the initial state of the model", _VALUES)


def _value(tensor: torch.Tensor, when: str) -> str:
    """What tells the value of a tensor: its elements, or how they will be computed."""
    if not tensor.is_meta:
        return f"elements {text.digest(tensor)}"
    mark = mark_of(tensor)
    if mark is None:
        return f"to be initialised, as {when}"
    tape, number = mark.tape, mark.number
    record: list[Any] = [hashlib.sha256(s.numpy().tobytes()).hexdigest() for s in tape.start.values()]
    record += [(i, str(tape.ops[i].run)) for i in tape.touched[number]]
    return f"to be initialised, as {hashlib.sha256(str(record).encode()).hexdigest()[:16]}"
