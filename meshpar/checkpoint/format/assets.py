"""Files that travel beside the tensors, so that an export is complete: the configuration a model carries, and what the user names.

    config.json, generation_config.json      of a model that has them as `config` and `generation_config`, in the manner of Hugging Face
    assets=["tokenizer.json"]                any other small file, or another one in their place

Nothing is imported for this: what can say itself in JSON (`to_json_string`, or `to_dict`) is written down.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from meshpar.checkpoint.format.files import Disk, check_name
from meshpar.checkpoint.format.opened import MAX_ASSET, is_weights
from meshpar.errors import ConfigError

Assets = Mapping[str, Path | str] | Sequence[Path | str]
"""Files by the names they are to have, or files that keep their own."""


def assets_of(module: nn.Module, dtype: str, given: Assets) -> dict[str, bytes]:
    """What lies beside the tensors of a model whose weights have this dtype ("bfloat16", or "" if that is not known)."""
    found = {}
    for attribute, name in (("config", "config.json"), ("generation_config", "generation_config.json")):
        facts = _facts(getattr(module, attribute, None), attribute)
        if facts is not None:
            found[name] = _text(_completed(facts, module, dtype) if attribute == "config" else facts)
    return found | _read(given)


def _facts(config: Any, attribute: str) -> dict[str, Any] | None:
    """What a configuration says, or None where it is none that can say it."""
    for method in ("to_json_string", "to_dict"):
        say = getattr(config, method, None)
        if callable(say) and not isinstance(config, type):
            try:
                said = say()
                facts = json.loads(said if isinstance(said, str) else json.dumps(said))
            except Exception as error:
                warnings.warn(f"The model's {attribute} was not saved beside it: {method}() failed: {error}", stacklevel=2)
                return None
            return facts if isinstance(facts, dict) else None
    return None


def _completed(facts: dict[str, Any], module: nn.Module, dtype: str) -> dict[str, Any]:
    """What `save_pretrained` writes into a model's configuration besides: its class, and the dtype its weights are stored in."""
    if "model_type" not in facts:
        return facts
    key = "torch_dtype" if "torch_dtype" in facts else "dtype"
    return facts | {"architectures": [type(module).__name__.removeprefix("FSDP")]} | ({key: dtype} if dtype else {})


def _text(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode()


def _read(given: Assets) -> dict[str, bytes]:
    if isinstance(given, (str, Path)):
        raise ConfigError(f"assets={str(given)!r}: expected a list of files, or a mapping of names to files.")
    rows = given.items() if isinstance(given, Mapping) else [(Path(path).name, path) for path in given]
    found: dict[str, bytes] = {}
    for name, path in rows:
        check_name(name, "assets")
        if is_weights(name) or name in found:
            raise ConfigError(f"assets: {name} {'is named twice' if name in found else 'would be taken for weights'}.")
        if not Path(path).is_file():
            raise ConfigError(f"assets: {path} is not a file.")
        found[name] = Disk().read_file(Path(path), MAX_ASSET, follow=True)
    return found
