"""Models nobody has to build: on `meta`, by their sizes, a type of transformers, a configuration, or a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshpar.cli.causal_lm import own_model, quiet
from meshpar.dry_run.decoder import Decoder
from meshpar.errors import ConfigError, near, raise_all
from meshpar.planner import Transformer


def large_model(text: str, *, seq: int | None, samples: int) -> tuple[nn.Module | Transformer, Any]:
    """A model without memory, and `samples` samples for it.

    `text`: sizes, "layers=80,hidden=8192,heads=64,ffn=28672,vocab=128256"; "package.module:function" that returns (model, batch); a type
    of transformers; or a folder or file with one of its configurations. Raises ConfigError for anything else.
    """
    if "=" in text:
        return parse_sizes(text), ids(seq or 2048, samples)
    if ":" in text:
        return own_model(text)
    quiet()
    model = _of_transformers(text)
    most = getattr(model.config, "max_position_embeddings", None) or 2048
    return model, ids(seq or min(most, 4096), samples)


def built(model: nn.Module | Transformer) -> nn.Module:
    """The module itself."""
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return Decoder(model)


def ids(seq: int, samples: int) -> Mapping[str, torch.Tensor]:
    """A batch of so many samples."""
    tokens = torch.zeros(samples, seq, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


def parse_sizes(text: str) -> Transformer:
    """Dimensions from "layers=80,hidden=8192,...".

    >>> parse_sizes("layers=2,hidden=64,heads=4,ffn=256,vocab=1000,tied=true").tied
    True
    """
    known = {f.name: f.type for f in fields(Transformer) if f.name != "latent"}
    found: dict[str, Any] = {}
    complaints = []
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            complaints.append(f"{name!r} is no size of a model.{near(name, known)}")
        elif value.lower() in ("true", "false"):
            found[name] = value.lower() == "true"
        elif value.isdigit():
            found[name] = int(value)
        else:
            complaints.append(f"{name}={value!r}: a whole number, true or false.")
    complaints += [f"{name} is missing." for name in ("layers", "hidden", "heads", "ffn", "vocab") if name not in found]
    raise_all(ConfigError, f"model {text!r}:", complaints)
    return Transformer(**found)


def _of_transformers(text: str) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError(
            f"models by type come from transformers, which is not installed: pip install 'meshpar[demo]' ({error})."
        ) from error
    try:
        config = AutoConfig.from_pretrained(text, local_files_only=True) if Path(text).exists() else AutoConfig.for_model(text)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.get_text_config())
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).partition(" Should contain one of ")[0]
        raise ConfigError(
            f"model {text!r}: {reason}{near(text, CONFIG_MAPPING_NAMES)}\n"
            f"  Write sizes (layers=80,hidden=8192,heads=64,ffn=28672,vocab=128256), package.module:function, a "
            f"type of transformers, or the folder of a configuration."
        ) from error
    model.config.use_cache = False
    return model.train()
