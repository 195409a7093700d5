"""What the modules of a parallel model show of the modules they stand for: their attributes, and the children of containers.

pm.model.layers[0].self_attn.q_proj.weight      as in the model; this rank's modules and parameters
pm.embed.num_embeddings                         an attribute of the model's own module
pm.embed(x), pm.generate(...)                   what computes is told what a parallel model has instead
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import nn
from torch.distributed.tensor import DTensor

from meshpar.errors import ConfigError
from meshpar.runtime.parameters.tensors import ModelTensor

_INSTEAD: Mapping[str, str] = {
    "gradient_checkpointing_enable": 'parallelize(..., config=mp.ParallelConfig(recompute="full")) computes again in backward.',
    "gradient_checkpointing_disable": 'parallelize(..., config=mp.ParallelConfig(recompute="none")) keeps everything.',
    "save_pretrained": "mp.checkpoint.save(path, pm) saves shard by shard, and `meshpar checkpoint to-hf` makes a folder of it.",
    "push_to_hub": "mp.checkpoint.save(path, pm) saves shard by shard, and `meshpar checkpoint to-hf` makes a folder to be uploaded.",
}
"""Methods of models that a parallel model has another way for."""


class Likeness(nn.Module):
    """A module that shows what the `original` at its place shows; programs run over it, so nothing in it can be replaced."""

    _original: nn.Module | None
    """The module of the model (its parameters without memory) once the parallel model is complete."""

    def __getattr__(self, name: str) -> Any:
        try:
            return shown(self, name, super().__getattr__(name))
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("_"):
                raise
            value = original.__dict__.get(name, original)
            if value is not original and not isinstance(value, nn.Module):
                return value
            if isinstance(original, (nn.ModuleDict, nn.ParameterDict)) and name in ("keys", "values", "items"):
                return lambda: [_here(self, value) for value in getattr(original, name)()]
            refuse_method(original, name)
            raise

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that an optimizer has: between forward and backward too, while FSDP2 has gathered ones in their place."""
        yield from self._named_members(_parameters, prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate)

    def __getitem__(self, key: Any) -> Any:
        return _here(self, _of(self)[key])

    def __len__(self) -> int:
        return len(_of(self))

    def __iter__(self) -> Iterator[Any]:
        return (_here(self, value) for value in _of(self))

    def __contains__(self, key: Any) -> bool:
        return key in _of(self)

    def __bool__(self) -> bool:
        return True  # (a module without children is no less of a module)

    def __setitem__(self, key: Any, value: Any) -> None:
        refuse_module(key)

    def __delitem__(self, key: Any) -> None:
        refuse_module(key)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raise ConfigError once programs run over this module."""
        if self.__dict__.get("_original") is not None:
            raise ConfigError(
                f"{name}: a parallel model takes no other parameters than those of parallelize. To change values: with torch.no_grad(): "
                f"p.mul_(...), or pm.load_state_dict. Else change the model, and parallelize it again."
            )
        super().register_parameter(name, param)


def shown(module: nn.Module, name: str, value: Any) -> Any:
    """What `module` shows of `value`, its parameter of that name: the one an optimizer has, which gets what is computed from it."""
    if isinstance(value, nn.Parameter) and isinstance(value, DTensor) and not isinstance(value, ModelTensor):
        own = module.__dict__.get("_own", {}).get(name)
        return value if own is None else own
    return value


def _parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, shown(module, name, value)) for name, value in module._parameters.items())


class Children(dict[str, Any]):
    """The children of a module that programs run over: nobody replaces one. (FSDP2 wants modules to have torch's own `__setattr__`.)"""

    def __setitem__(self, name: str, module: Any) -> None:
        refuse_module(name)

    def __delitem__(self, name: str) -> None:
        refuse_module(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def refuse_module(name: object) -> NoReturn:
    """Raise ConfigError for a module in the place of one that programs run over."""
    raise ConfigError(
        f"{name} of a parallel model cannot be replaced: its programs run over the modules and parameters of parallelize. Change the "
        f"model, and parallelize it again."
    )


def refuse_method(original: nn.Module, name: str) -> None:
    """Raise AttributeError that tells what there is instead of a method of the model."""
    found = getattr(type(original), name, None)
    if found is None:
        return
    kind = "a method" if callable(found) else "computed by the class"
    otherwise = (
        f"Call it before parallelize, on the model; what only reads settings also works on pm.original_module, whose parameters have no "
        f"memory. ({name} is {kind} of {type(original).__name__}, and would run the original's code.)"
    )
    raise AttributeError(f"a parallel model has no {name}: {_INSTEAD.get(name, otherwise)}")


def _of(module: Likeness) -> Any:
    original = module.__dict__.get("_original")
    if original is None:
        raise TypeError(f"{type(module).__name__} stands for no module of the model.")
    return original


def _here(module: Likeness, value: Any) -> Any:
    """What this rank has in the place of something in the original."""
    if isinstance(value, (list, tuple)):
        return type(value)(_here(module, part) for part in value)
    if not isinstance(value, (nn.Module, nn.Parameter)):
        return value
    original = _of(module)
    for own, table in ((module._modules, original._modules), (module._parameters, original._parameters)):
        name = next((n for n, held in table.items() if held is value), None)
        if name is not None and own.get(name) is not None:
            return own[name]
        if name is not None and (isinstance(value, nn.Parameter) or any(True for _ in value.parameters())):
            raise ConfigError(f"{name} is not on this rank, but on one with another stage. Those here: {', '.join(own) or 'none'}.")
    if isinstance(value, nn.ModuleList):  # a slice
        return [_here(module, part) for part in value]
    return value
