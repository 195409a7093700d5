"""Opening what exists: a checkpoint of ours, or a Hugging Face folder, as one Manifest and files that are checked when they are opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from meshpar.checkpoint.format import manifest as manifests
from meshpar.checkpoint.format.boxes import whole
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import MAX_HEADER, Disk, Header, check_name, parse_json, read_header
from meshpar.checkpoint.format.handles import Handles
from meshpar.checkpoint.format.manifest import MANIFEST, Asset, FileRecord, Manifest
from meshpar.checkpoint.format.table import Chunk, Stored, Table
from meshpar.errors import ConfigError, near

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ASSETS = "assets"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".distcp", ".npz")
MAX_ASSET = 1 << 30
_MAX_INDEX = 1 << 28


@dataclass(frozen=True)
class Checkpoint:
    """A directory on disk and what it holds. `form` is "meshpar", "hf" or "dcp"."""

    root: Path
    manifest: Manifest
    form: str

    def path(self, file: int) -> Path:
        """Where a data file lies."""
        return self.root / self.manifest.files[file].name

    def asset_path(self, asset: Asset) -> Path:
        return self.root / ASSETS / asset.name if self.form == "meshpar" else self.root / asset.name


def near_path(path: Path) -> str:
    """A sentence with what is there of nearly the same name, or nothing."""
    return near(path.name, sorted(each.name for each in path.parent.iterdir())) if path.parent.is_dir() else ""


def open_checkpoint(path: Path, disk: Disk | None = None) -> Checkpoint:
    """Open a checkpoint directory of ours, a Hugging Face folder, or one safetensors file.

    Raises CorruptError for anything that is not whole, and says what is missing; tensor bytes are not read.
    """
    disk = disk or Disk()
    if path.is_file():
        return _open_hf(disk, path.parent, path.name, [path.name], None, with_assets=False)
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist.{near_path(path)}")
    if (path / MANIFEST).is_symlink() or (path / MANIFEST).exists():
        return Checkpoint(path, manifests.read(disk, path), "meshpar")
    if (path / INDEX).exists():
        return _open_index(disk, path)
    singles = sorted(p.name for p in path.glob("*.safetensors"))
    if SINGLE in singles or len(singles) == 1:
        name = SINGLE if SINGLE in singles else singles[0]
        if len(singles) > 1:
            raise CorruptError(f"{path} holds {', '.join(singles)} and no {INDEX}: which of them belong together is unknown.")
        return _open_hf(disk, path, name, [name], None, with_assets=True)
    if (path / ".metadata").exists():
        raise ConfigError(
            f"{path} is a torch.distributed.checkpoint: convert it with `meshpar checkpoint from-dcp {path} DST --trust-pickle`."
        )
    if singles:
        raise CorruptError(
            f"{path} holds {len(singles)} safetensors files but neither {MANIFEST} nor {INDEX}: which belong together is unknown."
        )
    raise CorruptError(f"{path} holds no checkpoint: no {MANIFEST}, no {INDEX}, no {SINGLE}.")


def _open_index(disk: Disk, root: Path) -> Checkpoint:
    where = str(root / INDEX)
    body = parse_json(disk.read_file(_inside(root, INDEX), _MAX_INDEX, follow=True), where)
    table = body.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CorruptError(f"{where} has no weight_map.")
    files = sorted({check_name(name, where) for name in table.values()})
    return _open_hf(disk, root, where, files, table, with_assets=True)


def _open_hf(disk: Disk, root: Path, where: str, files: Sequence[str], table: Mapping[str, str] | None, *, with_assets: bool) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    records = []
    for index, name in enumerate(files):
        path = _inside(root, name)
        fd = disk.open_file(path, follow=True)
        try:
            header = read_header(disk, fd, str(path))
            records.append(FileRecord(name, os.fstat(fd).st_size, header.length, header.crc))
        finally:
            os.close(fd)
        _add(tensors, header, index, name, table, where)
    if table is not None:
        missing = [f"{t} (expected in {f})" for t, f in table.items() if t not in tensors]
        if missing:
            raise CorruptError(f"{where} names {len(missing)} tensors that its files do not hold: {', '.join(missing[:5])}.")
    assets = tuple(_assets(root)) if with_assets else ()
    return Checkpoint(root, Manifest(Table.of(tensors), tuple(records), assets=assets), "hf")


def _add(tensors: dict[str, Stored], header: Header, index: int, name: str, table: Mapping[str, str] | None, where: str) -> None:
    if "DCP_SHARDING_INFO" in header.metadata:
        raise CorruptError(f"{name} is one shard of a distributed checkpoint; without its {MANIFEST} its tensors are only parts.")
    for entry in header.entries:
        if entry.name in tensors:
            raise CorruptError(f"{where}: tensor {entry.name} occurs in two files.")
        if table is not None and table.get(entry.name) != name:
            raise CorruptError(f"{name} holds {entry.name}, which {where} does not place there: the folder mixes two exports.")
        tensors[entry.name] = Stored(entry.dtype, entry.shape, (Chunk(whole(entry.shape), index, entry.begin),))


def _assets(root: Path) -> Iterator[Asset]:
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or is_weights(path.name):
            continue
        try:
            info = _inside(root, path.name).stat()
        except CorruptError:
            continue
        if stat.S_ISREG(info.st_mode) and info.st_size <= MAX_ASSET:
            yield Asset(path.name, info.st_size)


def is_weights(name: str) -> bool:
    """Whether a file of this name in a folder would be taken for a part of its weights."""
    return name.endswith(_WEIGHTS)


def _inside(root: Path, name: str) -> Path:
    """A file of a Hugging Face folder. Links are how its cache is built: they may lead into the folder or to the cache's own blobs only."""
    path = root / check_name(name, str(root))
    if not path.is_symlink():
        return path
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        return target
    raise CorruptError(f"{path} is a symbolic link to {target}, outside the folder: refused.")


class Pool:
    """The open data files of one checkpoint. Every file is checked against the manifest, size and header, when it is opened."""

    def __init__(self, checkpoint: Checkpoint, disk: Disk) -> None:
        self._checkpoint, self._disk = checkpoint, disk
        self._checked: set[int] = set()
        self._handles = Handles(self._fresh)

    def use(self, file: int) -> AbstractContextManager[int]:
        """A descriptor of a data file."""
        return self._handles.use(file)

    def close(self) -> None:
        self._handles.close()

    def name(self, file: int) -> str:
        return str(self._checkpoint.path(file))

    def _fresh(self, file: int) -> int:
        record, path = self._checkpoint.manifest.files[file], self._checkpoint.path(file)
        if self._checkpoint.form == "hf":
            path = _inside(self._checkpoint.root, record.name)
        fd = self._disk.open_file(path, follow=self._checkpoint.form == "hf")
        try:
            if file not in self._checked:
                self._check(fd, record, path)
                self._checked.add(file)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int, record: FileRecord, path: Path) -> None:
        size = os.fstat(fd).st_size
        if size != record.size:
            raise CorruptError(
                f"{path} has {size} bytes, it should have {record.size}: it is {'truncated' if size < record.size else 'too long'}."
            )
        if record.header_crc is None:
            return
        if record.header > min(size, MAX_HEADER + 8):
            raise CorruptError(f"{path}: a header of {record.header} bytes is refused.")
        head = bytearray(record.header)
        self._disk.read(fd, [memoryview(head)], 0)
        if crc32(head) != record.header_crc:
            raise CorruptError(
                f"{path} bytes 0..{record.header}: the header is not the one written here: changed, or swapped with another file."
            )
