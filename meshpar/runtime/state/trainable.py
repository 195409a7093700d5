"""Which parameters require gradients, looked at before every step: programs are made for it, and so are FSDP2's units and stages."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshpar.compile.programs import Programs
from meshpar.errors import ConfigError
from meshpar.runtime.parameters.tensors import ModelTensor

_OURS = frozenset({DTensor, ModelTensor})
"""What the parameters of a parallel model are."""


class Trainable:
    """The flags of the parameters of a parallel model. `token` names those that differ from what parallelize saw."""

    def __init__(self, model: nn.Module, makes: Programs) -> None:
        self._model, self._makes = model, makes
        self._first = {name: flag for name, (_, _, flag) in makes.first.items()}
        self._tables = [module._parameters for module in model.modules()]
        self._flags: list[bool] = [] if self._differing() else [p.requires_grad for p in self._now()]
        self.token = ""

    def _now(self) -> list[nn.Parameter]:
        return [p for table in self._tables for p in table.values() if p is not None]

    def _differing(self) -> list[str]:
        return [n for n, p in self._model.named_parameters() if n in self._first and p.requires_grad != self._first[n]]

    def follow(self) -> None:
        """See to it that programs are made for the present flags. Raises ConfigError where that cannot be."""
        now = self._now()
        flags = [p.requires_grad for p in now]
        if not _OURS.issuperset(map(type, now)):
            others = [name for name, p in self._model.named_parameters() if not isinstance(p, DTensor)]
            raise ConfigError(
                f"{', '.join(others)}: parameters of a parallel model cannot be replaced: change the model, and parallelize it again."
            )
        if flags == self._flags:
            return
        differing = self._differing()
        built = any(isinstance(module, FSDPModule) for module in self._model.modules()) or self._makes.schedule is not None
        if differing and built:
            raise ConfigError(
                f"requires_grad of {', '.join(differing[:5])}{' and others' if len(differing) > 5 else ''} was changed after parallelize, "
                f"which built {'the stages' if self._makes.schedule is not None else 'its data parallelism'} for what it was. Save a "
                f"checkpoint, set requires_grad on the model, and parallelize it again; or set it back."
            )
        self._makes.set_trainable({name: flag != (name in differing) for name, flag in self._first.items()})
        self._flags, self.token = flags, " ".join(sorted(differing))
