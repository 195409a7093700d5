"""The manifest: one JSON file, written last, that says what a checkpoint holds and where every byte of it lies.

    {"crc32": "1c291ca3", "format": "meshpar.checkpoint", "version": 1, "mesh": "pp=2,tp=2", "block": 8388608,
     "files":   [["rank-00000.safetensors", size, header bytes, header crc32], ...],
     "assets":  [["config.json", size, [crc32, ...]], ...],
     "tensors": {"layers.0.weight": {"dtype": "BF16", "shape": [64, 32], "kind": "model", "cuts": [["tp", 0, 1, [[64, 1]]]], "stage": 0,
                 "chunks": [[offset, size, file, first byte, [crc32 of every block]], ...]}},
     "aliases": {"lm_head.weight": "embed.weight"}, "values": {...}, "keymap": [...], "origin": "fingerprint of what it was made from"}

The first crc32 covers the rest of the manifest. Reading checks everything that can be checked without reading tensors: types, names,
byte ranges against file sizes, and that the chunks tile each tensor exactly. Only files named here are ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from meshpar.checkpoint.boxes import Box, find_flaw, volume
from meshpar.checkpoint.division import ONE_RANK, WHOLE, Grid, Layout, layout_from_json, layout_to_json
from meshpar.checkpoint.faults import CorruptError
from meshpar.checkpoint.files import BLOCK, ITEMSIZE, Disk, check_dtype, check_name, check_shape, check_tensor_name, parse_json
from meshpar.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT, VERSION = "meshpar.checkpoint", 1
KINDS = ("model", "optimizer", "extra", "rank")
MAX_MANIFEST = 1 << 30
_LIMIT = 1 << 62
_new = tuple.__new__  # a NamedTuple's own constructor takes three times as long, and there are many chunks
_BLANK = b'{"crc32":"00000000"'


class FileRecord(NamedTuple):
    """A data file: its name and size, and the size and crc32 of its header (0 and None where not recorded)."""

    name: str
    size: int
    header: int = 0
    header_crc: int | None = None


class Asset(NamedTuple):
    """A file that is carried along unread, such as a configuration or a tokenizer."""

    name: str
    size: int
    crcs: tuple[int, ...] = ()


class Chunk(NamedTuple):
    """One box of a tensor: the file (an index), its first byte there, and the crc32 of every block of its bytes."""

    box: Box
    file: int
    begin: int
    crcs: tuple[int, ...] = ()


class Stored(NamedTuple):
    """One tensor as it lies on disk. `kind` says what it is: model, optimizer, extra, or rank (one row per rank, never resharded)."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    kind: str = "model"
    layout: Layout = WHOLE

    @property
    def nbytes(self) -> int:
        return volume(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint, without its bytes."""

    tensors: Mapping[str, Stored]
    files: tuple[FileRecord, ...] = ()
    grid: Grid = ONE_RANK
    assets: tuple[Asset, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    keymap: tuple[str, ...] = ()
    origin: str = ""
    block: int = BLOCK

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def dump(manifest: Manifest) -> bytes:
    """The bytes of the manifest file."""
    body = {
        "crc32": "00000000",
        "format": FORMAT,
        "version": VERSION,
        "mesh": str(manifest.grid),
        "block": manifest.block,
        "files": [list(f) for f in manifest.files],
        "assets": [[a.name, a.size, list(a.crcs)] for a in manifest.assets],
        "tensors": {name: _stored_to_json(t) for name, t in manifest.tensors.items()},
        "aliases": dict(manifest.aliases),
        "values": dict(manifest.values),
        "keymap": list(manifest.keymap),
        "origin": manifest.origin,
    }
    try:
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Only JSON values without NaN can be stored beside the tensors: {error}") from None
    return text.replace(_BLANK, _stamp(text), 1)


def _stamp(blank: bytes) -> bytes:
    return b'{"crc32":"%08x"' % crc32(blank)


def _stored_to_json(t: Stored) -> dict[str, Any]:
    chunks = [[c.box.offset, c.box.size, c.file, c.begin, c.crcs] for c in t.chunks]
    return {"dtype": t.dtype, "shape": t.shape, "kind": t.kind, **layout_to_json(t.layout), "chunks": chunks}


def load(data: bytes, where: str) -> Manifest:
    """Parse a manifest and prove it consistent. Raises CorruptError with the file, tensor and range at fault."""
    if data[:10] != _BLANK[:10] or data[: len(_BLANK)] != _stamp(_BLANK + data[len(_BLANK) :]):
        raise CorruptError(f"{where}: the manifest's own crc32 does not match: it was changed or cut short.")
    body = parse_json(data, where)
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise CorruptError(
            f"{where}: format {body.get('format')!r} version {body.get('version')!r}; this release reads {FORMAT} {VERSION}."
        )
    try:
        manifest = _from_json(body, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{where} is malformed: {error!r}") from None
    check(manifest, where)
    return manifest


def _from_json(body: dict[str, Any], where: str) -> Manifest:
    files = tuple(FileRecord(check_name(name, where), _count(size), _count(head), _count(crc)) for name, size, head, crc in body["files"])
    assets = tuple(Asset(check_name(name, where), _count(size), tuple(map(_count, crcs))) for name, size, crcs in body["assets"])
    known = _Known({}, {})
    tensors = {check_tensor_name(name, where): _stored(row, f"{where}, {name!r}", known) for name, row in body["tensors"].items()}
    aliases = {check_tensor_name(k, where): check_tensor_name(v, where) for k, v in body["aliases"].items()}
    block, origin, keymap = _count(body["block"]), body["origin"], body["keymap"]
    if not block or not isinstance(origin, str) or not isinstance(keymap, list) or not all(isinstance(k, str) for k in keymap):
        raise ValueError("block, origin or keymap")
    return Manifest(tensors, files, Grid.parse(body["mesh"]), assets, aliases, dict(body["values"]), tuple(keymap), origin, block)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


class _Known(NamedTuple):
    """What was seen before: most tensors of a model are divided like others of their shape, and share the objects that say how."""

    layouts: dict[str, Layout]
    boxes: dict[tuple[int, ...], tuple[list[Any], list[Box]]]  # by shape: their JSON and themselves


def _stored(row: Any, where: str, known: _Known) -> Stored:
    shape, kind = check_shape(row["shape"], where), row["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind {str(kind)[:40]!r}")
    rows = row["chunks"]
    raw = [row[:2] for row in rows]
    numbers: list[Any] = []
    for offset, size, file, begin, crcs in rows:
        numbers += offset
        numbers += size
        numbers += crcs
        numbers += file, begin
    if numbers and (set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= _LIMIT):
        raise ValueError("a position, size or checksum is not a count")
    seen, boxes = known.boxes.get(shape, (None, []))
    if raw != seen:
        boxes = [Box(tuple(offset), tuple(size)) for offset, size in raw]
        known.boxes[shape] = raw, boxes
    chunks = tuple([_new(Chunk, (box, file, begin, tuple(crcs))) for box, (_, _, file, begin, crcs) in zip(boxes, rows, strict=True)])
    layout = repr((row.get("cuts"), row.get("stage")))
    if layout not in known.layouts:
        known.layouts[layout] = layout_from_json(row, where)
    return Stored(check_dtype(row["dtype"], where), shape, chunks, kind, known.layouts[layout])


def check(manifest: Manifest, where: str) -> None:
    """Prove that the chunks tile every tensor, lie inside their files, and that no two share a byte."""
    names = [f.name for f in manifest.files]
    if len(set(names)) != len(names):
        raise CorruptError(f"{where}: a file is listed twice.")
    ends = [f.size for f in manifest.files]
    proved: dict[tuple[int, ...], tuple[list[Box], list[int]]] = {}  # most tensors of a model are divided like others of their shape
    spans: list[tuple[int, int, int]] = []
    for name, stored in manifest.tensors.items():
        boxes = [c.box for c in stored.chunks]
        known, volumes = proved.get(stored.shape, (None, []))
        if known != boxes:
            check_tiling(name, stored.shape, boxes, where)
            volumes = [volume(box.size) for box in boxes]
            proved[stored.shape] = boxes, volumes
        item = ITEMSIZE[stored.dtype]
        for (box, file, begin, crcs), count in zip(stored.chunks, volumes, strict=True):
            end = begin + count * item
            if file >= len(names) or end > ends[file]:
                raise CorruptError(f"{where}: {name} {box} should end at byte {end} of file {file}, past its end.")
            if crcs and len(crcs) != -((begin - end) // manifest.block):
                raise CorruptError(f"{where}: {name} {box} has {len(crcs)} checksums for {end - begin} bytes.")
            spans.append((file, begin, end))
    shared = _shared(spans)
    if shared is not None:
        file, start, stop = shared
        one, other = _holders(manifest, shared)
        raise CorruptError(f"{where}: {one} and {other} share bytes {start}..{stop} of {names[file]}.")
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CorruptError(f"{where}: {alias} is tied to {name}, which is not a stored tensor.")


def _shared(spans: Sequence[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """The first `(file, start, stop)` that lies in two of the `(file, begin, end)`."""
    table = np.array(spans, np.int64).reshape(-1, 3)
    file, begin, end = table[table[:, 2] > table[:, 1]].T
    order = np.lexsort((end, begin, file))
    file, begin, end = file[order], begin[order], end[order]
    bad = np.flatnonzero((file[1:] == file[:-1]) & (begin[1:] < end[:-1]))
    return (int(file[bad[0]]), int(begin[bad[0] + 1]), int(end[bad[0]])) if len(bad) else None


def _holders(manifest: Manifest, span: tuple[int, int, int]) -> list[str]:
    """The tensors, one of them perhaps twice, of the two chunks that meet at a shared byte range."""
    held = [
        (c.begin, c.begin + volume(c.box.size) * ITEMSIZE[t.dtype], name)
        for name, t in manifest.tensors.items()
        for c in t.chunks
        if c.file == span[0]
    ]
    return [name for begin, end, name in sorted(held) if begin <= span[1] < end][-2:]


def check_tiling(name: str, shape: Sequence[int], boxes: Sequence[Box], where: str) -> None:
    """Raise CorruptError unless the boxes tile the tensor exactly."""
    if len(boxes) == 1 and boxes[0].size == shape and not any(boxes[0].offset) and len(boxes[0].offset) == len(shape):
        return
    flaw = find_flaw(shape, boxes)
    if flaw is None:
        return
    said = {"gap": "no chunk covers", "overlap": "more than one chunk covers", "outside": "a chunk lies outside the tensor at"}
    raise CorruptError(f"{where}: {name} {list(shape)}: {said[flaw.kind]} {flaw.box}.")


def read(disk: Disk, root: Path) -> Manifest:
    """Read and check the manifest of a checkpoint directory."""
    path = root / MANIFEST
    return load(disk.read_file(path, MAX_MANIFEST), str(path))
