"""Weights in safetensors files, of which each rank reads only its own bytes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from meshpar._torch import maybe_disable_local_tensor_mode
from meshpar.errors import CheckpointError, near, raise_all
from meshpar.init.fit import FLOATS, Fact, Fit, Weights, Words, fit, listed, short, shortened

Ranges = Sequence[tuple[int, int, int]]
"""`(dim, start, stop)`: several of one dim are taken one after the other, dims not named are taken whole."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


_WORDS = Words(
    missing="{} is missing.",
    unexpected="{} is not in the model.",
    shape="{} has shape {}, the model's {}.",
    to_skip_missing=(
        "To keep the model's own initialisation of what is missing (a new head): weights=mp.Weights(path, missing=[patterns] or 'skip')."
    ),
    to_skip_unexpected="To leave such tensors in the file: weights=mp.Weights(path, unexpected=[patterns] or 'skip').",
    to_cast=(
        " Build the model in {0}, or set a parameter dtype to cast to."
        " That is config=mp.ParallelConfig(precision=mp.Precision(param_dtype=torch.{1})), or weights=mp.Weights(path, dtype='cast')."
    ),
)


@dataclass(frozen=True)
class Lazy:
    """A tensor in a file. `read` fetches all of it, or only some ranges, in `dtype`; `stored` is what the file holds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    _slice: Any
    _tensor: Any

    def read(self, ranges: Ranges = ()) -> torch.Tensor:
        """The part of the tensor that `ranges` name; only its bytes are read. Raises CheckpointError if a cast would make it infinite."""
        with maybe_disable_local_tensor_mode():  # read once, even where ranks are simulated
            if not ranges:
                return narrowed(self._tensor(self.name), self.dtype, self.name)
            pieces = _pieces(len(self.shape), ranges)
            return narrowed(_assemble(pieces, lambda index: self._slice[index]), self.dtype, self.name)

    def cast(self, dtype: torch.dtype | None) -> Lazy:
        """The same, read as another dtype if it is floating."""
        return self if dtype is None or self.dtype not in FLOATS else replace(self, dtype=dtype)


def narrowed(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in another dtype. Raises CheckpointError where a finite value would become infinite."""
    if value.dtype == dtype or value.is_meta:
        return value
    out = value.to(dtype)
    if value.is_floating_point() and torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        wrong = out.isinf() & ~value.isinf()
        if wrong.any():
            raise CheckpointError(
                f"{name}: {int(wrong.sum())} values up to {value[wrong].abs().max().item():.6g} do not fit {short(dtype)} and would become "
                f"infinite. Keep {short(value.dtype)}, or bfloat16, whose range is that of float32."
            )
    return out


def read(value: torch.Tensor | Lazy, ranges: Ranges = ()) -> torch.Tensor:
    """The part of a tensor, in memory or in a file, that `ranges` name.

    >>> read(torch.arange(10), [(0, 0, 2), (0, 8, 9)])
    tensor([0, 1, 8])
    """
    if isinstance(value, Lazy):
        return value.read(ranges)
    return _assemble(_pieces(value.ndim, ranges), lambda index: value[index]) if ranges else value


@dataclass(frozen=True)
class Matched:
    """The tensors of a model in opened files, after `Files.match`. `twins`: pairs of names in the file that must hold the same values."""

    lazy: Mapping[str, Lazy]
    buffers: tuple[str, ...]
    missing: tuple[str, ...]
    twins: Mapping[str, tuple[tuple[Lazy, Lazy], ...]]
    notes: tuple[str, ...] = field(default=())


