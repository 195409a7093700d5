"""Weights in safetensors files, of which each rank reads only its own bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from meshpar._torch import maybe_disable_local_tensor_mode
from meshpar.errors import CheckpointError, near, raise_all

Ranges = Sequence[tuple[int, int, int]]
"""`(dim, start, stop)`: several of one dim are taken one after the other, dims not named are taken whole."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Lazy:
    """A tensor in a file. `read` fetches all of it, or only some ranges, in `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    _slice: Any
    _tensor: Any

    def read(self, ranges: Ranges = ()) -> torch.Tensor:
        """The part of the tensor that `ranges` name; only its bytes are read."""
        with maybe_disable_local_tensor_mode():  # read once, even where ranks are simulated
            if not ranges:
                return self._tensor(self.name).to(self.dtype)
            pieces = _pieces(len(self.shape), ranges)
            return _assemble(pieces, lambda index: self._slice[index]).to(self.dtype)

    def cast(self, dtype: torch.dtype | None) -> Lazy:
        """The same, read as another dtype if it is floating."""
        return self if dtype is None or not self.dtype.is_floating_point else Lazy(self.name, self.shape, dtype, self._slice, self._tensor)


def read(value: torch.Tensor | Lazy, ranges: Ranges = ()) -> torch.Tensor:
    """The part of a tensor, in memory or in a file, that `ranges` name.

    >>> read(torch.arange(10), [(0, 0, 2), (0, 8, 9)])
    tensor([0, 1, 8])
    """
    if isinstance(value, Lazy):
        return value.read(ranges)
    return _assemble(_pieces(value.ndim, ranges), lambda index: value[index]) if ranges else value


class Weights(Mapping[str, Lazy]):
    """The tensors of one or several safetensors files, by name. Files are mapped into memory, not read."""

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self._found: dict[str, Lazy] = {}
        self._stack = ExitStack()
        self.files = tuple(files)
        self._aliases: dict[str, str] = {}
        for file in files:
            self._add(file, index)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Weights:
        """Open a safetensors file, an index of several (`*.safetensors.index.json`), or a directory that holds either."""
        path = Path(path)
        if path.is_dir():
            return cls._open_directory(path)
        if not path.exists():
            here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise CheckpointError(f"there are no weights at {path}.{near(path.name, here)}")
        return cls._open_index(path) if path.suffix == ".json" else cls([path])

    def __getitem__(self, name: str) -> Lazy:
        return self._found[name]

    def __iter__(self) -> Any:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def lazy(self, name: str, dtype: torch.dtype | None = None) -> Lazy:
        """The tensor of a parameter, under its canonical name or, if it is tied, under another of its names (after `check`)."""
        return self._found[self._aliases.get(name, name)].cast(dtype)

    def check(self, model: nn.Module, names: Sequence[str], *, dtype: torch.dtype | None = None) -> tuple[str, ...]:
        """Compare names, shapes and dtypes with the model's; the persistent buffers found. One `CheckpointError` with all that is wrong.

        Missing are only parameters in `names`; unexpected is what is no parameter, other name of one, or buffer of the model.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        groups = _tied(parameters)
        self._aliases = {name: other for name in names for other in groups[id(parameters[name])] if name not in self and other in self}
        missing = [name for name in names if name not in self and name not in self._aliases]
        unexpected = [name for name in self if name not in parameters and name not in buffers]
        complaints = _listed(missing, "is missing.", unexpected) + _listed(unexpected, "is not in the model.", missing or tuple(parameters))
        for name in names:
            if name not in missing:
                complaints += _mismatch(name, self.lazy(name), parameters[name], dtype)
        kept = tuple(name for name in buffers if name in self and name in model.state_dict(keep_vars=True))
        complaints += [text for name in kept for text in _mismatch(name, self[name], buffers[name], dtype)]
        raise_all(CheckpointError, f"{self._title()} does not fit the model.{_prefix_hint(missing, unexpected)}", complaints)
        return kept

    @classmethod
    def _open_directory(cls, path: Path) -> Weights:
        indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise CheckpointError(f"{path} holds several indices: {', '.join(p.name for p in indices)}. Give the path of one.")
        if not indices and not files:
            raise CheckpointError(f"{path} holds no *.safetensors file and no *.safetensors.index.json.")
        return cls._open_index(indices[0]) if indices else cls(files)

    @classmethod
    def _open_index(cls, path: Path) -> Weights:
        try:
            index = json.loads(path.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f'{path} is not an index of safetensors files: it has no "weight_map".') from error
        files = [path.parent / name for name in dict.fromkeys(index.values())]
        raise_all(CheckpointError, f"{path} names files that are not there:", [f.name for f in files if not f.exists()])
        return cls(files, index)

    def _add(self, file: Path, index: Mapping[str, str] | None) -> None:
        try:
            handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a safetensors file, or it is cut off: {error}.") from error
        names = list(handle.keys())
        if index is not None:
            lost = [name for name, where in index.items() if where == file.name and name not in names]
            raise_all(CheckpointError, f"the index says that {file.name} holds these, but it does not:", lost)
            names = [name for name in names if index.get(name) == file.name]
        twice = [name for name in names if name in self._found]
        raise_all(CheckpointError, f"{file.name} holds tensors that another file holds too:", twice)
        for name in names:
            part = handle.get_slice(name)
            self._found[name] = Lazy(name, tuple(part.get_shape()), _DTYPES[part.get_dtype()], part, handle.get_tensor)

    def _title(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"


def _pieces(ndim: int, ranges: Ranges) -> list[list[tuple[int, int] | None]]:
    """Per dim, the stretches to take one after the other; None for the whole dim."""
    pieces: list[list[tuple[int, int] | None]] = [[] for _ in range(ndim)]
    for dim, start, stop in ranges:
        pieces[dim].append((start, stop))
    return [stretches or [None] for stretches in pieces]


def _assemble(pieces: Sequence[Sequence[tuple[int, int] | None]], take: Any) -> torch.Tensor:
    """Take every combination of stretches and put them together."""

    def part(chosen: tuple[slice, ...], rest: Sequence[Sequence[tuple[int, int] | None]]) -> torch.Tensor:
        if not rest:
            return take(chosen)
        parts = [part((*chosen, slice(None) if s is None else slice(*s)), rest[1:]) for s in rest[0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=len(chosen))

    return part((), pieces)


def _listed(names: Sequence[str], what: str, known: Sequence[str], *, most: int = 20) -> list[str]:
    """A complaint about each of the first names, and how many more there are; near misses are slow to find among very many."""
    lines = [f"{name} {what}{near(name, known) if len(known) < 20_000 else ''}" for name in names[:most]]
    return lines + ([f"... and {len(names) - most} more: {what}"] if len(names) > most else [])


def _tied(parameters: Mapping[str, nn.Parameter]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return groups


def _mismatch(name: str, found: Lazy, wanted: torch.Tensor, dtype: torch.dtype | None) -> list[str]:
    complaints = []
    if found.shape != tuple(wanted.shape):
        complaints.append(f"{name} has shape {list(found.shape)}, the model's {list(wanted.shape)}.")
    if found.dtype != wanted.dtype and not (dtype is not None and found.dtype.is_floating_point and wanted.dtype.is_floating_point):
        short = [str(d).removeprefix("torch.") for d in (found.dtype, wanted.dtype)]
        complaints.append(
            f"{name} is {short[0]}, the model's {short[1]}. Build the model in {short[0]}, or set a parameter dtype to cast to."
        )
    return complaints


def _prefix_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A sentence when one prefix, added or taken away, would make most names meet."""
    for few, many, verb in ((missing, unexpected, "carry"), (unexpected, missing, "lack")):
        for prefix in _prefixes(many):
            if few and 2 * sum(prefix + name in many for name in few) > len(few):
                return f' Its names {verb} the prefix "{prefix}": load it into the part of the model under it, or rename.'
    return ""


def _prefixes(names: Iterable[str]) -> list[str]:
    prefixes = (tuple(name.split(".")[:depth]) for name in names for depth in (1, 2, 3))
    return [".".join(parts) + "." for parts in dict.fromkeys(prefixes)]
