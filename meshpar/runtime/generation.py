"""Generation by transformers' own loop (greedy, sampling, beams), over the forward of a parallel model: the tokens of the model itself.

With a cache of keys and values, where that is proved to be exact for the model (`runtime/caching`): n new tokens cost a forward of the
prompt and n - 1 of one token; every rank keeps the keys and values of its own samples, heads and layers. Else without:

    prompt  p p p                     the loop grows its tokens by one at a time
    step 1  p p p . . . . .  ──> pm ──> logits of position 3       padded to the longest length there can be: one program for all steps
    step 2  p p p t . . . .  ──> pm ──> logits of position 4       a causal model does not see what comes later

and n new tokens cost n forwards of the longest length. Data ranks generate for their own prompts, and go on until all of them are done.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from meshpar.consensus import check_batch
from meshpar.errors import BatchError, CaptureError, ConfigError, PlanError
from meshpar.mesh import data_rank, typed_axes
from meshpar.roles import ROLES
from meshpar.runtime.caching.forward import CachedForward, KeptCache
from meshpar.runtime.caching.keys import cache_name
from meshpar.runtime.caching.proof import why_not
from meshpar.runtime.failures import Together
from meshpar.simulate import is_simulated

_PADDED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""What a loop of tokens hands to the forward, [samples, positions] each."""


class Generation:
    """`pm.generate`. `cached`: makes the forward with a cache."""

    def __init__(
        self, pm: Callable[..., Any], model: nn.Module, mesh: DeviceMesh, together: Together, cached: Callable[[], CachedForward]
    ) -> None:
        self._pm, self._model, self._mesh, self._together, self._make = pm, model, mesh, together, cached
        self._cached: CachedForward | None = None
        self._reasons: dict[bool, str | None] = {}
        """Why there is no cache, by whether the user's word was taken."""
        self.told = "nothing was generated yet"
        """How the last tokens were generated."""

    def __call__(self, args: tuple[Any, ...], asked: Mapping[str, Any]) -> Any:
        """`model.generate(*args, **asked)` with the forward of the parallel model. Raises ConfigError for what it cannot do."""
        _check(self._model, asked)
        prompt = args[0] if args else asked.get("inputs", asked.get("input_ids"))
        if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2:
            raise ConfigError("generate: the prompt is input_ids, a tensor [samples, positions].")
        if asked.get("do_sample"):
            _check_random_state(self._mesh)
        longest, reason = _longest(self._model, prompt, asked), self._why_not(asked)
        device = torch.device(self._mesh.device_type, prompt.device.index)
        asked = {**asked, "synced_gpus": data_rank(self._mesh)[1] > 1}
        with torch.no_grad():
            if reason is None:
                state = _random_state(self._mesh)
                try:
                    return self._with_cache(args, asked, device, longest)
                except (CaptureError, PlanError) as error:
                    self._reasons[bool(asked.get("use_cache"))] = reason = f"no program with a cache can be made: {error}"
                    _set_random_state(self._mesh, state)
            self._say(reason, asked)
            return _standing_in(self._model, device, _whole(self._pm, longest)).generate(*args, **{**asked, "use_cache": False})

    def _with_cache(self, args: tuple[Any, ...], asked: Mapping[str, Any], device: torch.device, longest: int) -> Any:
        self._cached = self._cached or self._make()
        kept = KeptCache(longest)
        standing = _standing_in(self._model, device, _one_by_one(self._cached, kept, self._together))
        found = standing.generate(*args, **{**asked, "use_cache": True, cache_name(self._model) or "": kept.handle()})
        self.told = f"with a cache of keys and values: {self._cached.cuts()}"
        return found

    def _why_not(self, asked: Mapping[str, Any]) -> str | None:
        """Why there is no cache in this call, if there is none."""
        settings: Any = asked.get("generation_config") or self._model.generation_config
        if asked.get("use_cache", settings.use_cache) is False:
            return "use_cache=False"
        used = [name for name in _ALONE if asked.get(name, getattr(settings, name, None)) is not None]
        if used:
            return f"{', '.join(used)} changes how a cache is used"
        if cut := [axis.name for axis in typed_axes(self._mesh) if axis.size > 1 and ROLES[axis.name].divides == "sequence"]:
            return f"{', '.join(cut)} cuts sequences, and one token cannot be cut"
        if any(module.training for module in self._model.modules()):
            return "the model is in training mode, where what is drawn differs from run to run: call pm.eval() first"
        trusted = bool(asked.get("use_cache"))
        if trusted not in self._reasons:
            self._reasons[trusted] = why_not(self._model, trusted=trusted)
        return self._reasons[trusted]

    def _say(self, reason: str, asked: Mapping[str, Any]) -> None:
        """Raise ConfigError where a cache was asked for; else keep the reason, and warn when it is a new one."""
        if asked.get("use_cache"):
            raise ConfigError(
                f"generate(use_cache=True) of a parallel model: {reason}.\n  Leave it out: tokens are the same, each a whole forward."
            )
        told = f"without a cache, a forward of the longest length for each token: {reason}"
        if told != self.told and asked.get("use_cache") is None:
            warnings.warn(f"generate runs {told}.", stacklevel=4)
        self.told = told


