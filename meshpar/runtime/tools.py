"""What tools that take a module over ask of it before anything else: a parallel model answers what to do instead.

DistributedDataParallel, torch.compile, torch.jit.script,
quantize_dynamic                                             an attribute that they look for
fully_shard, replicate                                       the registry in which they enter themselves
pickle, copy.copy, share_memory                              how the module is handed on
torch.export, torch.jit.trace, torch.func, fx                what is around a step when it is called
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import fx, nn

from meshpar._torch import COMPOSED, is_compiled_around, transform_level
from meshpar.errors import ConfigError

_COMPILED = (
    "a parallel model is not compiled as a whole: its steps are programs with collectives, captured and lowered already. Leave "
    "torch.compile out, and call steps outside of what is compiled; parallelize(..., config=mp.ParallelConfig(compile=True)) compiles its "
    "blocks."
)
_SCRIPTED = "a parallel model is not made into a script: export or trace the model as it was, on one device, with its values."
_ASKED = frozenset(("_ddp_params_and_buffers_to_ignore", "_infer_parameters", "_initialize_hook", "qconfig"))
"""Names that raise."""


class Untaken(nn.Module):
    """A module that no tool takes over."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__[COMPOSED] = Composed()

    def __dir__(self) -> list[str]:
        """All names but those that raise: torch.jit.trace tries every one."""
        return [name for name in super().__dir__() if name not in _ASKED]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """Raise ConfigError: DistributedDataParallel asks for this first of all."""
        raise ConfigError(
            "a parallel model is not wrapped in DistributedDataParallel: the dp axis of its mesh sums gradients over data ranks already. "
            "Trainers that wrap models (transformers, TRL, accelerate, Lightning) take it by meshpar.integrations."
        )

    @property
    def qconfig(self) -> Any:
        """Raise ConfigError: quantization asks for this first of all."""
        raise ConfigError(
            "a parallel model is not quantized: its programs hold the products of the dtype they were captured in. Save it with "
            "mp.checkpoint.save(path, pm), load that into the model on one device (mp.checkpoint.load(path, model)), and quantize it there."
        )

    @property
    def _initialize_hook(self) -> Any:
        """Raise ConfigError: torch.compile asks for this first of all."""
        raise ConfigError(_COMPILED)

    @property
    def _infer_parameters(self) -> Any:
        """Raise ConfigError: from torch 2.14 on, what torch.compile made asks for this in its first call."""
        raise ConfigError(_COMPILED)

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(_COMPILED)

    def __prepare_scriptable__(self) -> Any:
        """Raise ConfigError."""
        raise ConfigError(_SCRIPTED)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise ConfigError: what is pickled is the state."""
        raise ConfigError(
            "a parallel model is not pickled, nor copied by copy.copy: it belongs to the processes of this run. Save it with "
            "mp.checkpoint.save(path, pm, optimizer), or its pm.state_dict(), and parallelize the model again. Or: copy.deepcopy(pm)."
        )

    def share_memory(self) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(
            "a parallel model does not share its memory: every process of the mesh holds a part of it. Start them with torchrun, and "
            "parallelize the model in each."
        )


class Composed(dict[str, Any]):
    """The registry of what torch.distributed has done to a module: nothing may be done to this one."""

    def __contains__(self, name: object) -> bool:
        raise ConfigError(
            f"{name} does not take a parallel model: its parameters are placed on the mesh, and its dp axis shares them out "
            f'already (ParallelConfig(data_parallel="zero3")).'
        )


class SimulatedState(OrderedDict[str, Any]):
    """The state dict of simulated ranks: its tensors hold the parts of all of them."""

    @classmethod
    def of(cls, state: OrderedDict[str, Any]) -> SimulatedState:
        """A state dict of torch, as one of simulated ranks."""
        found = cls(state)
        found.__dict__.update(state.__dict__)  # (the versions that torch keeps beside the tensors)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise ConfigError: no file holds such tensors."""
        raise ConfigError(
            "Simulated ranks cannot save: their tensors hold the parts of all ranks. Run it on processes, or save whole values: "
            "{name: mp.full_tensor(p) for name, p in pm.named_parameters()}."
        )


def check_surroundings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError where a step is called by what would look into it, or with what is no tensor."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ConfigError(_SCRIPTED)
    if is_compiled_around():
        raise ConfigError(_COMPILED)
    if transform_level():
        raise ConfigError(
            "a parallel model does not run inside of torch.func (vmap, grad, jvp ...): its programs have collectives, and gradients "
            "of their own. Gradients are those of pm.train_step(**batch), or of backward from pm(**batch)."
        )
    if isinstance(args, fx.Proxy) or isinstance(kwargs, fx.Proxy) or any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
        raise ConfigError("a parallel model is not traced by torch.fx: pm.print_readable() shows the graphs that it runs.")
