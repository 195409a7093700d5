"""What a parallel model has of its own since parallelize, where somebody changes it on the model that was given: he is told, once.

    model.dropout.eval(); model.load_state_dict(...); model.head.requires_grad_(False)

change nothing of `pm`, whose modes, parameters and buffers are its own. A model that has gradients is trained beside, and may change.
"""

from __future__ import annotations

import itertools
import operator
import warnings
import weakref
from collections.abc import Iterator

from torch import Tensor, nn

from meshpar.capture.state.taken import version_of

_NAMED = 3
"""Names that a message gives."""
_REQUIRES = operator.attrgetter("requires_grad")


class Apart:
    """Looks at the modes, parameters and buffers of the given model."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules())
        self._paths = [path for path, _ in modules]
        self._modules = [module.__dict__ for _, module in modules]
        self._tables: list[dict[str, Tensor | None]] = [
            table for module in self._modules for table in (module["_parameters"], module["_buffers"])
        ]
        tensors, numbers = self._tensors(), itertools.count()
        self._names = [{name: next(numbers) for name, tensor in table.items() if tensor is not None} for table in self._tables]
        self._kinds = [(tensor.device, tensor.dtype) for tensor in tensors]
        self._before = [weakref.ref(tensor) for tensor in tensors]
        self._modes, self._versions, self._trained = self._training(), list(map(version_of, tensors)), list(map(_REQUIRES, tensors))

    def forget(self) -> None:
        """Look no more."""
        self._modules.clear()
        self._tables.clear()
        self._before.clear()
        self._modes, self._versions, self._trained = [], [], []

    def look(self) -> None:
        """Warn of what changed, if the given model is not trained beside."""
        now = self._tensors()
        before = [tensor() for tensor in self._before]
        held = self._training() == self._modes and len(now) == len(before) and all(map(operator.is_, now, before))
        if held and list(map(version_of, now)) == self._versions and list(map(_REQUIRES, now)) == self._trained:
            return
        moved = list(self._moved())
        trained = any(tensor.is_leaf and tensor.grad is not None for tensor in now)
        self.forget()
        if moved and not trained:
            more = f", and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
            warnings.warn(
                f"the model given to parallelize was changed ({', '.join(moved[:_NAMED])}{more}), the parallel model was not: its modes, "
                "parameters and buffers are its own. Change them there: pm.eval(), pm.get_submodule(path).eval(), pm.load_state_dict(...).",
                stacklevel=2,
            )

    def _tensors(self) -> list[Tensor]:
        return [tensor for table in self._tables for tensor in table.values() if isinstance(tensor, Tensor)]

    def _training(self) -> list[bool | None]:
        """Of each module, or None of one that has no mode of its own (what torch.compile returns asks the module inside)."""
        return [module.get("training") for module in self._modules]

    def _moved(self) -> Iterator[str]:
        """What changed. Nothing is told of a tensor that is gone, new, on another device or in another dtype."""
        for path, now, before in zip(self._paths, self._training(), self._modes, strict=True):
            if now != before:
                yield f"{path or 'the model'}.{'train' if now else 'eval'}()"
        for path, table, names in zip((path for path in self._paths for _ in range(2)), self._tables, self._names, strict=True):
            for name, tensor in table.items():
                label, at = f"{path}.{name}".lstrip("."), names.get(name)
                if tensor is None or at is None or (tensor.device, tensor.dtype) != self._kinds[at]:
                    continue
                if tensor is not self._before[at]():
                    yield f"{label} replaced"
                elif version_of(tensor) != self._versions[at]:
                    yield f"{label} overwritten"
                elif tensor.requires_grad != self._trained[at]:
                    yield f"{label} requires_grad={tensor.requires_grad}"
