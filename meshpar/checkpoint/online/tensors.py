"""Saving and loading named tensors from running ranks: a thin layer that turns DTensors into runs and back.

Every rank writes what it holds, replicas are written once, rank 0 merges the records and commits. Loading reads, on each rank, only the
boxes of its own local tensors, from whatever mesh they were saved on. No rank holds more than its own tensors and one read buffer, and
ranks need not have the same names.

    save_tensors("step-100", {"w": w, ...}, values={"step": 100})         on every rank: tensors, DTensors, parameters of a ParallelModel
    load_tensors("step-100", {"w": w, ...}).values["step"]                into the tensors given, in place

`meshpar.checkpoint.online.training` builds `save` and `load` of a whole training state on these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from meshpar.checkpoint.format.boxes import Box, boxes_of
from meshpar.checkpoint.format.casts import cast, castable, word
from meshpar.checkpoint.format.division import Grid, Layout
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import Manifest
from meshpar.checkpoint.format.opened import Checkpoint, open_checkpoint
from meshpar.checkpoint.format.partial import Partial, writing
from meshpar.checkpoint.format.table import Stored
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.online.placed import Held, from_words, held, torch_dtype
from meshpar.checkpoint.online.ranks import Failure, Group, Ranks, attempt
from meshpar.checkpoint.online.writer import Local, PerRank, Record, finish, merge, rank_tensor, write_rank
from meshpar.errors import ConfigError, near
from meshpar.roles import ROLES
from meshpar.waiting import each

Tensors = Mapping[str, torch.Tensor | Held]


@dataclass(frozen=True)
class Loaded:
    """What a load found: the values stored beside the tensors, this rank's own ones, and the names that did not meet."""

    values: Mapping[str, Any]
    per_rank: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """What one rank puts into a checkpoint: tensors by names of the whole model, values, and what is its own."""

    tensors: Tensors
    values: Mapping[str, Any]
    kinds: Mapping[str, str]
    per_rank: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    grid: Grid
    stage: int = 0
    assets: Mapping[str, bytes] = field(default_factory=dict)


def save_tensors(
    path: Path | str,
    tensors: Tensors,
    *,
    values: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    per_rank: Mapping[str, torch.Tensor] | None = None,
    aliases: Mapping[str, str] | None = None,
    group: Group = None,
    disk: Disk | None = None,
) -> None:
    """Save what all ranks of a group hold under one new directory. Collective; if a rank fails, all of them fail, and nothing appears.

    `tensors` are this rank's, by names of the whole model; `kinds` says which are not the model's ("optimizer", "extra"). `values` must be
    equal on all ranks, or complete each other as dicts, or be `PerRank`. `per_rank` tensors are every rank's own, of one shape. Plain
    tensors must be equal on all ranks that have them.
    """
    ranks = Ranks.of(group)
    made = Content(tensors, values or {}, kinds or {}, per_rank or {}, aliases or {}, _grid(tensors.values()))
    write_content(path, ranks, prepare(ranks, lambda: made), disk)


# ---- saving: first what this rank writes, then the writing, which needs only host memory and may happen in a thread --------------------


@dataclass(frozen=True)
class Share:
    """What one rank writes, decided."""

    parts: tuple[Local, ...]
    values: Mapping[str, Any]
    aliases: Mapping[str, str]
    grid: Grid
    assets: Mapping[str, bytes]


def prepare(ranks: Ranks, collect: Callable[[], Content], *, copy: bool = False) -> Share:
    """Decide which rank writes what. Collective. `copy`: also copy it to host memory, so that training may go on."""

    def mine() -> tuple[Content, dict[str, Held]]:
        content = collect()
        return content, {name: held(tensor) for name, tensor in content.tensors.items()}

    first = attempt(mine)
    blob = first if isinstance(first, Failure) else attempt(lambda: _identities(first[1], ranks))
    everyone = ranks.everyone(blob)
    assert not isinstance(first, Failure)
    content, tensors = first
    owned = attempt(lambda: _owned(list(tensors), everyone, ranks))
    ranks.everyone(owned if isinstance(owned, Failure) else None)
    assert not isinstance(owned, Failure)
    parts = [_local(name, tensors[name], content, copy) for name in tensors if name in owned]
    for name, own in content.per_rank.items():
        part = held(own)
        parts.append(rank_tensor(name, ranks.rank, ranks.world, part.words(copy=copy), part.dtype))
    return Share(tuple(parts), content.values, content.aliases, content.grid, content.assets)