class Files(Mapping[str, Lazy]):
    """The tensors of one or several safetensors files, by name. Files are mapped into memory, not read."""

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self._found: dict[str, Lazy] = {}
        self._stack = ExitStack()
        self.files = tuple(files)
        for file in files:
            self._add(file, index)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Files:
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

    def match(self, model: nn.Module, names: Sequence[str], asked: Weights, *, dtype: torch.dtype | None = None) -> Matched:
        """Hold names, shapes and dtypes against the model's. One `CheckpointError` with all that is wrong, unless `asked` accepts it.

        Missing are only parameters in `names`. Unexpected is what is no parameter, other name of one, or persistent buffer of the model.
        `dtype`: what floating parameters are cast to.
        """
        groups, parameters = tensor_groups(model), dict(model.named_parameters(remove_duplicate=False))
        facts = {name: Fact(tuple(t.shape), t.dtype) for group, t in groups for name in group}
        found = {name: Fact(lazy.shape, lazy.dtype) for name, lazy in self.items()}
        casts = dtype is not None or asked.dtype == "cast"
        fitted = fit(
            [group for group, _ in groups],
            facts,
            found,
            _WORDS,
            missing=asked.missing,
            unexpected=asked.unexpected,
            casts=casts,
            needed=frozenset(names),
            ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        )
        absent = set(fitted.missing)
        lacking = [name for name in names if name not in fitted.source and name not in absent]
        hint = _prefix_hint(lacking, [name for name in self if name not in facts])
        raise_all(CheckpointError, f"{self._title()} does not fit the model.{hint}", fitted.complaints)
        lazy = {}
        for name, stored in fitted.source.items():
            own = dtype if name in parameters and dtype is not None else facts[name].dtype
            lazy[name] = self[stored].cast(own if casts else None)
        twins: dict[str, tuple[tuple[Lazy, Lazy], ...]] = {}
        by_source = {stored: name for name, stored in reversed(list(fitted.source.items()))}
        for first, other in fitted.twins:
            twins[by_source[first]] = (*twins.get(by_source[first], ()), (self[first], self[other]))
        kept = tuple(name for group, _ in groups for name in group if name in fitted.source and name not in parameters)
        return Matched(lazy, kept, fitted.missing, twins, self._notes(fitted, groups, parameters))

    def _notes(
        self, fitted: Fit, groups: Sequence[tuple[Sequence[str], torch.Tensor]], parameters: Mapping[str, nn.Parameter]
    ) -> tuple[str, ...]:
        """What was accepted, to be said."""
        buffers = [group[0] for group, _ in groups if group[0] not in parameters and group[0] not in fitted.source]
        rows = (
            (fitted.missing, "the file lacks these; they have the values of the model's own initialisation"),
            (fitted.left, "these were left in the file"),
            (buffers, "the file lacks these buffers; they have the values the model gives them"),
        )
        return tuple(f"{self._title()}: {what}: {shortened(names)}." for names, what in rows if names)

    @classmethod
    def _open_directory(cls, path: Path) -> Files:
        indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise CheckpointError(f"{path} holds several indices: {', '.join(p.name for p in indices)}. Give the path of one.")
        if not indices and (path / "manifest.json").exists() and files:
            raise CheckpointError(
                f"{path} looks like a checkpoint of meshpar, whose files hold parts of tensors: parallelize without weights= and use "
                f"mp.checkpoint.load(path, pm), or write a folder for weights= with `meshpar checkpoint to-hf {path} DST`."
            )
        if not indices and not files:
            raise CheckpointError(f"{path} holds no *.safetensors file and no *.safetensors.index.json.")
        return cls._open_index(indices[0]) if indices else cls(files)

    @classmethod
    def _open_index(cls, path: Path) -> Files:
        try:
            index = json.loads(path.read_text(), object_pairs_hook=_once_each)["weight_map"]
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
            raise_all(CheckpointError, f"the index says that {file.name} holds these, but it does not:", listed(lost, "{}", ()))
            stray = [name for name in names if index.get(name) != file.name]
            what = f"{file.name} holds these, which the index does not place there (it mixes two exports, or was not written to its end):"
            raise_all(CheckpointError, what, listed(stray, "{}", ()))
        twice = [name for name in names if name in self._found]
        raise_all(CheckpointError, f"{file.name} holds tensors that another file holds too:", twice)
        for name in names:
            part = handle.get_slice(name)
            code = str(part.get_dtype())
            if code not in _DTYPES:
                raise CheckpointError(f"{file.name}: {name} is {code}, a dtype that is not known here; {', '.join(_DTYPES)} are.")
            self._found[name] = Lazy(name, tuple(part.get_shape()), _DTYPES[code], part, handle.get_tensor)

    def _title(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that says two things of one name is refused."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise CheckpointError(f"the index names {name} twice, in {found[name]} and in {value}.")
    return found


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


def tensor_groups(model: nn.Module) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Every parameter and persistent buffer with all of its names, the first one canonical; those that are only in memory are left out."""
    fleeting = {f"{path}.{name}" if path else name for path, m in model.named_modules(remove_duplicate=False) for name in _fleeting(m)}
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name not in fleeting:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(dict.fromkeys(names)), tensor) for names, tensor in found.values()]


def _fleeting(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def say(notes: Iterable[str]) -> None:
    """Warn of what was accepted, once for all ranks."""
    for note in notes if not dist.is_initialized() or dist.get_rank() == 0 else ():
        warnings.warn(note, stacklevel=2)


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
