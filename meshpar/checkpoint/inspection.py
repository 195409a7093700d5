"""Looking at checkpoints: inspect, verify, diff, ls, gc. Nothing here changes a committed checkpoint; gc removes whole ones."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from meshpar.checkpoint.format.boxes import Box
from meshpar.checkpoint.format.casts import castable, values
from meshpar.checkpoint.format.faults import CorruptError, StorageError
from meshpar.checkpoint.format.files import ITEMSIZE, BlockCrc, Disk, read_header
from meshpar.checkpoint.format.manifest import MANIFEST, Manifest
from meshpar.checkpoint.format.opened import ASSETS, INDEX, Checkpoint, Pool, near_path, open_checkpoint
from meshpar.checkpoint.format.partial import LOCK, REMOVED, SCRATCH, is_locked, remove_partial, set_aside
from meshpar.checkpoint.format.table import Chunk
from meshpar.checkpoint.move.jobs import slabs
from meshpar.checkpoint.move.reading import Reader
from meshpar.errors import ConfigError

Progress = Callable[[int, int], None]
_DIFF_SLAB = 16 << 20
_PARTIAL = ".partial"
_BOX = re.compile(r"#\d+$")  # what follows a tensor's name where a file holds several of its boxes


@dataclass(frozen=True)
class Verified:
    """What `verify` found. `corrupt` is wrong or missing; `unexpected` is there, but belongs to nothing."""

    path: str
    form: str
    tensors: int
    nbytes: int
    checked_bytes: int
    corrupt: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.corrupt and not self.unexpected

    @property
    def status(self) -> int:
        """The exit status: 3 corrupt or incomplete, 1 files that do not belong there, 0 fine."""
        return 3 if self.corrupt else 1 if self.unexpected else 0

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same: `kind` is missing, unexpected, shape, dtype or values."""

    tensor: str
    kind: str
    detail: str
    count: int = 0
    largest: float = 0.0


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints, whatever their divisions."""

    a: str
    b: str
    compared: int
    nbytes: int
    differences: tuple[Difference, ...] = ()

    @property
    def same(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}


def inspect(path: Path | str, disk: Disk | None = None) -> dict[str, Any]:
    """What a checkpoint holds, as JSON values: mesh, files, tensors with shape, dtype, kind and division. Reads no tensor."""
    opened = open_checkpoint(Path(path), disk)
    m = opened.manifest
    rows = {name: _row(m, name) for name in m.tensors}
    kinds = {kind: sum(t.kind == kind for t in m.tensors.values()) for kind in sorted({t.kind for t in m.tensors.values()})}
    return {
        "path": str(opened.root),
        "form": opened.form,
        "mesh": str(m.grid),
        "ranks": m.grid.size,
        "nbytes": m.nbytes,
        "parameters": sum(prod(t.shape) for t in m.tensors.values() if t.kind == "model"),
        "tensor_count": len(m.tensors),
        "kinds": kinds,
        "checksums": bool(m.tensors) and m.has_checksums,
        "files": [{"name": f.name, "size": f.size} for f in m.files],
        "assets": [a.name for a in m.assets],
        "aliases": dict(m.aliases),
        "values": dict(m.values),
        "keymap": list(m.keymap),
        "tensors": rows,
    }


def _row(m: Manifest, name: str) -> dict[str, Any]:
    t = m.tensors[name]
    cuts = [f"{c.axis}: {c.shard}" for c in t.layout.cuts]
    files = sorted({m.files[c.file].name for c in t.chunks})
    return {
        "dtype": t.dtype,
        "shape": list(t.shape),
        "nbytes": t.nbytes,
        "kind": t.kind,
        "stage": t.layout.stage,
        "cuts": cuts,
        "chunks": len(t.chunks),
        "files": files,
    }


def verify(path: Path | str, *, workers: int = 1, progress: Progress | None = None, disk: Disk | None = None) -> Verified:
    """Read every byte of a checkpoint against its checksums, every header against the manifest, and the directory against both.

    Gathers everything that is wrong instead of stopping at the first. Raises CorruptError only when the manifest itself cannot be read.
    """
    disk = disk or Disk()
    opened = open_checkpoint(Path(path), disk)
    m = opened.manifest
    by_file: list[list[tuple[str, Chunk]]] = [[] for _ in m.files]
    for name, t in m.tensors.items():
        for chunk in t.chunks:
            by_file[chunk.file].append((name, chunk))
    done = _Counter(m.nbytes, progress)
    pool = Pool(opened, disk)
    try:
        with ThreadPoolExecutor(max(workers, 1)) as threads:
            found = [
                p
                for rows in threads.map(lambda k: _verify_file(opened, pool, disk, k, by_file[k], done), range(len(m.files)))
                for p in rows
            ]
    finally:
        pool.close()
    found += [p for asset in m.assets for p in _verify_asset(opened, asset.name, disk)]
    notes = [] if m.has_checksums else ["no checksums were recorded; only structure was checked"]
    return Verified(
        str(opened.root), opened.form, len(m.tensors), m.nbytes, done.checked, tuple(found), tuple(_unexpected(opened)), tuple(notes)
    )


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.checked, self._done, self._total, self._progress = 0, 0, total, progress

    def add(self, nbytes: int, checked: bool) -> None:
        self._done += nbytes
        self.checked += nbytes * checked
        if self._progress:
            self._progress(self._done, self._total)


def _verify_file(opened: Checkpoint, pool: Pool, disk: Disk, file: int, rows: list[tuple[str, Chunk]], done: _Counter) -> list[str]:
    try:
        with pool.use(file) as fd:
            problems = [] if opened.form == "hf" else _verify_header(opened, disk, fd, rows, pool.name(file))
            buffer = bytearray(4 << 20)
            for name, chunk in sorted(rows, key=lambda row: row[1].begin):
                problems += _verify_chunk(opened, disk, fd, pool.name(file), name, chunk, buffer, done)
            return problems
    except (CorruptError, OSError) as error:
        return [str(error)]


def _verify_header(opened: Checkpoint, disk: Disk, fd: int, rows: list[tuple[str, Chunk]], where: str) -> list[str]:
    """The header must tell the same story as the manifest."""
    told = {(n, e.begin, e.dtype, e.shape) for e in read_header(disk, fd, where).entries for n in (e.name, _BOX.sub("", e.name))}
    tensors = opened.manifest.tensors
    wanted = {(name, c.begin, tensors[name].dtype, c.box.size): None for name, c in rows}
    return [f"{where}: the header does not describe {key[0]} as the manifest does." for key in wanted if key not in told]


def _verify_chunk(
    opened: Checkpoint, disk: Disk, fd: int, where: str, name: str, chunk: Chunk, buffer: bytearray, done: _Counter
) -> Iterator[str]:
    nbytes = prod(chunk.box.size) * ITEMSIZE[opened.manifest.tensors[name].dtype]
    block = opened.manifest.block
    running = BlockCrc(block)
    for start in range(0, nbytes, len(buffer)):
        view = memoryview(buffer)[: min(len(buffer), nbytes - start)]
        disk.read(fd, [view], chunk.begin + start)
        running.feed(view)
        done.add(len(view), bool(chunk.crcs))
    for k, (found, wanted) in enumerate(zip(running.finish(), chunk.crcs, strict=False)):
        if found != wanted:
            low = chunk.begin + k * block
            yield (
                f"{where}, tensor {name} {chunk.box}, bytes {low}..{min(low + block, chunk.begin + nbytes)}: "
                f"crc32 is {found:08x}, the manifest says {wanted:08x}."
            )


def _verify_asset(opened: Checkpoint, name: str, disk: Disk) -> Iterator[str]:
    asset = next(a for a in opened.manifest.assets if a.name == name)
    path = Path(os.path.realpath(opened.asset_path(asset))) if opened.form == "hf" else opened.asset_path(asset)
    try:
        data = disk.read_file(path, max(asset.size, 1))
    except (CorruptError, OSError) as error:
        yield str(error)
        return
    running = BlockCrc(opened.manifest.block)
    running.feed(memoryview(data))
    if len(data) != asset.size or (asset.crcs and running.finish() != asset.crcs):
        yield f"{path}: the bytes are not those the manifest records."


def _unexpected(opened: Checkpoint) -> Iterator[str]:
    """What lies in the directory and belongs to nothing."""
    if opened.form == "meshpar":
        known = {f.name for f in opened.manifest.files} | {MANIFEST, *SCRATCH}
        assets = {a.name for a in opened.manifest.assets}
        for path in sorted(opened.root.iterdir()):
            if path.name == ASSETS and path.is_dir() and not path.is_symlink():
                yield from (f"{p} is not part of this checkpoint." for p in sorted(path.iterdir()) if p.name not in assets)
            elif path.name not in known:
                yield f"{path} is not part of this checkpoint."
    elif (opened.root / INDEX).exists():
        known = {f.name for f in opened.manifest.files}
        yield from (f"{p} is in no index." for p in sorted(opened.root.glob("*.safetensors")) if p.name not in known)


def diff(a: Path | str, b: Path | str, *, tolerance: float = 0.0, progress: Progress | None = None, disk: Disk | None = None) -> Diff:
    """Compare two checkpoints tensor by tensor, in bounded memory, whatever meshes they were divided over.

    With no tolerance bits are compared (so NaN equals the same NaN, and 0.0 is not -0.0); else values, absolutely, across dtypes too.
    """
    left, right = open_checkpoint(Path(a), disk), open_checkpoint(Path(b), disk)
    ours, theirs = left.manifest.tensors, right.manifest.tensors
    one_names, two_names = _stored_under(left.manifest), _stored_under(right.manifest)
    found = [Difference(n, "missing", f"only in {left.root}") for n in one_names if n not in two_names]
    found += [Difference(n, "unexpected", f"only in {right.root}") for n in two_names if n not in one_names]
    common = [n for n in one_names if n in two_names and not (n not in ours and n not in theirs and _is_tied_alike(n, left, right))]
    done = _Counter(sum(ours[one_names[n]].nbytes for n in common), progress)
    with Reader(left, disk) as one, Reader(right, disk) as two:
        for name in common:
            found += _compare(one, two, name, (one_names[name], two_names[name]), tolerance, done)
    values_a, values_b = left.manifest.values, right.manifest.values
    if left.form == right.form == "meshpar":
        keys = sorted({*values_a, *values_b})
        found += [Difference(k, "values", "the stored values differ") for k in keys if values_a.get(k) != values_b.get(k)]
    return Diff(str(left.root), str(right.root), len(common), sum(ours[one_names[n]].nbytes for n in common), tuple(found))


def _stored_under(manifest: Manifest) -> dict[str, str]:
    """Every name, those of tied tensors too, and the one it is stored under."""
    return {**{n: n for n in manifest.tensors}, **manifest.aliases}


def _is_tied_alike(name: str, left: Checkpoint, right: Checkpoint) -> bool:
    return left.manifest.aliases[name] == right.manifest.aliases[name]


def _compare(one: Reader, two: Reader, name: str, stored: tuple[str, str], tolerance: float, done: _Counter) -> list[Difference]:
    a, b = one.checkpoint.manifest.tensors[stored[0]], two.checkpoint.manifest.tensors[stored[1]]
    if a.shape != b.shape:
        return [Difference(name, "shape", f"{list(a.shape)} and {list(b.shape)}")]
    out = []
    if a.dtype != b.dtype:
        out.append(Difference(name, "dtype", f"{a.dtype} and {b.dtype}"))
        if not tolerance or not castable(a.dtype, b.dtype):
            return out
        out = []
    count, largest, first = 0, 0.0, None
    for box in slabs(a.shape, max(ITEMSIZE[a.dtype], ITEMSIZE[b.dtype]), _DIFF_SLAB):
        x, y = one.read(stored[0], box), two.read(stored[1], box)
        done.add(x.nbytes, True)
        if a.dtype == b.dtype and np.array_equal(x, y):
            continue
        u, v = values(x, a.dtype).reshape(box.size), values(y, b.dtype).reshape(box.size)
        with np.errstate(invalid="ignore"):
            gap = np.abs(u - v)
        gap = np.where(np.isnan(u) & np.isnan(v) | (u == v), 0.0, np.where(np.isnan(gap), np.inf, gap))
        wrong = gap > tolerance if tolerance else x != y
        if wrong.any():
            count += int(wrong.sum())
            largest = max(largest, float(gap.max()))
            if first is None:
                first = tuple(int(i) + o for i, o in zip(np.argwhere(np.atleast_1d(wrong))[0], box.offset or (0,), strict=True))
    if count:
        out.append(
            Difference(
                name, "values", f"{count} of {prod(a.shape)} differ, by at most {largest:.6g}, first at {list(first or ())}", count, largest
            )
        )
    return out


def first_difference(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str, disk: Disk | None = None) -> str | None:
    """Where two tensors begin to differ, or None when they hold the same bytes."""
    x, y = a.manifest.tensors[name_a], b.manifest.tensors[name_b]
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"as {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
    with Reader(a, disk) as one, Reader(b, disk) as two:
        for box in slabs(x.shape, ITEMSIZE[x.dtype], _DIFF_SLAB):
            if not np.array_equal(one.read(name_a, box), two.read(name_b, box)):
                return f"in {Box(box.offset, box.size)}"
    return None


def ls(root: Path | str, disk: Disk | None = None) -> list[dict[str, Any]]:
    """The checkpoints directly under a directory: complete, corrupt, being written, or left over from an interrupted run."""
    base = Path(root)
    if not base.is_dir():
        raise ConfigError(f"{base} is not a directory.{near_path(base)}")
    rows = []
    for path in sorted(base.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if _is_partial(path):
            rows.append({"name": path.name, "state": "being written" if is_locked(path) else "interrupted", "form": "partial"})
        elif (path / MANIFEST).exists() or (path / INDEX).exists() or any(path.glob("*.safetensors")):
            rows.append(_ls_row(path, disk))
    return rows


def _ls_row(path: Path, disk: Disk | None) -> dict[str, Any]:
    try:
        opened = open_checkpoint(path, disk)
    except CorruptError as error:
        return {"name": path.name, "state": "corrupt", "form": "?", "error": str(error)}
    m = opened.manifest
    row = {"name": path.name, "state": "complete", "form": opened.form, "mesh": str(m.grid), "tensors": len(m.tensors), "nbytes": m.nbytes}
    missing = [f.name for k, f in enumerate(m.files) if not opened.path(k).exists() or opened.path(k).stat().st_size != f.size]
    return row | ({"state": "corrupt", "error": f"{', '.join(missing[:5])} missing or of another size"} if missing else {})


def gc(root: Path | str, *, keep: int | None = None, dry_run: bool = False, disk: Disk | None = None) -> list[str]:
    """Remove what interrupted runs left under a directory, and with `keep` all but the newest complete checkpoints of ours.

    A directory that a live process is writing stays. Removal renames first, so that half a checkpoint never looks like one.
    """
    base, disk = Path(root), disk or Disk()
    if keep is not None and keep < 1:
        raise ConfigError(f"--keep {keep}: at least 1 checkpoint must stay.")
    if not base.is_dir():
        raise ConfigError(f"{base} is not a directory.{near_path(base)}")
    doomed = [p for p in sorted(base.iterdir()) if _is_partial(p) and not is_locked(p)]
    doomed += [
        p for p in sorted(base.iterdir()) if p.name.startswith(".") and p.name.endswith(REMOVED) and p.is_dir() and not p.is_symlink()
    ]
    if keep is not None:
        complete = [base / row["name"] for row in ls(base, disk) if row["state"] == "complete" and row["form"] == "meshpar"]
        written = {p: at for p in complete if (at := _written_at(p)) is not None}
        doomed += sorted(written, key=written.__getitem__)[:-keep]
    return [str(p) for p in doomed if dry_run or _remove(p, disk)]


def _written_at(path: Path) -> int | None:
    """When a checkpoint was written, in nanoseconds; None if somebody has removed it."""
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _remove(path: Path, disk: Disk) -> bool:
    """Remove one directory; False if a writer has taken it over, or somebody else has removed it meanwhile."""
    try:
        if path.name.endswith(_PARTIAL):
            return remove_partial(path, disk)
        disk.remove_tree(path if path.name.startswith(".") else set_aside(path, disk))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path} could not be removed: {error}") from error
    return True


def _is_partial(path: Path) -> bool:
    """Whether a directory is a writer's; one that was killed before it had the lock leaves an empty one."""
    if not (path.name.startswith(".") and path.name.endswith(_PARTIAL) and path.is_dir() and not path.is_symlink()):
        return False
    try:
        return (path / LOCK).exists() or not any(path.iterdir())
    except FileNotFoundError:
        return False  # it has just been renamed