def write_content(path: Path | str, ranks: Ranks, share: Share, disk: Disk | None) -> None:
    """Write the shares of all ranks as one checkpoint. Collective over `ranks`."""
    target, disk = Path(path).absolute(), disk or Disk()

    def write(root: Path, token: str) -> Record:
        return write_rank(root, ranks.rank, share.parts, share.values, disk, token=token)

    def commit(partial: Partial, records: Sequence[Record]) -> None:
        finish(partial, merge(records, share.grid, aliases=share.aliases), share.assets)

    if ranks.rank == 0:
        _lead(target, disk, write, commit, ranks)
        return
    token, _, root = ranks.hear().partition(" ")
    ranks.to_lead(attempt(lambda: write(Path(root), token)))
    ranks.hear()


def _lead(
    target: Path, disk: Disk, write: Callable[[Path, str], Record], commit: Callable[[Partial, Sequence[Record]], None], ranks: Ranks
) -> None:
    """Rank 0: open the directory, write its own part, collect the others' records, commit; tell the others how it went."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target, "", disk) as partial:
            ranks.tell(f"{partial.token} {partial.path}")
            commit(partial, ranks.to_lead(attempt(lambda: write(partial.path, partial.token))))
    except Exception as error:
        ranks.tell(error=error)
        raise
    ranks.tell()


_IDENTITY = np.dtype([("key", "<u8"), ("digest", "<u4")])


def _identities(tensors: Mapping[str, Held], ranks: Ranks) -> bytes:
    """A key for every box a rank holds, equal where another rank holds the same one; and for plain tensors what they contain."""
    rows = np.zeros(len(tensors), _IDENTITY)
    if ranks.world == 1:
        return b""
    for row, (name, part) in zip(rows, tensors.items(), strict=True):
        row["key"] = int.from_bytes(hashlib.blake2b(repr((name, part.runs)).encode(), digest_size=8).digest(), "little")
        if part.is_plain:
            row["digest"] = crc32(np.ascontiguousarray(part.words()).reshape(-1).view(np.uint8).data)
    return rows.tobytes()


def _owned(names: Sequence[str], everyone: Sequence[bytes], ranks: Ranks) -> set[str]:
    """The tensors this rank writes: of the ranks that hold the same box, one, chosen by a hash that all agree on."""
    if ranks.world == 1:
        return set(names)
    rows = np.frombuffer(b"".join(everyone), _IDENTITY)
    holders = np.repeat(np.arange(ranks.world), [len(blob) // _IDENTITY.itemsize for blob in everyone])
    order = np.argsort(rows["key"], kind="stable")
    keys, digests, holders = rows["key"][order], rows["digest"][order], holders[order]
    mine = np.frombuffer(everyone[ranks.rank], _IDENTITY)
    low, high = np.searchsorted(keys, mine["key"], "left"), np.searchsorted(keys, mine["key"], "right")
    chosen = holders[low + (mine["key"] % (high - low).astype("u8")).astype(np.int64)] if len(mine) else low
    for name, own, a, b in zip(names, mine["digest"], low, high, strict=True):
        if (digests[a:b] != own).any():
            other = int(holders[a:b][digests[a:b] != own][0])
            raise CorruptError(
                f"{name} is a plain tensor, and rank {other} has other values in it than rank {ranks.rank}. What every rank has its own "
                "of must be declared: extra={...: PerRank(tensor)}."
            )
    return {name for name, holder in zip(names, chosen, strict=True) if holder == ranks.rank}


def _local(name: str, part: Held, content: Content, copy: bool) -> Local:
    kind = content.kinds.get(name, "model")
    layout, words = Layout(part.cuts, content.stage), part.words(copy=True) if copy else None
    return Local(name, part.dtype, part.shape, part.runs, part.words if words is None else lambda: words, kind, layout)


def _grid(tensors: Iterable[torch.Tensor | Held]) -> Grid:
    """The axes of the widest mesh any tensor lies on, for the record."""
    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    widest = max(meshes, key=lambda m: m.size(), default=None)
    return grid_of(widest) if widest is not None else Grid()


def grid_of(mesh: Any) -> Grid:
    """The axes of a mesh, if all of them have names of ours."""
    names = mesh.mesh_dim_names
    if names is None or any(n not in ROLES for n in names):
        return Grid()
    return Grid(tuple(sorted(zip(names, mesh.shape, strict=True), key=lambda pair: list(ROLES).index(pair[0]))))


# ---- loading ---------------------------------------------------------------------------------------------------------------------------


def load_tensors(
    path: Path | str,
    tensors: Tensors,
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
    check_modes(missing=(missing, "error skip"), unexpected=(unexpected, "error skip"), dtype=(dtype, "error cast"))
    ranks, disk = Ranks.of(group), disk or Disk()
    opened = shared_open(path, ranks, disk)
    return fill(opened, ranks, lambda: tensors, missing=missing, unexpected=unexpected, dtype=dtype, kinds=kinds, disk=disk)


def check_modes(**modes: tuple[str, str]) -> None:
    """Refuse a mode that is not one of those listed: `name=(value, "error skip")`."""
    for name, (mode, known) in modes.items():
        if mode not in known.split():
            raise ConfigError(f"load({name}={mode!r}): expected {' or '.join(known.split())}.")


def shared_open(path: Path | str, ranks: Ranks, disk: Disk) -> Checkpoint:
    """Open a checkpoint on all ranks. Collective; all must find the same one."""
    found = attempt(lambda: open_checkpoint(Path(path), disk))
    facts = found if isinstance(found, Failure) else hashlib.blake2b(repr(found.manifest.files).encode(), digest_size=8).hexdigest()
    everyone = ranks.everyone(facts)
    assert not isinstance(found, Failure)
    if len(set(everyone)) > 1:
        raise CorruptError(
            f"{path} is another checkpoint on rank {next(r for r, f in enumerate(everyone) if f != everyone[0])} than on rank 0."
        )
    return found


def fill(
    opened: Checkpoint,
    ranks: Ranks,
    collect: Callable[[], Tensors],
    *,
    missing: str,
    unexpected: str,
    dtype: str,
    kinds: Sequence[str],
    disk: Disk,
    heard: Sequence[str] = (),
) -> Loaded:
    """`load_tensors` from an opened checkpoint; `heard` are stored names that need no tensor, since they are read otherwise."""
    manifest, where = opened.manifest, str(opened.root)

    def check() -> tuple[dict[str, Held], tuple[str, ...], tuple[str, ...], bytes]:
        parts = {name: held(tensor) for name, tensor in collect().items()}
        absent, casts = _compare(parts, manifest, missing, dtype, where)
        asked = {manifest.aliases.get(name, name) if name not in manifest.tensors else name for name in parts} | set(heard)
        return parts, absent, casts, np.packbits([name in asked for name in manifest.tensors]).tobytes()

    first = attempt(check)
    asked = ranks.everyone(first if isinstance(first, Failure) else first[3])
    assert not isinstance(first, Failure)
    parts, absent, casts, _ = first
    extra = _unasked(manifest, asked, kinds)
    if extra and unexpected == "error":
        raise CorruptError(
            f"{where} holds {len(extra)} tensors that no rank asks for: {', '.join(extra[:5])}. To leave them, unexpected='skip'."
        )

    def read() -> None:
        with Reader(opened, disk) as reader:
            for name, part in each(parts.items()):
                if name not in absent:
                    read_into(reader, name, part)

    ranks.everyone(attempt(read))
    values = dict(manifest.values)
    own = {key: rows[ranks.rank] for key, rows in values.pop("per_rank", {}).items() if len(rows) == ranks.world}
    return Loaded(values, own, absent, extra, casts)


def stored_of(manifest: Manifest, name: str) -> Stored | None:
    """A stored tensor by its name or, if it is tied, another of its names."""
    return manifest.tensors.get(name) or manifest.tensors.get(manifest.aliases.get(name, name))


def _unasked(manifest: Manifest, asked: Sequence[bytes], kinds: Sequence[str]) -> tuple[str, ...]:
    if not manifest.tensors:
        return ()
    rows = np.unpackbits(np.frombuffer(b"".join(asked), np.uint8).reshape(len(asked), -1), axis=1)
    known = np.any(rows, axis=0).tolist()
    return tuple(name for (name, t), is_asked in zip(manifest.tensors.items(), known) if not is_asked and t.kind in kinds)


def _compare(
    tensors: Mapping[str, Held], manifest: Manifest, missing: str, dtype: str, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = {name: stored_of(manifest, name) for name in tensors}
    absent = tuple(n for n, t in found.items() if t is None)
    if absent and missing == "error":
        raise CorruptError(
            f"{where} does not hold {', '.join(absent[:5])}.{near(absent[0], manifest.tensors)} To go on without them, missing='skip'."
        )
    casts = []
    for name, tensor in tensors.items():
        have = found[name]
        if have is None:
            continue
        if tensor.shape != have.shape:
            raise CorruptError(f"{where}: {name} is {list(have.shape)}, but {list(tensor.shape)} is asked for.")
        if tensor.dtype != have.dtype:
            if dtype == "error" or not castable(have.dtype, tensor.dtype):
                raise CorruptError(f"{where}: {name} is {have.dtype}, but {tensor.dtype} is asked for. To convert it, dtype='cast'.")
            casts.append(name)
    return absent, tuple(casts)


@torch.no_grad()
def read_into(reader: Reader, name: str, part: Held) -> None:
    """Read the boxes a rank holds and put them where they lie in its local tensor."""
    manifest = reader.checkpoint.manifest
    name = name if name in manifest.tensors else manifest.aliases[name]
    stored, local = manifest.tensors[name], part.local
    in_place = local.device.type == "cpu" and local.is_contiguous()
    out = part.words() if in_place else np.empty(tuple(local.shape), word(part.dtype))
    for box in boxes_of(part.runs):
        if stored.dtype == part.dtype:
            reader.read(name, box, out[part.slices(box)] if box.size else out)
        else:
            out[part.slices(box)] = cast(reader.read(name, box), stored.dtype, part.dtype, name).reshape(box.size)
    if not in_place:
        local.copy_(from_words(out, local))


def read_row(reader: Reader, name: str, row: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """One rank's row of a tensor of kind "rank"."""
    stored = reader.checkpoint.manifest.tensors[name]
    box = Box((row, *(0,) * (len(stored.shape) - 1)), (1, *stored.shape[1:]))
    return _tensor(reader.read(name, box).reshape(stored.shape[1:]), stored.dtype, device)


def read_whole(reader: Reader, name: str) -> torch.Tensor:
    """All of a small tensor, as a new one."""
    stored = reader.checkpoint.manifest.tensors[name]
    return _tensor(reader.read(name), stored.dtype, "cpu")


def _tensor(bits: Any, dtype: str, device: torch.device | str) -> torch.Tensor:
    return from_words(bits, torch.empty(bits.shape, dtype=torch_dtype(dtype), device="meta")).clone().to(device)


__all__ = ["Content", "Loaded", "PerRank", "load_tensors", "save_tensors"]
