"""The manifest: one JSON file, written last, that says what a checkpoint holds and where every byte of it lies.

    {"crc32": "1c291ca3", "format": "meshpar.checkpoint", "version": 2, "mesh": "pp=2,tp=2", "block": 8388608,
     "files":   [["rank-00000.safetensors", size, header bytes, header crc32], ...],
     "assets":  [["config.json", size, [crc32, ...]], ...],
     "names":   ["layers.0.weight", "layers.1.weight", ...],
     "tensors": [{"dtype": "BF16", "shape": [64, 32], "kind": "model", "cuts": [["tp", 0, 1, [[64, 1]]]], "stage": 0,
                  "boxes": [[offset, size], ...], "blocks": [checksums of each box, ...],
                  "position": u32, "file": u32, "begin": u64, "crc32": u32}, ...],
     "aliases": {"lm_head.weight": "embed.weight"}, "values": {...}, "keymap": [...], "origin": "fingerprint of what it was made from"}

An entry of "tensors" is what `table.Alike` is: many tensors that are divided alike. Its last four are columns of numbers, little-endian, in
base64: the positions of the tensors among the names; of every box of the first tensor, then of the second, ..., the file, the first byte,
and the crc32 of its blocks. Version 1, an object for each tensor, is still read.

The first crc32 covers the rest of the manifest. Reading checks everything that can be checked without reading tensors: types, names,
byte ranges against file sizes, and that the chunks tile each tensor exactly. Only files named here are ever opened.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from meshpar.checkpoint.format.boxes import Box, find_flaw
from meshpar.checkpoint.format.division import ONE_RANK, Grid, layout_from_json, layout_to_json
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import (
    BLOCK,
    Disk,
    check_dtype,
    check_name,
    check_shape,
    check_tensor_name,
    check_tensor_names,
    parse_json,
)
from meshpar.checkpoint.format.table import Alike, Chunk, Chunks, Ints, Stored, Table
from meshpar.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT, VERSION = "meshpar.checkpoint", 2
KINDS = ("model", "optimizer", "extra", "rank")
MAX_MANIFEST = 1 << 30
_LIMIT = 1 << 62
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


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint, without its bytes."""

    tensors: Table
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
        return self.tensors.nbytes

    @property
    def has_checksums(self) -> bool:
        """Whether there are checksums of every byte."""
        groups = self.tensors.groups
        return all(blocks or not prod(box.size) for g in groups for box, blocks in zip(g.chunks.boxes, g.chunks.blocks, strict=True))


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
        "names": manifest.tensors.names,
        "tensors": [_alike_to_json(g) for g in manifest.tensors.groups],
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


def _alike_to_json(group: Alike) -> dict[str, Any]:
    chunks = group.chunks
    return {
        "dtype": group.dtype,
        "shape": group.shape,
        "kind": group.kind,
        **layout_to_json(group.layout),
        "boxes": chunks.boxes,
        "blocks": chunks.blocks,
        "position": _pack(group.position, "<u4"),
        "file": _pack(chunks.file, "<u4"),
        "begin": _pack(chunks.begin, "<u8"),
        "crc32": _pack(chunks.crcs, "<u4"),
    }


def _pack(column: np.ndarray[Any, Any], dtype: str) -> str:
    return base64.b64encode(column.astype(dtype).tobytes()).decode()


