"""Saving and loading from running ranks: a thin layer that turns DTensors into runs and back.

Every rank writes what it holds, replicas are written once, rank 0 merges the records and commits. Loading reads, on each rank, only the
boxes of its own local tensors, from whatever mesh they were saved on. No rank holds more than its own tensors and one read buffer.

    save("step-100", {"w": w, ...}, values={"step": 100})         on every rank: tensors, DTensors, or parameters of a ParallelModel
    load("step-100", {"w": w, ...}).values["step"]                into the tensors given, in place
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meshpar._torch import StridedShard, local_of
from meshpar.checkpoint.boxes import Cut, Runs, boxes_of, local_shape, runs_of
from meshpar.checkpoint.casts import TORCH_DTYPES, Array, cast, castable, word
from meshpar.checkpoint.division import AXES, Grid, Layout
from meshpar.checkpoint.faults import CorruptError
from meshpar.checkpoint.files import Disk
from meshpar.checkpoint.opened import open_checkpoint
from meshpar.checkpoint.partial import writing
from meshpar.checkpoint.reading import Reader
from meshpar.checkpoint.writer import Local, PerRank, Record, finish, merge, rank_tensor, write_rank
from meshpar.errors import CheckpointError, ConfigError, RankError, near
from meshpar.runtime.parameters import spec_of
from meshpar.sharding.types import Shard, plain

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Loaded:
    """What a load found: the values stored beside the tensors, this rank's own ones, and the names that did not meet."""

    values: Mapping[str, Any]
    per_rank: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


def save(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    *,
    values: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    per_rank: Mapping[str, torch.Tensor] | None = None,
    group: Group = None,
    disk: Disk | None = None,
) -> None:
    """Save what all ranks of a group hold under one new directory. Collective; if a rank fails, all of them fail, and nothing appears.

    `tensors` are this rank's, by names of the whole model; `kinds` says which are not the model's ("optimizer", "extra"). `values` must be
    equal on all ranks, or complete each other as dicts, or be `PerRank`. `per_rank` tensors are every rank's own, of one shape.
    """
    rank, world, disk, target = _rank(group), _world(group), disk or Disk(), Path(path).absolute()
    kinds = kinds or {}
    runs = {name: runs_on_rank(tensor) for name, tensor in tensors.items()}
    owned = _owned(runs, rank, world, group)
    parts = [_local(name, tensors[name], runs[name], kinds.get(name, "model")) for name in tensors if name in owned]
    for name, own in (per_rank or {}).items():
        parts.append(rank_tensor(name, rank, world, _words(own), _dtype(own)))

    def write(root: Path) -> Record:
        return write_rank(root, rank, parts, values or {}, disk)

    def commit(partial: Any, records: Sequence[Record]) -> None:
        finish(partial, merge(records, _grid(tensors.values())))

    if rank == 0:
        _lead(target, disk, write, commit, group)
    else:
        _follow(target, write, group)


def _lead(target: Path, disk: Disk, write: Callable[[Path], Record], commit: Callable[[Any, Sequence[Record]], None], group: Group) -> None:
    """Rank 0: open the directory, write its own part, collect the others' records, commit; tell the others how each step went."""
    told = False
    try:
        with writing(target, "", disk) as partial:
            _tell(str(partial.path), None, group)
            told = True
            mine = _attempt(lambda: write(partial.path))
            records = _collect(mine, group)
            commit(partial, records)
    except Exception as error:
        if not isinstance(error, RankError):
            _tell("", str(error), group)
        raise
    assert told
    _tell("", None, group)


def _follow(target: Path, write: Callable[[Path], Record], group: Group) -> None:
    root = Path(_heard(group))
    _collect(_attempt(lambda: write(root)), group)
    _heard(group)


def _attempt(act: Callable[[], Any]) -> Any:
    """A result, or the text of the error."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _collect(mine: Any, group: Group) -> list[Any]:
    """Everybody's result. If any rank failed, all raise with its message."""
    everyone: list[Any] = [None] * _world(group)
    if _world(group) == 1:
        everyone = [mine]
    else:
        dist.all_gather_object(everyone, mine, group=group)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if isinstance(text, str)]
    if failed:
        raise RankError("; ".join(failed[:4]))
    return everyone


def _tell(text: str, error: str | None, group: Group) -> None:
    if _world(group) > 1:
        dist.broadcast_object_list([text, error], group=group, group_src=0)


def _heard(group: Group) -> str:
    box: list[Any] = [None, None]
    dist.broadcast_object_list(box, group=group, group_src=0)
    if box[1] is not None:
        raise RankError(f"rank 0: {box[1]}")
    return str(box[0])


