"""Tensors that a forward or a loss computes with and that want a gradient, but are no parameters of the model.

Parameters in a plain list, of a module that a loss holds, of a global variable: an export holds them as constants, so nothing would train
them. They are seen where torch's functions are called, and refused if their gradient would flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from meshpar._torch import is_transformed
from meshpar.capture import grad
from meshpar.errors import CaptureError
from meshpar.graph.facts import facts, infos_of


class Foreign(TorchFunctionMode):
    """Notes the tensors with memory that are handed to torch's functions while gradients are on, and want one."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[int, torch.Tensor] = {}
        """Where in memory they lie -> the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._note(args)
        if kwargs:
            self._note(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (tuple, list)):
                self._note(value)
            elif type(value) in _PLAIN and value.requires_grad and _has_memory(value) and torch.is_grad_enabled():
                self.noted.setdefault(value.data_ptr(), value)

    def refuse(self, graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> None:
        """Raise CaptureError if the gradient of one of them would flow to what the graph returns."""
        names = {n: t for n, c in constants.items() if _has_memory(c) and (t := self.noted.get(c.data_ptr())) is not None}
        told = [f"{_shown(tensor)}{_where(graph, name)}" for name, tensor in names.items() if _flows(graph, name)]
        if told:
            raise CaptureError(
                f"The forward computes with {'; '.join(told)}, which wants a gradient and is no parameter of the model: nothing would "
                "train it.\n  Register it: nn.ParameterList or nn.ModuleList instead of a list, self.weight = nn.Parameter(...). What a "
                "loss_fn trains belongs into the model, which takes the targets and returns the loss; or call it outside, "
                "loss_fn(pm(**batch), batch).backward(). If it is not to be trained: requires_grad_(False), or detach()."
            )


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""(Asked first: whatever is asked of a tensor goes through all modes.)"""


def _has_memory(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not is_transformed(tensor) and tensor.numel() > 0


def _flows(graph: fx.Graph, name: str) -> bool:
    """Whether what the graph returns has a gradient for one of the values it holds. (What values want is to be set anew after this.)"""
    grad.propagate(graph, {name: True})
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return any(info is not None and info.requires_grad for node in output.all_input_nodes for info in infos_of(node))


def _where(graph: fx.Graph, name: str) -> str:
    users = (user for node in graph.nodes if node.op == "get_attr" and node.target == name for user in node.users)
    return next((f" at {facts(user).source}" for user in users if facts(user).source), "")


def _shown(tensor: torch.Tensor) -> str:
    kind = "a parameter" if isinstance(tensor, torch.nn.Parameter) else "a tensor"
    return f"{kind} of shape {list(tensor.shape)}"