def load(data: bytes, where: str) -> Manifest:
    """Parse a manifest and prove it consistent. Raises CorruptError with the file, tensor and range at fault."""
    if data[:10] != _BLANK[:10] or data[: len(_BLANK)] != _stamp(_BLANK + data[len(_BLANK) :]):
        raise CorruptError(f"{where}: the manifest's own crc32 does not match: it was changed or cut short.")
    body = parse_json(data, where)
    version = body.get("version")
    if body.get("format") != FORMAT or type(version) is not int or version not in _TABLES:
        known = " and ".join(map(str, _TABLES))
        raise CorruptError(f"{where}: format {body.get('format')!r} version {version!r}; this release reads {FORMAT} {known}.")
    try:
        manifest = _from_json(body, _TABLES[version](body, where), where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{where} is malformed: {error!r}") from None
    check(manifest, where)
    return manifest


def _from_json(body: dict[str, Any], tensors: Table, where: str) -> Manifest:
    files = tuple(FileRecord(check_name(name, where), _count(size), _count(head), _count(crc)) for name, size, head, crc in body["files"])
    assets = tuple(Asset(check_name(name, where), _count(size), tuple(map(_count, crcs))) for name, size, crcs in body["assets"])
    aliases = {check_tensor_name(k, where): check_tensor_name(v, where) for k, v in body["aliases"].items()}
    block, origin, keymap = _count(body["block"]), body["origin"], body["keymap"]
    if not block or not isinstance(origin, str) or not isinstance(keymap, list) or not all(isinstance(k, str) for k in keymap):
        raise ValueError("block, origin or keymap")
    return Manifest(tensors, files, Grid.parse(body["mesh"]), assets, aliases, dict(body["values"]), tuple(keymap), origin, block)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _table(body: dict[str, Any], where: str) -> Table:
    names = check_tensor_names(body["names"], where)
    groups = [_alike(row, names, where) for row in body["tensors"]]
    seen = np.bincount(np.concatenate([np.zeros(0, np.int64), *(g.position for g in groups)]), minlength=len(names))
    for at in np.flatnonzero(seen != 1)[:1].tolist():
        raise CorruptError(f"{where}: {names[at]} is described {seen[at]} times.")
    return Table(names, groups)


def _alike(row: Any, names: Sequence[str], where: str) -> Alike:
    position = _unpack(row["position"], "<u4", None, f"{where}, position")
    if not len(position) or int(position.max()) >= len(names):
        raise CorruptError(f"{where}: a group of tensors names none, or more than there are.")
    at = f"{where}, {names[position[0]]}"
    count, boxes = len(position), tuple(_box(box) for box in row["boxes"])
    blocks = tuple(map(_count, row["blocks"]))
    if len(blocks) != len(boxes):
        raise CorruptError(f"{at}: {len(blocks)} numbers of checksums for {len(boxes)} chunks.")
    file = _unpack(row["file"], "<u4", (count, len(boxes)), f"{at}, file")
    begin = _unpack(row["begin"], "<u8", (count, len(boxes)), f"{at}, begin")
    crcs = _unpack(row["crc32"], "<u4", (count, sum(blocks)), f"{at}, crc32").astype(np.uint32)
    chunks = Chunks(boxes, file, begin, blocks, crcs)
    return Alike(check_dtype(row["dtype"], at), check_shape(row["shape"], at), _kind(row), layout_from_json(row, at), position, chunks)


def _kind(row: Any) -> str:
    kind = row["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind {str(kind)[:40]!r}")
    return str(kind)


def _box(row: Any) -> Box:
    offset, size = row
    if len(offset) != len(size):
        raise ValueError(f"a chunk at {str(offset)[:40]} of size {str(size)[:40]}")
    return Box(tuple(map(_count, offset)), tuple(map(_count, size)))


def _unpack(text: Any, dtype: str, shape: tuple[int, ...] | None, what: str) -> Ints:
    """A column of numbers; of any length without a shape. What it takes in memory is in proportion to the text."""
    try:
        data = base64.b64decode(text if isinstance(text, str) else b"?", validate=True)
    except ValueError as error:
        raise CorruptError(f"{what}: not base64: {error}") from None
    item = np.dtype(dtype).itemsize
    if len(data) % item if shape is None else len(data) != prod(shape) * item:
        wanted = "whole numbers" if shape is None else f"{prod(shape)}"
        raise CorruptError(f"{what}: {len(data)} bytes do not hold {wanted} of {item} bytes.")
    numbers = np.frombuffer(data, dtype)
    if len(numbers) and int(numbers.max()) >= _LIMIT:
        raise CorruptError(f"{what}: {int(numbers.max())} is not a count.")
    return numbers.astype(np.int64).reshape(-1 if shape is None else shape)


def _table_1(body: dict[str, Any], where: str) -> Table:
    """Version 1: `"tensors": {name: {"dtype", "shape", "kind", "cuts", "stage", "chunks": [[offset, size, file, begin, crcs], ...]}}`."""
    return Table.of({check_tensor_name(name, where): _stored_1(row, f"{where}, {name!r}") for name, row in body["tensors"].items()})


def _stored_1(row: Any, where: str) -> Stored:
    chunks = []
    for offset, size, file, begin, crcs in row["chunks"]:
        if any(_count(crc) >> 32 for crc in crcs):
            raise ValueError("a checksum has more than 32 bits")
        chunks.append(Chunk(_box((offset, size)), _count(file), _count(begin), tuple(crcs)))
    shape = check_shape(row["shape"], where)
    return Stored(check_dtype(row["dtype"], where), shape, tuple(chunks), _kind(row), layout_from_json(row, where))


_TABLES = {1: _table_1, VERSION: _table}


def check(manifest: Manifest, where: str) -> None:
    """Prove that the chunks tile every tensor, lie inside their files, and that no two share a byte."""
    names = [f.name for f in manifest.files]
    if len(set(names)) != len(names):
        raise CorruptError(f"{where}: a file is listed twice.")
    if sum(f.size for f in manifest.files) >= _LIMIT:
        raise CorruptError(f"{where}: files of {sum(f.size for f in manifest.files)} bytes are refused.")
    for g in manifest.tensors.groups:
        check_tiling(manifest.tensors.names[g.position[0]], g.shape, g.chunks.boxes, where)
        _check_places(manifest, g, where)
    _check_shared(manifest, where)
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CorruptError(f"{where}: {alias} is tied to {name}, which is not a stored tensor.")


def _check_places(manifest: Manifest, group: Alike, where: str) -> None:
    """Every chunk ends inside its file, and has a checksum for each of its blocks, or none."""
    chunks, nbytes = group.chunks, group.chunks.nbytes(group.dtype)
    sizes = np.array([f.size for f in manifest.files] + [-1], np.int64)  # a file that is not there has no room
    room = sizes[np.minimum(chunks.file, len(manifest.files))]
    outside = chunks.begin > room - nbytes
    for row, k in np.argwhere(outside)[:1].tolist() if outside.any() else ():
        name, end, file = manifest.tensors.names[group.position[row]], chunks.begin[row, k] + nbytes[k], chunks.file[row, k]
        raise CorruptError(f"{where}: {name} {chunks.boxes[k]} should end at byte {end} of file {file}, past its end.")
    for box, count, size in zip(chunks.boxes, chunks.blocks, nbytes.tolist(), strict=True):
        if count and count != -(-size // manifest.block):
            name = manifest.tensors.names[group.position[0]]
            raise CorruptError(f"{where}: {name} {box} has {count} checksums for {size} bytes.")


def _check_shared(manifest: Manifest, where: str) -> None:
    """No byte belongs to two chunks: as if the files lay one after the other, every chunk must end before the next one begins."""
    base = np.cumsum([0, *(f.size for f in manifest.files)], dtype=np.int64)
    begins, ends, holders = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for g in manifest.tensors.groups:
        for k, nbytes in enumerate(g.chunks.nbytes(g.dtype).tolist()):
            if nbytes:
                begins.append(base[g.chunks.file[:, k]] + g.chunks.begin[:, k])
                ends.append(begins[-1] + nbytes)
                holders.append(g.position)
    begin, end, holder = np.concatenate(begins), np.concatenate(ends), np.concatenate(holders)
    order = np.argsort(begin, kind="stable")  # mostly rows that are sorted already, one after the other
    begin, end, holder = begin[order], end[order], holder[order]
    for at in np.flatnonzero(begin[1:] < end[:-1])[:1].tolist():
        file = int(np.searchsorted(base, begin[at], "right")) - 1
        one, other = sorted(manifest.tensors.names[p] for p in holder[at : at + 2])
        start, stop = begin[at + 1] - base[file], min(end[at], end[at + 1]) - base[file]
        raise CorruptError(f"{where}: {one} and {other} share bytes {start}..{stop} of {manifest.files[file].name}.")


def check_tiling(name: str, shape: Sequence[int], boxes: Sequence[Box], where: str) -> None:
    """Raise CorruptError unless the boxes tile the tensor exactly."""
    flaw = find_flaw(shape, boxes)
    if flaw is None:
        return
    said = {"gap": "no chunk covers", "overlap": "more than one chunk covers", "outside": "a chunk lies outside the tensor at"}
    raise CorruptError(f"{where}: {name} {list(shape)}: {said[flaw.kind]} {flaw.box}.")


def read(disk: Disk, root: Path) -> Manifest:
    """Read and check the manifest of a checkpoint directory."""
    path = root / MANIFEST
    return load(disk.read_file(path, MAX_MANIFEST), str(path))
