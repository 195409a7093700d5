"""What is recorded when a model is captured: a call of it on the tensors of a batch, which returns the tensors of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshpar._torch import as_one_process, pytree
from meshpar.capture import structure
from meshpar.capture.batch import ReadBatch
from meshpar.capture.functions import calls as functions
from meshpar.capture.state import taken as state
from meshpar.capture.values import branches
from meshpar.errors import CaptureError
from meshpar.graph.captured import Slot


@dataclass
class Returned:
    """What the recorder saw of the model's output (export puts a module's own attributes back, so it is kept outside)."""

    spec: pytree.TreeSpec | None = None
    leaves: tuple[Any, ...] = ()
    dropped: tuple[str, ...] = ()
    loss: int | None = None


class ForwardRecorder(nn.Module):
    """Calls the model on the tensors of the batch and returns the tensors of its output, the loss last when it is computed outside.

    It is what one process computes from the whole batch: a forward that asks torch.distributed finds it not initialized.
    """

    _loss_fn: Callable[[Any, Any], torch.Tensor] | None

    def __init__(
        self, model: nn.Module, batch: ReadBatch, loss_fn: Callable[[Any, Any], torch.Tensor] | None, recording: state.Recording
    ) -> None:
        super().__init__()
        self.model = model
        self.outcome = Returned()
        self.functions = functions.Calls(model)
        self._batch = batch
        self.__dict__["_loss_fn"] = loss_fn  # (a module is none of this one: what it holds is no part of the model)
        self._recording = recording

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        by_name: dict[str | int, torch.Tensor] = dict(zip(self._batch.names, tensors, strict=False))
        recording, slots = self._recording, tensors[len(self._batch.names) :]
        leaves = [by_name[leaf.key] if isinstance(leaf, Slot) else leaf for leaf in self._batch.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._batch.spec)
        buffers = [(module, name, value) for module in self.model.modules() for name, value in module._buffers.items()]
        with recording.around(self.model, self._loss_fn, slots), state.autocast(recording.ask), as_one_process():
            output = self.model(*args, **kwargs)
            _write_back(buffers)
            loss = structure.find_loss(output) if self._loss_fn is None else structure.call_loss(self._loss_fn, output, kwargs or args)
        return self._record(output, loss)

    def _record(self, output: Any, loss: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        found = self.outcome
        leaves, found.spec, found.dropped = structure.flatten(output)
        places = [place for place in structure.by_key(found.spec) if isinstance(leaves[place], torch.Tensor)]
        tensors = [leaves[place] for place in places]
        slots = {place: Slot(index) for index, place in enumerate(places)}
        found.leaves = tuple(slots.get(place, leaf) for place, leaf in enumerate(leaves))
        found.loss = next((i for i, tensor in enumerate(tensors) if tensor is loss), None)
        if loss is not None and found.loss is None:
            found.loss = len(tensors)
            tensors.append(loss)
        self.functions.refuse_unseen(tensors)
        return tuple(tensors)


def _write_back(buffers: list[tuple[nn.Module, str, torch.Tensor | None]]) -> None:
    """`self.buffer = new` -> `self.buffer.copy_(new)`: export sees updates in place, and would lose an assignment.

    A table of numbers that is not saved, in another size or type than it had, is made again in every forward; the buffer stays as it was.
    """
    for module, name, before in buffers:
        now = module._buffers.get(name)
        if now is before:
            continue
        module._buffers[name] = before
        if before is None or now is None or now.shape != before.shape or now.dtype != before.dtype:
            if name in module._non_persistent_buffers_set and _is_remade(now, before):
                continue
            raise CaptureError(
                f"The forward of {type(module).__name__} assigns a tensor of another shape or type to its buffer {name!r}.\n"
                "  Register the buffer at its final shape and type in __init__."
            )
        with torch.no_grad():
            before.copy_(now)


def _is_remade(now: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    return now is not None and before is not None and (branches.settled(now) or branches.cast_of(now, before))
