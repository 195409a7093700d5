"""Changing the dtype of raw bytes: explicit, rounded to nearest even, and never to infinity without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.format.files import ITEMSIZE
from meshpar.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

_WORD: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_NATIVE: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
TORCH_DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
FLOATS = ("F64", "F32", "F16", "BF16")
_ALIASES = {"FLOAT32": "F32", "FP32": "F32", "FLOAT": "F32", "FLOAT64": "F64", "FP64": "F64", "DOUBLE": "F64", "HALF": "F16"}
_ALIASES |= {"FLOAT16": "F16", "FP16": "F16", "BFLOAT16": "BF16"}


def word(dtype: str) -> np.dtype[Any]:
    """The unsigned integer type that carries one element's bits."""
    return _WORD[ITEMSIZE[dtype]]


def parse_dtype(text: str) -> str:
    """A floating dtype as users write it.

    >>> parse_dtype("bfloat16")
    'BF16'
    """
    name = _ALIASES.get(text.upper(), text.upper())
    if name not in FLOATS:
        raise ConfigError(f"--dtype {text!r}: floating tensors can be cast to {', '.join(FLOATS)}.")
    return name


def castable(source: str, target: str) -> bool:
    """Whether bytes of one dtype can be turned into another one."""
    return source == target or (source in FLOATS and target in FLOATS)


def cast(bits: Array, source: str, target: str, name: str, *, exact: bool = False) -> Array:
    """Elements of dtype `source`, as words, turned into words of dtype `target`.

    Raises ImpossibleError when a finite value would become infinite, or, with `exact`, when any value would change.
    """
    if source == target:
        return bits
    values = _values(bits, source)
    with np.errstate(over="ignore", invalid="ignore"):
        out = _narrow(values.astype(np.float32)) if target == "BF16" else values.astype(_NATIVE[target]).view(word(target))
    if exact:
        changed = int((cast(out, target, source, name) != np.reshape(bits, out.shape)).sum())
        if changed:
            raise ImpossibleError(f"{name}: {changed} values would change when cast to {target}.")
    wrong = np.isfinite(values) & ~np.isfinite(_values(out, target))
    if wrong.any():
        largest = float(np.abs(values[wrong]).max())
        raise ImpossibleError(f"{name}: {int(wrong.sum())} values up to {largest:.6g} do not fit {target} and would become infinite.")
    return out


def values(bits: Array, dtype: str) -> Array:
    """Elements as numbers one can subtract: float64 for floats, the integers themselves otherwise."""
    if dtype in FLOATS:
        return _values(bits, dtype).astype(np.float64)
    if dtype in ("I8", "I16", "I32", "I64"):
        return bits.view(np.dtype(f"<i{ITEMSIZE[dtype]}")).astype(np.float64)
    return bits.astype(np.float64)


def _values(bits: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(_NATIVE[dtype])


def _narrow(values: Array) -> Array:
    """float32 to bfloat16 words, to nearest even; a NaN stays one."""
    raw = np.ascontiguousarray(values).view(np.uint32)
    rounded = (raw.astype(np.uint64) + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (raw >> 16) | 0x40, rounded).astype(np.uint16)
