"""Doing a piece of work: lock, move, sync, write the manifest, rename. The target appears whole or not at all."""

from __future__ import annotations

import filecmp
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from meshpar.checkpoint.convert.work import Work
from meshpar.checkpoint.format import manifest as manifests
from meshpar.checkpoint.format.boxes import volume
from meshpar.checkpoint.format.casts import Array
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import BLOCK, ITEMSIZE, BlockCrc, Disk
from meshpar.checkpoint.format.manifest import MANIFEST, Asset, Manifest
from meshpar.checkpoint.format.opened import ASSETS, INDEX, Checkpoint, Pool, is_weights, open_checkpoint
from meshpar.checkpoint.format.partial import Partial, check_target, partial_path, tidy, writing
from meshpar.checkpoint.format.sink import Output, check_space
from meshpar.checkpoint.format.table import Crcs
from meshpar.checkpoint.move.channel import Traffic
from meshpar.checkpoint.move.mover import Finished, run
from meshpar.checkpoint.move.transfer import ZERO, Options, Order, Piece, check_memory

Progress = Callable[[int, int], None]  # bytes done, bytes in all
SYNC_BYTES, SYNC_SECONDS = 16 << 30, 20.0  # what an interrupted run may have to do again; waiting for the disk more often takes time


@dataclass(frozen=True)
class Report:
    """What was done, or, with `dry_run`, what would be."""

    source: str
    target: str
    mesh: str
    tensors: int
    nbytes: int
    files: int
    largest_file: int
    bytes_read: int = 0
    bytes_written: int = 0
    resumed: int = 0
    seconds: float = 0.0
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class How:
    """How a conversion is run: what is not about what it converts."""

    options: Options
    disk: Disk
    resume: bool = False
    dry_run: bool = False
    progress: Progress | None = None


def execute(work: Work, how: How) -> Report:
    """Do a piece of work, or with `dry_run` only say what it would be."""
    disk, began = how.disk, time.monotonic()
    options = replace(how.options, source_block=work.source.manifest.block)
    check_memory(work.transfers, options)
    report = Report(
        str(work.source.root),
        str(work.target),
        str(work.division.grid),
        len(work.mapped.tensors),
        work.nbytes,
        len(work.sink.files),
        max((f.size for f in work.sink.files), default=0),
        dry_run=how.dry_run,
        notes=work.notes,
    )
    if how.dry_run:
        return report
    origin = work.origin(options)
    if how.resume and work.target.exists():
        _already_done(work, origin, how)
        tidy(work.target, disk)
        return replace(report, resumed=sum(map(len, work.transfers)), notes=(*work.notes, "it was complete already"))
    if not (how.resume and partial_path(work.target).exists()):
        check_space(work.target.parent, work.sink.nbytes)
    with writing(work.target, origin, disk, resume=how.resume) as partial:
        traffic, resumed = _fill(work, partial, origin, options, how.progress or (lambda done, total: None))
        partial.commit()
    seconds = time.monotonic() - began
    return replace(report, bytes_read=traffic.read, bytes_written=traffic.written, resumed=resumed, seconds=round(seconds, 3))


def _already_done(work: Work, origin: str, how: How) -> None:
    """Accept an existing target only if it is the result of this very work."""
    try:
        found = open_checkpoint(work.target, how.disk)
    except CorruptError:
        found = None
    if found is not None and work.form == "meshpar" and found.manifest.origin == origin:
        return
    if found is not None and work.form == "hf" and _holds_the_same(work, found, how):
        return
    check_target(work.target)


def _holds_the_same(work: Work, found: Checkpoint, how: How) -> bool:
    """Whether a folder holds what would be written. It has no record of where it is from, so both are read."""
    if found.manifest.files != tuple(f.record for f in work.sink.files):
        return False
    for asset in work.source.manifest.assets:
        ours, theirs = work.source.asset_path(asset), work.target / asset.name
        if not theirs.is_file() or not filecmp.cmp(ours, theirs, shallow=False):
            return False
    source, target = Pool(work.source, how.disk), Pool(found, how.disk)
    options = replace(how.options, source_block=work.source.manifest.block, checksums=False)
    try:
        run(work.transfers, Order.of(work.transfers), source, target, options, _Comparing(how.disk), lambda finished: None)
    except _DifferentError:
        return False
    finally:
        source.close()
        target.close()
    return True