_ALONE = ("prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers", "prefill_chunk_size", "cache_implementation")
"""Ways to generate that need more of a cache than to grow by one token."""


def _check(model: nn.Module, asked: Mapping[str, Any]) -> None:
    found = getattr(type(model), "generate", None)
    complaints = []
    if found is None:
        complaints.append(f"{type(model).__name__} has no generate.")
    elif not found.__module__.startswith("transformers."):
        complaints.append(f"the generate of {type(model).__name__} is its own, and would run the model's own forward.")
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        complaints.append("an encoder and a decoder: only models that read and write one sequence of tokens generate so far.")
    refused = [
        name
        for name in ("cache", "past_key_values", "assistant_model", "streamer", "inputs_embeds", "negative_prompt_ids")
        if name in asked
    ]
    complaints += [f"{name}= is not possible: tokens are all that is read, and a cache is made for each call." for name in refused]
    if is_simulated():
        complaints.append("simulated ranks cannot: a loop asks for the values of tokens. Use processes.")
    if complaints:
        way = "Else: save a checkpoint (mp.checkpoint.save, `meshpar checkpoint to-hf`), and generate with the model in one process."
        raise ConfigError("\n  ".join(["generate of a parallel model:", *complaints, way]))


def _check_random_state(mesh: DeviceMesh) -> None:
    """Ranks that share a batch must draw the same tokens."""
    state = _random_state(mesh)
    digest = torch.frombuffer(bytearray(hashlib.sha256(state.numpy().tobytes()).digest()), dtype=torch.uint8)
    try:
        check_batch(digest.to(mesh.device_type), mesh)
    except BatchError as error:
        raise ConfigError(
            "generate(do_sample=True): ranks that share a batch have different random states, and would draw different tokens. "
            "Call torch.manual_seed(seed) on all ranks first."
        ) from error


def _random_state(mesh: DeviceMesh) -> torch.Tensor:
    return torch.get_rng_state() if mesh.device_type == "cpu" else torch.cuda.get_rng_state()


def _set_random_state(mesh: DeviceMesh, state: torch.Tensor) -> None:
    if mesh.device_type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def _longest(model: Any, prompt: torch.Tensor, asked: Mapping[str, Any]) -> int:
    """The longest sequence there can be."""
    settings = asked.get("generation_config") or model.generation_config
    new = asked.get("max_new_tokens", None if "max_length" in asked else getattr(settings, "max_new_tokens", None))
    length = asked.get("max_length", getattr(settings, "max_length", None))
    if new is None and length is None:
        raise ConfigError("generate: say how long, max_new_tokens= or max_length=; a cache has room for that many positions.")
    return int(prompt.shape[1] + new if new is not None else max(length, prompt.shape[1]))


Forward = Callable[[Mapping[str, Any]], Any]
"""What a forward is given -> what the model returns."""


def _standing_in(model: nn.Module, device: torch.device, run: Forward) -> Any:
    """The model with another forward: all that is asked of its class and settings stays the model's."""

    def forward(self: Any, **given: Any) -> Any:
        return run(given)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    own = {"forward": forward, "device": property(lambda self: device)}
    standing: Any = object.__new__(type(type(model).__name__, (type(model),), own))
    standing.__dict__.update(model.__dict__)
    return standing


def _whole(pm: Callable[..., Any], longest: int) -> Forward:
    """All positions in every step, padded behind the tokens: masked, and later than all that is looked at."""

    def run(given: Mapping[str, Any]) -> Any:
        length = _checked(given["input_ids"].shape[1], longest)
        out = pm(**{name: pad(tensor, (0, longest - length)) for name, tensor in _tensors(given).items()})
        out.logits = out.logits[:, :length]
        return out

    return run


def _one_by_one(cached: CachedForward, kept: KeptCache, together: Together) -> Forward:
    """The prompt, then one token at a time, each with what was kept of those before."""

    def run(given: Mapping[str, Any]) -> Any:
        batch = _tensors(given)
        length = _checked(kept.count + batch["input_ids"].shape[1], kept.room)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"][:, :1]).expand(-1, length) if mask is None else mask
        with together.section("generate"):
            if not kept.count:
                return cached.prompt(batch | {"attention_mask": mask}, kept)
            return cached.token(batch | {"attention_mask": pad(mask, (kept.room - length, 0))}, kept)

    return run


def _tensors(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: given[name] for name in _PADDED if isinstance(given.get(name), torch.Tensor)}


def _checked(length: int, longest: int) -> int:
    if length > longest:
        raise ConfigError(f"generate: a sequence of {length} tokens, where at most {longest} were said.")
    return length
