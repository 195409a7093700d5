"""Generation by transformers' own loop (greedy, sampling, beams), over the forward of a parallel model: the tokens of the model itself.

    prompt  p p p                     the loop grows its tokens by one at a time
    step 1  p p p . . . . .  ──> pm ──> logits of position 3       padded to the longest length there can be: one program for all steps
    step 2  p p p t . . . .  ──> pm ──> logits of position 4       a causal model does not see what comes later

There is no cache of keys and values: every step computes all positions, so that n new tokens cost n forwards of the longest length. Data
ranks generate for their own prompts, and go on until all of them are done.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar.consensus import check_batch
from meshpar.errors import BatchError, ConfigError
from meshpar.mesh import data_rank
from meshpar.simulate import is_simulated

_PADDED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""What a loop of tokens hands to the forward, [samples, positions] each."""


def generate(pm: Callable[..., Any], model: nn.Module, mesh: DeviceMesh, args: tuple[Any, ...], asked: Mapping[str, Any]) -> Any:
    """`model.generate(*args, **asked)` with the forward of `pm`. Raises ConfigError for what it cannot do."""
    _check(model, asked)
    prompt = args[0] if args else asked.get("inputs", asked.get("input_ids"))
    if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2:
        raise ConfigError("generate: the prompt is input_ids, a tensor [samples, positions].")
    if asked.get("do_sample"):
        _check_random_state(mesh)
    standing = _standing_in(pm, model, torch.device(mesh.device_type, prompt.device.index), _longest(model, prompt, asked))
    with torch.no_grad():
        return standing.generate(*args, **{**asked, "use_cache": False, "synced_gpus": data_rank(mesh)[1] > 1})


def _check(model: nn.Module, asked: Mapping[str, Any]) -> None:
    found = getattr(type(model), "generate", None)
    complaints = []
    if found is None:
        complaints.append(f"{type(model).__name__} has no generate.")
    elif not found.__module__.startswith("transformers."):
        complaints.append(f"the generate of {type(model).__name__} is its own, and would run the model's own forward.")
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        complaints.append("an encoder and a decoder: only models that read and write one sequence of tokens generate so far.")
    refused = [name for name in ("past_key_values", "assistant_model", "streamer", "inputs_embeds", "negative_prompt_ids") if name in asked]
    complaints += [f"{name}= is not possible: there is no cache, and tokens are all that is read." for name in refused]
    if asked.get("use_cache"):
        complaints.append("use_cache=True: there is no cache of keys and values; every step computes all positions. Leave it out.")
    if is_simulated():
        complaints.append("simulated ranks cannot: a loop asks for the values of tokens. Use processes.")
    if complaints:
        way = "Else: save a checkpoint (mp.checkpoint.save, `meshpar checkpoint to-hf`), and generate with the model in one process."
        raise ConfigError("\n  ".join(["generate of a parallel model:", *complaints, way]))


def _check_random_state(mesh: DeviceMesh) -> None:
    """Ranks that share a batch must draw the same tokens."""
    state = torch.get_rng_state() if mesh.device_type == "cpu" else torch.cuda.get_rng_state()
    digest = torch.frombuffer(bytearray(hashlib.sha256(state.numpy().tobytes()).digest()), dtype=torch.uint8)
    try:
        check_batch(digest.to(mesh.device_type), mesh)
    except BatchError as error:
        raise ConfigError(
            "generate(do_sample=True): ranks that share a batch have different random states, and would draw different tokens. "
            "Call torch.manual_seed(seed) on all ranks first."
        ) from error


def _longest(model: Any, prompt: torch.Tensor, asked: Mapping[str, Any]) -> int:
    """The longest sequence there can be."""
    settings = asked.get("generation_config") or model.generation_config
    new = asked.get("max_new_tokens", None if "max_length" in asked else getattr(settings, "max_new_tokens", None))
    length = asked.get("max_length", getattr(settings, "max_length", None))
    if new is None and length is None:
        raise ConfigError("generate: say how long, max_new_tokens= or max_length=; every step computes that many positions.")
    return int(prompt.shape[1] + new if new is not None else max(length, prompt.shape[1]))


def _standing_in(pm: Callable[..., Any], model: nn.Module, device: torch.device, longest: int) -> Any:
    """The model with another forward: all that is asked of its class and settings stays the model's."""

    def forward(self: Any, **given: Any) -> Any:
        length = given["input_ids"].shape[1]
        if length > longest:
            raise ConfigError(f"generate: a sequence of {length} tokens, where at most {longest} were said.")
        batch = {name: _padded(given[name], longest) for name in _PADDED if isinstance(given.get(name), torch.Tensor)}
        out = pm(**batch)
        out.logits = out.logits[:, :length]
        return out

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    own = {"forward": forward, "device": property(lambda self: device)}
    standing: Any = object.__new__(type(type(model).__name__, (type(model),), own))
    standing.__dict__.update(model.__dict__)
    return standing


def _padded(tensor: torch.Tensor, longest: int) -> torch.Tensor:
    """Zeros behind the tokens: masked, and later than all that is looked at."""
    return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]))