class _DifferentError(Exception):
    """Other bytes lie there."""


class _Comparing(Disk):
    """A disk that does not write, but compares with what lies there."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._step = disk, 1 << 20

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> None:
        self._disk.read(fd, views, offset)

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            for start in range(0, len(view), self._step):
                wanted = view[start : start + self._step]
                there = memoryview(bytearray(len(wanted)))
                self._disk.read(fd, [there], offset + start)
                if there != wanted:
                    raise _DifferentError
            offset += len(view)


def _fill(work: Work, partial: Partial, origin: str, options: Options, progress: Progress) -> tuple[Traffic, int]:
    """Write every file of the new checkpoint into the partial directory, the manifest last."""
    disk = partial.disk
    output = Output(partial.path, work.sink.files, disk)
    pool = Pool(work.source, disk)
    try:
        keeper = _Keeper(work, partial, output, progress, options.checksums)
        order = Order.of(work.transfers)
        left = order.take(~keeper.resume(order))
        traffic = run(work.transfers, left, pool, output, options, disk, keeper.done)
        output.finish()
    finally:
        output.close()
        pool.close()
    assets = _copy_assets(work, partial)
    if work.form == "meshpar":
        manifest = Manifest(
            work.with_checksums(keeper.found) if options.checksums else work.sink.table,
            tuple(f.record for f in work.sink.files),
            work.division.grid,
            assets,
            work.aliases,
            work.values,
            work.keymap,
            origin,
        )
        manifests.check(manifest, "the new manifest")
        disk.write_file(partial.path / MANIFEST, manifests.dump(manifest))
    elif len(work.sink.files) > 1:
        disk.write_file(partial.path / INDEX, _index(work))
    return traffic, len(order) - len(left)


@dataclass
class _Keeper:
    """Collects the checksums of finished transfers, and every so often puts them on the disk for a resumed run."""

    work: Work
    partial: Partial
    output: Output
    progress: Progress
    checksums: bool
    found: list[Crcs] = field(init=False)  # of the targets of every transfer
    total: int = 0
    bytes_done: int = 0
    bytes_kept: int = 0
    fresh: list[Finished] = field(default_factory=list)
    kept_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.total = self.work.nbytes
        self.found = [np.zeros((len(t), sum(t.target_blocks) * self.checksums), np.uint32) for t in self.work.transfers]

    def done(self, finished: Finished) -> None:
        """Take note of transfers whose targets are written."""
        self._keep(finished)
        self.fresh.append(finished)
        self.progress(self.bytes_done, self.total)
        if self.bytes_done - self.bytes_kept >= SYNC_BYTES or time.monotonic() - self.kept_at >= SYNC_SECONDS:
            self.output.sync()
            self.partial.record({"finished": [[f.group, f.rows.tolist(), f.crcs.tolist()] for f in self.fresh]})
            self.fresh, self.bytes_kept, self.kept_at = [], self.bytes_done, time.monotonic()

    def resume(self, order: Order) -> Array:
        """Take over what an interrupted run finished and whose bytes are still what it wrote; which of the transfers those are."""
        is_done = [np.zeros(len(t), bool) for t in self.work.transfers]
        for group, rows, crcs in self.partial.finished if self.checksums else ():
            for row, own in zip(rows, crcs, strict=True):
                if _is_intact(self.work, self.partial, group, row, own):
                    self._keep(Finished(group, np.array([row]), np.array([own], np.uint32)))
                    is_done[group][row] = True
        taken = np.zeros(len(order), bool)
        for group, rows in enumerate(is_done):
            if rows.any():
                which = order.group == group
                taken[which] = rows[order.row[which]]
        return taken

    def _keep(self, finished: Finished) -> None:
        self.found[finished.group][finished.rows] = finished.crcs
        self.bytes_done += len(finished.rows) * self.work.transfers[finished.group].nbytes


def _is_intact(work: Work, partial: Partial, group: int, row: int, crcs: Sequence[int]) -> bool:
    """Whether the bytes of a transfer's targets have these checksums."""
    if not (0 <= group < len(work.transfers) and 0 <= row < len(work.transfers[group])):
        return False
    t = work.transfers[group]
    ends = accumulate(t.target_blocks)
    return len(crcs) == sum(t.target_blocks) and all(
        _same_bytes(work, partial, t.target_dtype, piece, tuple(crcs[end - count : end]))
        for piece, count, end in zip(t.targets.row(row), t.target_blocks, ends, strict=True)
    )