def load(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    *,
    missing: str = "error",
    unexpected: str = "error",
    dtype: str = "error",
    kinds: Sequence[str] = ("model", "optimizer", "extra"),
    group: Group = None,
    disk: Disk | None = None,
) -> Loaded:
    """Fill this rank's tensors, in place, from a checkpoint saved on any mesh. Collective; every block read is checked.

    `missing` (asked for, not stored) and `unexpected` (stored among `kinds`, asked for by no rank) are "error" or "skip"; `dtype` is
    "error" or "cast" (which still refuses to make infinities). Nothing is overwritten before the names, shapes and dtypes of all ranks
    were checked.
    """
    for name, mode, modes in (
        ("missing", missing, ("error", "skip")),
        ("unexpected", unexpected, ("error", "skip")),
        ("dtype", dtype, ("error", "cast")),
    ):
        if mode not in modes:
            raise ConfigError(f"load({name}={mode!r}): expected {' or '.join(modes)}.")
    disk = disk or Disk()

    def check() -> tuple[Any, ...]:
        opened = open_checkpoint(Path(path), disk)
        return opened, *_compare(tensors, opened.manifest.tensors, missing, dtype, str(path))

    first = _attempt(check)
    names = _collect(first if isinstance(first, str) else list(tensors), group)
    opened, absent, casts = first
    asked = {name for row in names for name in row}
    extra = tuple(n for n, t in opened.manifest.tensors.items() if t.kind in kinds and n not in asked)
    if extra and unexpected == "error":
        raise CorruptError(
            f"{path} holds {len(extra)} tensors that no rank asks for: {', '.join(extra[:5])}. To leave them, unexpected='skip'."
        )
    with Reader(opened, disk) as reader:
        _collect(_attempt(lambda: [_read_into(reader, n, t) for n, t in tensors.items() if n not in absent] and None), group)
    values = dict(opened.manifest.values)
    own = {key: rows[_rank(group)] for key, rows in values.pop("per_rank", {}).items() if len(rows) == _world(group)}
    return Loaded(values, own, absent, extra, casts)


def _compare(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, Any], missing: str, dtype: str, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    absent = tuple(n for n in tensors if n not in stored)
    if absent and missing == "error":
        raise CorruptError(
            f"{where} does not hold {', '.join(absent[:5])}.{near(absent[0], stored)} To go on without them, missing='skip'."
        )
    casts = []
    for name, tensor in tensors.items():
        if name in absent:
            continue
        have = stored[name]
        if tuple(tensor.shape) != have.shape:
            raise CorruptError(f"{where}: {name} is {list(have.shape)}, but {list(tensor.shape)} is asked for.")
        if _dtype(tensor) != have.dtype:
            if dtype == "error" or not castable(have.dtype, _dtype(tensor)):
                raise CorruptError(f"{where}: {name} is {have.dtype}, but {_dtype(tensor)} is asked for. To convert it, dtype='cast'.")
            casts.append(name)
    return absent, tuple(casts)


@torch.no_grad()
def _read_into(reader: Reader, name: str, tensor: torch.Tensor) -> None:
    """Read the boxes a rank holds and put them where they lie in its local tensor."""
    stored, runs, local = reader.checkpoint.manifest.tensors[name], runs_on_rank(tensor), _local_tensor(tensor)
    if local_shape(runs) != tuple(local.shape):
        raise CorruptError(
            f"{name}: the placements say this rank holds {list(local_shape(runs))}, its local tensor is {list(local.shape)}."
        )
    out = np.empty(tuple(local.shape), word(_dtype(tensor)))
    for box in boxes_of(runs):
        bits = cast(reader.read(name, box), stored.dtype, _dtype(tensor), name)
        out[_slices(box, runs)] = bits.reshape(box.size)
    local.copy_(torch.from_numpy(out.reshape(-1).view(np.uint8)).view(local.dtype).reshape(local.shape))


def _slices(box: Any, runs: Runs) -> tuple[slice, ...]:
    out = []
    for start, size, row in zip(box.offset, box.size, runs, strict=True):
        base = sum(b - a for a, b in row if b <= start)
        at = base + start - next(a for a, b in row if a <= start < b)
        out.append(slice(at, at + size))
    return tuple(out)


