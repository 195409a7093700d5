"""PEFT's adapters around a model that is parallelized: their files, without the base model.

model = get_peft_model(model, LoraConfig(...))                 # first the adapter, then the mesh
pm = mp.parallelize(model, mesh, example=batch)
...
save_adapter(pm, "adapter")                                    # what PeftModel.from_pretrained(base, "adapter") loads
load_adapter(pm, "adapter")                                    # from any mesh, or from PEFT
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import nn

from meshpar._torch import resolve_process_group
from meshpar.errors import CheckpointError, ConfigError, raise_all
from meshpar.mesh import stage_axis
from meshpar.runtime.model import ParallelModel
from meshpar.runtime.parameters.specs import full_tensor
from meshpar.simulate import is_simulated


def save_adapter(pm: ParallelModel, folder: Path | str, adapter: str = "default") -> None:
    """Write one adapter as PEFT does: `adapter_model.safetensors` and `adapter_config.json`. Collective; rank 0 writes.

    The adapter alone is gathered, with modules_to_save; the base model stays where it is.

    >>> save_adapter(pm, "adapter")                                                                   # doctest: +SKIP
    """
    original = _adapted(pm, adapter)
    folder, values = Path(folder), adapter_state(pm, adapter)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in values.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        config = copy.deepcopy(original.peft_config[adapter])
        config.inference_mode = True
        config.save_pretrained(str(folder))
    dist.barrier()


def adapter_state(pm: ParallelModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The tensors of an adapter under PEFT's names, whole, on the CPU, on every rank. Collective."""
    original = _adapted(pm, adapter)
    names = _names(original, adapter)
    values = _whole(pm, set(names.values()))
    if not original.peft_config[adapter].is_prompt_learning:
        return {peft: values[name].clone() for peft, name in names.items()}
    with _filled(original, adapter, values):
        return {name: value.detach().clone() for name, value in get_peft_model_state_dict(original, adapter_name=adapter).items()}


def load_adapter(pm: ParallelModel, folder: Path | str, adapter: str = "default") -> None:
    """Fill an adapter that `pm` has with PEFT's files of it. Every rank keeps its part. Raises CheckpointError for what does not fit.

    >>> load_adapter(pm, "adapter")                                                                   # doctest: +SKIP
    """
    original = _adapted(pm, adapter)
    found, names = load_peft_weights(str(folder), device="cpu"), _names(original, adapter)
    if original.peft_config[adapter].is_prompt_learning:
        names = _prompt_names(names, found)
    shapes = {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()}
    complaints = [f"{name} is missing." for name in names if name not in found]
    complaints += [f"{name} is not part of adapter {adapter!r} here." for name in found if name not in names]
    complaints += [
        f"{name} is {list(found[name].shape)}, here {list(shapes[own])}."
        for name, own in names.items()
        if name in found and tuple(found[name].shape) != shapes[own]
    ]
    raise_all(CheckpointError, f"{folder}: the adapter of another model or configuration:", complaints)
    pm.load_state_dict({own: found[name] for name, own in names.items()}, strict=False)


def _prompt_names(names: Mapping[str, str], found: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A prompt's own table, where it is what is saved (a projected prompt is saved computed, and cannot be filled back)."""
    own = list(names.values())
    if len(own) != 1:
        raise CheckpointError(
            f"PEFT saves what a projection makes of this prompt ({', '.join(found)}), from which {', '.join(own)} cannot be told: "
            f"mp.checkpoint.save and load keep the parameters."
        )
    return {"prompt_embeddings": own[0]}


def _adapted(pm: ParallelModel, adapter: str) -> PeftModel:
    original = pm.original_module
    if not isinstance(original, PeftModel):
        raise ConfigError(
            f"{type(original).__name__} has no adapters of PEFT: model = get_peft_model(model, config) comes before mp.parallelize."
        )
    if adapter not in original.peft_config:
        raise ConfigError(f"there is no adapter {adapter!r}; there are {', '.join(original.peft_config)}.")
    if is_simulated():
        raise ConfigError("adapters are saved and loaded by processes; simulated ranks have none of their own.")
    return original


def _names(original: PeftModel, adapter: str) -> dict[str, str]:
    """PEFT's name of every tensor of an adapter -> its name in the model. (PEFT chooses; the tensors are only told apart.)"""
    marks = {name: torch.empty(0) for name in original.state_dict()}
    known = {id(mark): name for name, mark in marks.items()}
    if original.peft_config[adapter].is_prompt_learning:
        prefix = f"prompt_encoder.{adapter}."
        return {name: name for name in marks if name.startswith(prefix)}
    chosen = get_peft_model_state_dict(original, state_dict=marks, adapter_name=adapter)
    return {peft: known[id(mark)] for peft, mark in chosen.items()}


@torch.no_grad()
def _whole(pm: ParallelModel, names: set[str]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, of all stages."""
    own = {name: full_tensor(value).cpu() for name, value in pm.state_dict().items() if name in names}
    axis = stage_axis(pm.mesh)
    if axis.size == 1:
        return own
    rows: list[Any] = [None] * axis.size
    dist.all_gather_object(rows, own, group=resolve_process_group(axis.group))
    return {name: value for row in rows for name, value in row.items()}


@contextmanager
def _filled(original: PeftModel, adapter: str, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The prompt's encoder with values, for what PEFT computes of it."""
    empty: nn.Module = original.prompt_encoder[adapter]
    prefix = f"prompt_encoder.{adapter}."
    made = copy.deepcopy(empty).to_empty(device="cpu")
    made.load_state_dict({name.removeprefix(prefix): value for name, value in values.items()})
    tokens = original.prompt_tokens[adapter]
    original.prompt_encoder._modules[adapter] = made
    if tokens.is_meta:
        original.prompt_tokens[adapter] = torch.arange(tokens.numel())
    try:
        yield
    finally:
        original.prompt_encoder._modules[adapter] = empty
        original.prompt_tokens[adapter] = tokens


__all__ = ["adapter_state", "load_adapter", "save_adapter"]
