"""Small causal language models of any transformers type, with random weights, and real text to train them on: bytes, no tokenizer."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshpar.errors import ConfigError, near

VOCABULARY = 256
"""One token per byte."""


@dataclass(frozen=True)
class SmallSizes:
    """What a small model is made of. Settings a model type does not have are left out, others keep their defaults."""

    layers: int = 3
    hidden: int = 128
    heads: int = 8
    kv_heads: int = 4
    sequence: int = 128

    def settings(self) -> dict[str, Any]:
        """The sizes under the names that transformers gives them, whatever the model type."""
        width, head = self.hidden * 11 // 4 // 16 * 16, self.hidden // self.heads
        names = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": width,
            "max_position_embeddings": max(self.sequence, 64),
            "head_dim": head,
            "rotary_dim": head,
            "word_embed_proj_dim": self.hidden,
            "decoder_layers": self.layers,
            "decoder_attention_heads": self.heads,
            "decoder_ffn_dim": width,
            "ffn_dim": width,
            # experts and latent attention, where a type has them
            "num_local_experts": 4,
            "num_experts": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": width // 2,
            "shared_expert_intermediate_size": width // 2,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 3 * head,
            "kv_lora_rank": 2 * head,
            "qk_rope_head_dim": head // 2,
            "qk_nope_head_dim": head,
            "v_head_dim": head,
        }
        # bytes 0 to 2 do not occur in text
        return names | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


def small_model(kind: str, sizes: SmallSizes | None = None, *, seed: int = 0) -> nn.Module:
    """A causal language model of transformers' type `kind` with a vocabulary of bytes and random weights, the same for the same `seed`.

    Raises ConfigError when there is no such type, or when these sizes do not make one.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"models by type name come from transformers, which is not installed: pip install 'meshpar[demo]' ({error})."
        ) from error
    try:
        default = AutoConfig.for_model(kind).get_text_config()
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"transformers has no model type {kind!r}.{near(kind, _kinds())} A model of your own is package.module:function, a function "
            f"without arguments that returns (model, batch)."
        ) from error
    settings = _known(default, (sizes or SmallSizes()).settings())
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(default.model_type, **settings)
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ConfigError(
            f"transformers builds no causal language model of type {kind!r} from {settings}: {type(error).__name__}: {error}\n"
            f"  Write a function that returns your own (model, batch) and pass it as --model package.module:function."
        ) from error


def quiet() -> None:
    """No advice about optional kernels, which every rank would print again."""
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()


def _kinds() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _known(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings this configuration has, under its own names for them."""
    own = {name: getattr(type(config), "attribute_map", {}).get(name, name) for name in settings}
    defaults = config.to_dict()
    if "kv_lora_rank" in defaults:  # latent attention: every head has keys and values of its own, and head_dim follows from its parts
        settings = {**settings, "num_key_value_heads": settings["num_attention_heads"]}
        del own["head_dim"]
    return {own[name]: value for name, value in settings.items() if own.get(name) in defaults}


def own_model(path: str) -> tuple[nn.Module, Mapping[str, Any] | tuple[Any, ...]]:
    """`(model, batch)` from the function at "package.module:function"; modules of the working directory are found too."""
    module, _, name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--model {path}: {error}.{_near_own(module, name)} Write package.module:function, a function without arguments that returns "
            f"(model, batch)."
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ConfigError(
            f"--model {path}: the function must return (model, batch), an nn.Module and a dict or tuple; it returned {type(made).__name__}."
        )
    return made


def _near_own(module: str, name: str) -> str:
    """What is nearly called so: functions of the module, or modules of the working directory."""
    if module in sys.modules:
        return near(name, [known for known, value in vars(sys.modules[module]).items() if callable(value)])
    here = [path.stem for path in Path.cwd().glob("*.py")]
    return f" Did you mean {module[:-3]}:{name}?" if module.endswith(".py") else near(module, here)


class Corpus:
    """Bytes to train on: of a file, or of the Python standard library's sources, which are on every machine."""

    def __init__(self, path: str | Path | None = None, *, most: int = 2**21) -> None:
        self.source = str(path) if path else "sources of the Python standard library"
        try:
            data = b"".join(_limited(_files(path), most))
        except OSError as error:
            raise ConfigError(f"--data {path}: {error.strerror}.") from error
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def batch(self, step: int, *, samples: int, sequence: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """The global batch of a step: random pieces of the text, the same on every rank."""
        last = len(self.data) - sequence
        if last < 1:
            raise ConfigError(
                f"{self.source} has {len(self.data)} bytes, fewer than a sequence of {sequence}. Give a longer text or a smaller --seq."
            )
        starts = torch.randint(last, (samples, 1), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        ids = self.data[starts + torch.arange(sequence)].long()
        return {"input_ids": ids, "labels": ids.clone()}


def _files(path: str | Path | None) -> list[Path]:
    if path is not None:
        return [Path(path)]
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _limited(files: list[Path], most: int) -> Iterator[bytes]:
    for file in files:
        data = file.read_bytes()[:most]
        most -= len(data)
        yield data
        if most <= 0:
            return
