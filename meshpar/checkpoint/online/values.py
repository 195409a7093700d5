"""Python values as JSON and back, without a change: tuples, infinities, keys that are no strings; tensors and per-rank values by reference.

JSON values stay what they are. Everything else becomes `{"$": kind, "v": ...}`:

    (1, 2)  ->  {"$": "tuple", "v": [1, 2]}        inf  ->  {"$": "float", "v": "inf"}        tensor  ->  {"$": "tensor", "v": its name}

Objects of other types are refused, all of them in one error: a checkpoint holds no pickle.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.online.writer import PerRank
from meshpar.errors import CheckpointError, raise_all

MARK = "$"
Keep = Callable[[str, Any], None]
"""Takes the path and value of a tensor or `PerRank` on the way."""


def encode(value: Any, where: str, keep: Keep) -> Any:
    """The JSON form of a value. `keep(path, item)` is called for every tensor and `PerRank` in it, `path` being what refers to it.

    Raises CheckpointError with the paths of everything that cannot be stored.

    >>> encode({"betas": (0.9, 0.99)}, "adam", print)
    {'betas': {'$': 'tuple', 'v': [0.9, 0.99]}}
    """
    wrong: list[str] = []
    out = _encode(value, where, keep, wrong)
    raise_all(CheckpointError, "These values cannot be stored (numbers, text, containers, tensors, PerRank can):", wrong)
    return out


def decode(value: Any, fetch: Callable[[str, str], Any]) -> Any:
    """The value of a JSON form. `fetch(kind, path)` gives what a reference of kind "tensor" or "per_rank" stands for."""
    if isinstance(value, list):
        return [decode(v, fetch) for v in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {k: decode(v, fetch) for k, v in value.items()}
    kind, inner = value[MARK], value["v"]
    if kind in ("tensor", "per_rank"):
        return fetch(kind, inner)
    if kind not in _READ:
        raise CorruptError(f"A value of kind {str(kind)[:40]!r} was stored by another release.")
    return _READ[kind](decode(inner, fetch))


_READ: Mapping[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "float": float,
    "bytes": base64.b64decode,
    "dict": dict,
    "counter": lambda rows: Counter(dict(rows)),
    "deque": deque,
    "set": set,
    "complex": lambda pair: complex(*pair),
}


def _encode(value: Any, where: str, keep: Keep, wrong: list[str]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _marked("float", repr(float(value)))
    if isinstance(value, (torch.Tensor, PerRank)):
        keep(where, value)
        return _marked("tensor" if isinstance(value, torch.Tensor) else "per_rank", where)

    def inner(row: Any) -> list[Any]:
        return [_encode(v, f"{where}.{k}", keep, wrong) for k, v in enumerate(row)]

    if type(value) in (list, tuple):
        return inner(value) if type(value) is list else _marked("tuple", inner(value))
    if type(value) in (dict, OrderedDict, defaultdict):
        if all(isinstance(k, str) for k in value) and MARK not in value:
            return {k: _encode(v, f"{where}.{k}", keep, wrong) for k, v in value.items()}
        return _marked("dict", [[_encode(k, where, keep, wrong), _encode(v, f"{where}.{k}", keep, wrong)] for k, v in value.items()])
    if type(value) is Counter:
        return _marked("counter", [[_encode(k, where, keep, wrong), n] for k, n in value.items()])
    if type(value) is deque and value.maxlen is None:
        return _marked("deque", inner(value))
    if type(value) is set:
        return _marked("set", inner(sorted(value, key=repr)))
    if type(value) is bytes:
        return _marked("bytes", base64.b64encode(value).decode())
    if type(value) is complex:
        return _marked("complex", inner((value.real, value.imag)))
    wrong.append(f"{where} is a {type(value).__name__}.")
    return None


def _marked(kind: str, value: Any) -> dict[str, Any]:
    return {MARK: kind, "v": value}
