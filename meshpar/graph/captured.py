"""What capture hands on: the model as one flat functional graph, and the facts about its values that every later pass reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from meshpar._torch import pytree
from meshpar.capture.state.taken import State
from meshpar.ops.hooks import Hook


@dataclass(frozen=True)
class Captured:
    """The model's forward as one `fx.Graph` of functional ATen ops at fixed shapes.

    Nodes: `placeholder` for every tensor of the batch (named as in `inputs`); `get_attr` with the original name as target for every
    parameter, buffer and constant; `call_function` for ATen overloads and `operator.getitem`; one `output` whose argument is a flat tuple:
    first the tensors of the model's output in the order of `out_spec`, then the loss if it was computed outside the model, then one new
    value per entry of `mutations`.

    What is known of each node besides: see `graph.facts`.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    """Canonical names of the parameters the graph uses, in the model's order."""
    aliases: Mapping[str, str]
    """Every other name of a tied parameter -> its canonical name."""
    buffers: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    """Tensors the forward created from Python data, by `get_attr` target (`_constant_0`, ...)."""
    inputs: tuple[str, ...]
    """Placeholder names, one per tensor leaf of `in_spec` (leaves that are not tensors are frozen), then those of numbers."""
    in_spec: pytree.TreeSpec
    """Structure of `(args, kwargs)`."""
    in_leaves: tuple[Any, ...]
    """The leaves of `in_spec` with every tensor replaced by its placeholder's name wrapped in `Slot`."""
    batch_dims: Mapping[str, int]
    """Placeholder -> the dim that holds samples; inputs without one are absent."""
    out_spec: pytree.TreeSpec
    out_leaves: tuple[Any, ...]
    """The leaves of `out_spec`: `Slot(i)` for the i-th value of the output node, anything else as the model returned it."""
    loss: int | None
    """Which value of the output node is the training loss, if the model returns one."""
    mutations: tuple[str, ...]
    """Buffers the forward updates, in the order of their new values at the end of the output tuple."""
    dropped: tuple[str, ...] = ()
    """Outputs left out because their type is not known to pytree (for instance a cache), as readable paths."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Every expert layer that became `dispatch`, `grouped_mm` and `combine` -> how: "registered", "transformers", "stack" or "list"."""
    unrecognised: Mapping[str, str] = field(default_factory=dict)
    """Modules that look like expert layers and were captured as written -> why."""
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    """The hooks that act in backward, by the names by which the graph calls them."""
    state: State = field(default_factory=State)
    """What of Python the graph was captured with."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a pytree that a tensor fills."""

    key: str | int