def _same_bytes(work: Work, partial: Partial, dtype: str, piece: Piece, crcs: tuple[int, ...]) -> bool:
    if piece.file == ZERO:
        return True
    new = work.sink.files[piece.file]
    try:
        fd = partial.disk.open_file(partial.path / new.name)
    except CorruptError:
        return False
    try:
        if os.fstat(fd).st_size != new.size:
            return False
        return crc_of(partial.disk, fd, piece.begin, volume(piece.box.size) * ITEMSIZE[dtype]) == crcs
    finally:
        os.close(fd)


def crc_of(disk: Disk, fd: int, begin: int, nbytes: int, block: int = BLOCK) -> tuple[int, ...]:
    """The block checksums of a byte range of an open file."""
    running, buffer = BlockCrc(block), bytearray(min(nbytes, 1 << 22))
    for start in range(begin, begin + nbytes, max(len(buffer), 1)):
        view = memoryview(buffer)[: min(len(buffer), begin + nbytes - start)]
        disk.read(fd, [view], start)
        running.feed(view)
    return running.finish()


def _copy_assets(work: Work, partial: Partial) -> tuple[Asset, ...]:
    """Carry configuration and tokenizer files along, with checksums of their own."""
    assets, disk = work.source.manifest.assets, partial.disk
    folder = partial.path / ASSETS if work.form == "meshpar" else partial.path
    if assets and work.form == "meshpar" and not folder.exists():
        disk.mkdir(folder)
    out = []
    for asset in assets:
        if is_weights(asset.name):
            raise CorruptError(f"{work.source.root}: {asset.name} beside the tensors would be taken for weights.")
        out.append(_copy_asset(work.source.asset_path(asset), folder / asset.name, asset, disk, work.source))
    if assets:
        disk.sync_directory(folder)
    return tuple(out)


def _copy_asset(source: Path, target: Path, asset: Asset, disk: Disk, opened: Checkpoint) -> Asset:
    if source.is_symlink():
        source = Path(os.path.realpath(source))
    fd = disk.open_file(source)
    try:
        out = disk.create(target, asset.size)
        try:
            running, buffer = BlockCrc(opened.manifest.block), bytearray(1 << 20)
            for start in range(0, asset.size, len(buffer)):
                view = memoryview(buffer)[: min(len(buffer), asset.size - start)]
                disk.read(fd, [view], start)
                running.feed(view)
                disk.write(out, [view], start)
            disk.sync(out)
        finally:
            os.close(out)
    finally:
        os.close(fd)
    crcs = running.finish()
    if asset.crcs and crcs != asset.crcs:
        raise CorruptError(f"{source}: crc32 does not match the manifest; the file was changed.")
    if opened.manifest.block != BLOCK:
        crcs = ()
    return Asset(asset.name, asset.size, crcs)


def _index(work: Work) -> bytes:
    """Which file of a Hugging Face folder holds each tensor."""
    where: dict[str, str] = {}
    for g in work.sink.table.groups:
        files = [work.sink.files[k].name for k in g.chunks.file[:, 0].tolist()]
        where |= zip([work.sink.table.names[at] for at in g.position.tolist()], files, strict=True)
    return json.dumps({"metadata": {"total_size": work.nbytes}, "weight_map": where}, indent=2, sort_keys=True).encode()
