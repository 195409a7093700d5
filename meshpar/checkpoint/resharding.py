"""From one checkpoint to another one: decide everything, prove it, then move the bytes and commit.

`plan_reshard` (and its siblings in `convert`) read manifests and headers only and return a `Work`; `execute` obeys it. Nothing is
written when a plan is impossible, and the target appears whole or not at all.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from meshpar.checkpoint import keymap as keymaps
from meshpar.checkpoint import manifest as manifests
from meshpar.checkpoint.boxes import volume
from meshpar.checkpoint.casts import FLOATS
from meshpar.checkpoint.division import Division, Grid, Layout, default_division, division_from_plan, recut
from meshpar.checkpoint.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.files import BLOCK, ITEMSIZE, BlockCrc, Disk
from meshpar.checkpoint.keymap import Link, Mapped
from meshpar.checkpoint.manifest import MANIFEST, Asset, Chunk, Manifest, Stored
from meshpar.checkpoint.opened import ASSETS, INDEX, Checkpoint, Pool, open_checkpoint
from meshpar.checkpoint.partial import Partial, check_target, partial_path, writing
from meshpar.checkpoint.sink import Output, Sink, check_space, rank_sink
from meshpar.checkpoint.transfer import ZERO, Options, Piece, Traffic, Transfer, check_memory, run

Progress = Callable[[int, int], None]  # bytes done, bytes in all
SYNC_BYTES, SYNC_SECONDS = 1 << 30, 20.0


@dataclass(frozen=True)
class Work:
    """A conversion, decided: what is read, what is written, and where every byte goes. `form` is "meshpar" or "hf"."""

    source: Checkpoint
    target: Path
    form: str
    mapped: Mapped
    sink: Sink
    transfers: tuple[Transfer, ...]
    owners: tuple[tuple[tuple[str, int], ...], ...]  # per transfer and target piece: tensor and its piece
    division: Division
    kinds: Mapping[str, str]
    values: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    keymap: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, as written."""
        return sum(volume(shape) * ITEMSIZE[dtype] for dtype, shape in self.mapped.tensors.values())

    def origin(self, options: Options) -> str:
        """A fingerprint of the source and of everything that decides what is written."""
        m = self.source.manifest
        stamps = [os.stat(self.source.path(k)).st_mtime_ns for k in range(len(m.files))] if self.source.form != "meshpar" else []
        facts = [
            self.form,
            m.files,
            stamps,
            [[c.crcs for c in t.chunks] for t in m.tensors.values()],
            [f.record for f in self.sink.files],  # their headers say where every box goes
            self.mapped.rules,
            options.checksums,
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


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


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a plan is up to millions of small objects without cycles, which each pass would visit again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@uncollected()
def reshard(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None = None,
    *,
    plan: Path | str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Divide a checkpoint over another mesh, in bounded memory, without a process group and without the model.

    Without `plan` every tensor is divided the way its layout recorded in the source says, on the new axis sizes, else by the default of
    `meshpar.checkpoint.division`. Raises CorruptError, ImpossibleError or StorageError; the target is then not there.

    >>> reshard("step-100", "step-100-tp2", "tp=2,pp=2")                                           # doctest: +SKIP
    """
    options, disk = options or Options(), disk or Disk()
    work = plan_reshard(source, target, mesh, plan=plan, dtype=dtype, disk=disk, resume=resume)
    return execute(work, options, resume=resume, dry_run=dry_run, progress=progress, disk=disk)


def plan_reshard(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None,
    *,
    plan: Path | str | None = None,
    dtype: str | None = None,
    disk: Disk | None = None,
    resume: bool = False,
) -> Work:
    """Decide a reshard without doing it."""
    opened = open_checkpoint(Path(source), disk)
    target = new_target(target, resume)
    m = opened.manifest
    tensors = {name: (t.dtype, t.shape) for name, t in m.tensors.items()}
    kinds = {name: t.kind for name, t in m.tensors.items()}
    mapped = with_dtype(keymaps.identity(tensors), kinds, dtype)
    grid = Grid.parse(mesh) if isinstance(mesh, str) else mesh
    division = divide(
        mapped.tensors, kinds, grid, plan, {name: t.layout for name, t in m.tensors.items()} if opened.form == "meshpar" else {}
    )
    sink = rank_sink(mapped.tensors, division)
    return build(opened, target, "meshpar", mapped, sink, division, kinds, values=m.values, aliases=m.aliases, keymap=m.keymap)


def new_target(target: Path | str, resume: bool) -> Path:
    """The absolute path of a target that does not exist yet; a resumed run may find its own finished work there."""
    path = Path(os.path.abspath(target))
    if not (resume and path.is_dir()):
        check_target(path)
    return path


def divide(
    tensors: keymaps.Tensors, kinds: Mapping[str, str], grid: Grid | None, plan: Path | str | None, known: Mapping[str, Layout]
) -> Division:
    """The division asked for: a plan file, else what was recorded, else the default. Values per rank are never cut."""
    if plan is not None:
        division = division_from_plan(Path(plan).read_text(), tensors, grid)
    else:
        division = recut(tensors, grid or Grid(), known) if known else default_division(tensors, grid or Grid())
    fixed = {name: Layout((), division.layouts[name].stage) for name in tensors if kinds.get(name) == "rank"}
    return Division(division.grid, {**division.layouts, **fixed})


def with_dtype(mapped: Mapped, kinds: Mapping[str, str], dtype: str | None) -> Mapped:
    """The same tensors with the floating ones of the model (not the optimizer's) in another dtype."""
    if dtype is None:
        return mapped
    tensors = {n: (dtype if kinds.get(n, "model") == "model" and d in FLOATS else d, shape) for n, (d, shape) in mapped.tensors.items()}
    links = tuple(_with_dtype(link, tensors[link.targets[0].tensor][0]) for link in mapped.links)
    return replace(mapped, tensors=tensors, links=links)


def _with_dtype(link: Link, dtype: str) -> Link:
    return link if link.target_dtype == dtype else link._replace(target_dtype=dtype, exact=False)


def build(
    source: Checkpoint,
    target: Path,
    form: str,
    mapped: Mapped,
    sink: Sink,
    division: Division,
    kinds: Mapping[str, str],
    *,
    values: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    keymap: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Work:
    """Turn links and files into transfers, and prove once more that what is written tiles every tensor."""
    rows = [_transfer(link, source.manifest, sink) for link in mapped.links]
    for name, (_, shape) in mapped.tensors.items():
        manifests.check_tiling(name, shape, [p.box for p in sink.pieces[name]], "the plan")
    rows.sort(key=lambda row: (row[0].sources[0].file, row[0].sources[0].begin) if row[0].sources else (0, 0))
    return Work(
        source,
        target,
        form,
        mapped,
        sink,
        tuple(t for t, _ in rows),
        tuple(o for _, o in rows),
        division,
        kinds,
        dict(values or {}),
        dict(aliases or {}),
        tuple(keymap),
        tuple(notes),
    )


def _transfer(link: Link, source: Manifest, sink: Sink) -> tuple[Transfer, tuple[tuple[str, int], ...]]:
    if len(link.sources) == len(link.targets) == 1 and not (link.rearrange or link.source_padding or link.target_padding):
        name = link.targets[0].tensor  # as it is: the chunks are the pieces
        sources, targets = source.tensors[link.sources[0].tensor].chunks, sink.pieces[name]
        transfer = Transfer(name, link.dtype, link.shape, sources, targets, link.target_dtype, None, link.exact)
        return transfer, tuple((name, k) for k in range(len(targets)))
    return _placed_transfer(link, source, sink)


def _placed_transfer(link: Link, source: Manifest, sink: Sink) -> tuple[Transfer, tuple[tuple[str, int], ...]]:
    sources = [Piece(box, ZERO, 0) for box in link.source_padding]
    for place in link.sources:
        for c in source.tensors[place.tensor].chunks:
            sources.append(c._replace(box=place.box(c.box, len(link.shape))))
    shape = link.rearrange.shape if link.rearrange else link.shape
    targets = [(Piece(box, ZERO, 0), ("", 0)) for box in link.target_padding]
    for place in link.targets:
        for k, p in enumerate(sink.pieces[place.tensor]):
            targets.append((p._replace(box=place.box(p.box, len(shape))), (place.tensor, k)))
    pieces = tuple(p for p, _ in targets)
    transfer = Transfer(
        link.targets[0].tensor, link.dtype, link.shape, tuple(sources), pieces, link.target_dtype, link.rearrange, link.exact
    )
    return transfer, tuple(owner for _, owner in targets)


def execute(
    work: Work,
    options: Options,
    *,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Do a piece of work: lock, move, sync, write the manifest, rename."""
    disk = disk or Disk()
    began = time.monotonic()
    options = replace(options, source_block=work.source.manifest.block)
    check_memory(work.transfers, options)
    report = Report(
        str(work.source.root),
        str(work.target),
        str(work.division.grid),
        len(work.mapped.tensors),
        work.nbytes,
        len(work.sink.files),
        max((f.size for f in work.sink.files), default=0),
        dry_run=dry_run,
        notes=work.notes,
    )
    if dry_run:
        return report
    origin = work.origin(options)
    if resume and work.target.exists():
        _already_done(work, origin, disk)
        return replace(report, resumed=len(work.transfers), notes=(*work.notes, "it was complete already"))
    if not (resume and partial_path(work.target).exists()):
        check_space(work.target.parent, work.sink.nbytes)
    with writing(work.target, origin, disk, resume=resume) as partial:
        traffic, resumed = _fill(work, partial, origin, options, progress or (lambda done, total: None))
        partial.commit()
    seconds = time.monotonic() - began
    return replace(report, bytes_read=traffic.read, bytes_written=traffic.written, resumed=resumed, seconds=round(seconds, 3))


def _already_done(work: Work, origin: str, disk: Disk) -> None:
    """Accept an existing target only if it is the result of this very work."""
    try:
        found = open_checkpoint(work.target, disk)
    except CorruptError:
        found = None
    if found is not None and work.form == "meshpar" and found.manifest.origin == origin:
        return
    if found is not None and work.form == "hf" and set(found.manifest.files) == {f.record for f in work.sink.files}:
        return
    check_target(work.target)


def _fill(work: Work, partial: Partial, origin: str, options: Options, progress: Progress) -> tuple[Traffic, int]:
    """Write every file of the new checkpoint into the partial directory, the manifest last."""
    disk = partial.disk
    output = Output(partial.path, work.sink.files, disk)
    pool = Pool(work.source, disk)
    try:
        crcs = _intact(work, partial, options)
        keeper = _Keeper(work, partial, output, progress, crcs)
        todo = [k for k in range(len(work.transfers)) if k not in crcs]
        traffic = run([work.transfers[k] for k in todo], pool, output, options, disk, lambda k, rows: keeper.done(todo[k], rows))
        output.finish()
    finally:
        output.close()
        pool.close()
    assets = _copy_assets(work, partial)
    if work.form == "meshpar":
        disk.write_file(partial.path / MANIFEST, manifests.dump(_manifest(work, keeper.crcs, assets, origin)))
    elif len(work.sink.files) > 1:
        disk.write_file(partial.path / INDEX, _index(work))
    return traffic, len(work.transfers) - len(todo)


@dataclass
class _Keeper:
    """Collects the checksums of finished transfers, and every so often puts them on the disk for a resumed run."""

    work: Work
    partial: Partial
    output: Output
    progress: Progress
    crcs: dict[int, tuple[tuple[int, ...], ...]]
    total: int = 0
    bytes_done: int = 0
    bytes_kept: int = 0
    fresh: dict[str, Any] = field(default_factory=dict)
    kept_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.total = self.work.nbytes
        self.bytes_done = sum(self.work.transfers[k].nbytes for k in self.crcs)

    def done(self, index: int, rows: tuple[tuple[int, ...], ...]) -> None:
        self.crcs[index] = rows
        self.fresh[str(index)] = rows
        self.bytes_done += self.work.transfers[index].nbytes
        self.progress(self.bytes_done, self.total)
        if self.bytes_done - self.bytes_kept >= SYNC_BYTES or time.monotonic() - self.kept_at >= SYNC_SECONDS:
            self.output.sync()
            self.partial.record(self.fresh)
            self.fresh, self.bytes_kept, self.kept_at = {}, self.bytes_done, time.monotonic()


def _intact(work: Work, partial: Partial, options: Options) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The transfers that an interrupted run finished and whose bytes are still what it wrote."""
    out: dict[int, tuple[tuple[int, ...], ...]] = {}
    if not options.checksums:
        return out
    for key, rows in partial.finished.items():
        index = int(key) if key.isdigit() else -1
        if not 0 <= index < len(work.transfers):
            continue
        t, crcs = work.transfers[index], tuple(tuple(row) for row in rows)
        if len(crcs) == len(t.targets) and all(_same_bytes(work, partial, t, p, c) for p, c in zip(t.targets, crcs, strict=True)):
            out[index] = crcs
    return out


def _same_bytes(work: Work, partial: Partial, t: Transfer, piece: Piece, crcs: tuple[int, ...]) -> bool:
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
        return crc_of(partial.disk, fd, piece.begin, volume(piece.box.size) * ITEMSIZE[t.target_dtype]) == crcs
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


def _manifest(work: Work, crcs: Mapping[int, tuple[tuple[int, ...], ...]], assets: tuple[Asset, ...], origin: str) -> Manifest:
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    for index, owners in enumerate(work.owners):
        found.update(zip(owners, crcs[index], strict=True))
    tensors = {}
    for name, (dtype, shape) in work.mapped.tensors.items():
        chunks = tuple(Chunk(p.box, p.file, p.begin, found[name, k]) for k, p in enumerate(work.sink.pieces[name]))
        tensors[name] = Stored(dtype, shape, chunks, work.kinds.get(name, "model"), work.division.layouts[name])
    files = tuple(f.record for f in work.sink.files)
    manifest = Manifest(tensors, files, work.division.grid, assets, work.aliases, work.values, work.keymap, origin)
    manifests.check(manifest, "the new manifest")
    return manifest


def _index(work: Work) -> bytes:
    where = {name: work.sink.files[pieces[0].file].name for name, pieces in work.sink.pieces.items() if pieces}
    return json.dumps({"metadata": {"total_size": work.nbytes}, "weight_map": where}, indent=2, sort_keys=True).encode()


def single_targets(tensors: keymaps.Tensors, kinds: Mapping[str, str]) -> keymaps.Tensors:
    """The tensors of the model itself: what other tools understand."""
    model = {name: row for name, row in tensors.items() if kinds.get(name, "model") == "model"}
    if not model:
        raise ImpossibleError("The checkpoint holds no tensor of a model.")
    return model