def runs_on_rank(tensor: torch.Tensor) -> Runs:
    """The runs of every dim that this rank holds, from the layout attached to a parameter, else from its DTensor placements."""
    steps: list[list[tuple[Shard, int, int]]] = [[] for _ in tensor.shape]
    for _, shard, size, rank in cuts_of(tensor):
        steps[shard.dim].append((shard, size, rank))
    return tuple(runs_of(n, row) for n, row in zip(tensor.shape, steps, strict=True))


def cuts_of(tensor: torch.Tensor) -> list[tuple[str, Shard, int, int]]:
    """The cuts of a tensor in the order they apply: axis, layout, size, this rank's coordinate.

    A `_StridedShard` beside later axes on the same dim, whose sizes multiply to its split factor, is FSDP over TP: those axes cut first.
    A lone one is a row of equal segments, each of them cut.
    """
    if not isinstance(tensor, DTensor):
        return []
    mesh, spec = tensor.device_mesh, spec_of(tensor)
    placements: Sequence[Any] = tensor.placements
    names = mesh.mesh_dim_names or tuple(f"axis{k}" for k in range(mesh.ndim))
    rows = [(names[k], p, mesh.size(k), mesh.get_local_rank(k)) for k, p in enumerate(placements)]
    place = {name: (size, rank) for name, _, size, rank in rows}
    if spec is not None:
        known = [(axis, shard, *place[axis]) for axis, shard in spec.shards() if axis in place]
        rest = [
            (n, plain(p.dim % tensor.ndim, int(tensor.shape[p.dim])), s, r)
            for n, p, s, r in rows
            if _is_cut(p) and n not in dict(spec.shards())
        ]
        return known + rest
    late: list[tuple[str, Shard, int, int]] = []
    out: list[tuple[str, Shard, int, int]] = []
    for k, (name, p, size, rank) in enumerate(rows):
        if not _is_cut(p):
            continue
        dim = p.dim % tensor.ndim
        length = int(tensor.shape[dim])
        if isinstance(p, StridedShard):
            after = [s for _, q, s, _ in rows[k + 1 :] if _is_cut(q) and q.dim % tensor.ndim == dim]
            parts = int(p.split_factor)
            if after and int(np.prod(after)) == parts:
                late.append((name, plain(dim, length), size, rank))
            else:
                out.append((name, Shard(dim, parts, ((length // parts, 1),)), size, rank))
            continue
        out.append((name, plain(dim, length), size, rank))
    return out + late[::-1]


def _is_cut(placement: Any) -> bool:
    if placement.is_partial():
        raise ConfigError("A tensor with a pending sum cannot be saved or loaded; reduce it first.")
    return not placement.is_replicate()


def _owned(runs: Mapping[str, Runs], rank: int, world: int, group: Group) -> set[str]:
    """The tensors this rank writes: of the ranks that hold the same boxes, one, chosen by a hash that all agree on."""
    keys = {name: hashlib.blake2b(repr((name, row)).encode(), digest_size=8).digest() for name, row in runs.items()}
    if world == 1:
        return set(runs)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, b"".join(keys.values()), group=group)
    holders: dict[bytes, list[int]] = {}
    for holder, blob in enumerate(everyone):
        for at in range(0, len(blob), 8):
            holders.setdefault(blob[at : at + 8], []).append(holder)
    return {name for name, key in keys.items() if holders[key][int.from_bytes(key[:4], "little") % len(holders[key])] == rank}


def _local(name: str, tensor: torch.Tensor, runs: Runs, kind: str) -> Local:
    cuts = tuple(Cut(axis, shard) for axis, shard, _, _ in cuts_of(tensor) if axis in AXES)
    return Local(name, _dtype(tensor), tuple(tensor.shape), runs, lambda: _words(_local_tensor(tensor)), kind, Layout(cuts))


def _local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _words(tensor: torch.Tensor) -> Array:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(word(_dtype(tensor))).reshape(tuple(tensor.shape))


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise CheckpointError(f"Tensors of dtype {name} cannot be stored; {', '.join(TORCH_DTYPES)} can.")
    return TORCH_DTYPES[name]


def _grid(tensors: Iterable[torch.Tensor]) -> Grid:
    """The axes of the widest mesh any tensor lies on, for the record."""
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    widest = max(meshes, key=lambda m: m.size(), default=None)
    names = widest.mesh_dim_names if widest is not None else None
    if widest is None or names is None or any(n not in AXES for n in names):
        return Grid()
    return Grid(tuple(sorted(zip(names, widest.shape, strict=True), key=lambda pair: AXES.index(pair[0]))))


def _rank(group: Group) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _world(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


__all__ = ["Loaded", "PerRank", "load", "runs_on_rank", "save"]
