"""torch.distributed.checkpoint directories in and out.

Reading needs `trust_pickle`, since `.metadata` is a pickle. Even then nothing in it runs: the unpickler knows a dozen names, all of
them stand-ins of ours, and refuses every other one. Tensors lie in `.distcp` files as small zip archives, stored and not compressed, so
their bytes are read in place, as chunks like any others, and checked against the checksums of the archives. Writing uses torch itself
for the pickles.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshpar.checkpoint.convert.execution import How, Progress, Report, execute
from meshpar.checkpoint.convert.resharding import divide, new_target, with_dtype
from meshpar.checkpoint.convert.work import build
from meshpar.checkpoint.format import manifest as manifests
from meshpar.checkpoint.format.boxes import Box, volume
from meshpar.checkpoint.format.casts import TORCH_DTYPES
from meshpar.checkpoint.format.division import Grid
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.format.files import BLOCK, ITEMSIZE, Disk, check_name, check_tensor_name
from meshpar.checkpoint.format.manifest import MANIFEST, FileRecord, Manifest
from meshpar.checkpoint.format.opened import Checkpoint, near_path, open_checkpoint
from meshpar.checkpoint.format.partial import writing
from meshpar.checkpoint.format.sink import rank_sink
from meshpar.checkpoint.format.table import Chunk, Stored, Table
from meshpar.checkpoint.move.jobs import slabs
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.names import keymap as keymaps
from meshpar.checkpoint.names import rules as keyrules
from meshpar.collection import uncollected
from meshpar.errors import ConfigError

METADATA = ".metadata"
_MAX_METADATA = 1 << 30
_STORAGES = "Bool Byte Char Short Int Long Half BFloat16 Float Double ComplexFloat Untyped"


class _Record:
    """A stand-in for a class of torch: takes its state, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or key not in state:
            raise CorruptError(f"{METADATA}: a record without {key}.")
        return state[key]

    def __hash__(self) -> int:
        return id(self)


class _Index(_Record):
    """MetadataIndex: a dictionary key, hashed before its state arrives."""


class _Tensor(_Record):
    """TensorStorageMetadata."""


class _Bytes(_Record):
    """BytesStorageMetadata."""


@dataclass(frozen=True)
class _View:
    """A tensor in a torch.save archive: its dtype, and which elements of which storage it shows."""

    dtype: str
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _path(*parts: str) -> str:
    return "/".join(map(str, parts))


def _size(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> _View:
    dtype, key = storage
    if len(rest) > 2 and isinstance(rest[2], str):
        dtype = rest[2]
    return _View(dtype, key, offset, tuple(size), tuple(stride))


_META = "torch.distributed.checkpoint.metadata"
_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    (_META, "Metadata"): _Record,
    (_META, "TensorStorageMetadata"): _Tensor,
    (_META, "BytesStorageMetadata"): _Bytes,
    (_META, "ChunkStorageMetadata"): _Record,
    (_META, "TensorProperties"): _Record,
    (_META, "MetadataIndex"): _Index,
    (_META, "StorageMeta"): _Record,
    (_META, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): _size,
    ("pathlib", "PosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
}
_SCALARS: Mapping[tuple[str, str], Callable[..., Any]] = {("collections", "OrderedDict"): OrderedDict}


class _Unpickler(pickle.Unpickler):
    """Knows stand-ins only; any other name ends it."""

    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._where = known, where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if self._known is _KNOWN and module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if self._known is _KNOWN and module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES.split():
            return name
        raise CorruptError(f"{self._where}: the pickle asks for {module}.{name}, which is refused.")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """A storage: its dtype and the name of its member in the archive."""
        kind, storage, key = pid[:3]
        if kind != "storage":
            raise CorruptError(f"{self._where}: unknown persistent object.")
        return _STORAGE_DTYPES.get(str(storage), "U8"), str(key)


_STORAGE_DTYPES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}


def _unpickle(data: bytes, known: Mapping[tuple[str, str], Any], where: str) -> Any:
    try:
        return _Unpickler(data, known, where).load()
    except CorruptError:
        raise
    except Exception as error:
        raise CorruptError(f"{where} cannot be read: {error!r}") from None


@uncollected()
def from_dcp(
    source: Path | str,
    target: Path | str,
    mesh: str | Grid | None = None,
    *,
    trust_pickle: bool = False,
    model_prefix: str = "",
    skip_objects: bool = False,
    plan: Path | str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Report:
    """Read a torch.distributed.checkpoint directory into a checkpoint of ours, in bounded memory and without torch.

    Tensors under `model_prefix` are the model's and lose the prefix; others keep their names. Plain values (numbers, strings,
    lists, dicts) are stored beside them; other Python objects are an error, or left out with `skip_objects`.
    """
    if (Path(source) / MANIFEST).exists():
        raise ConfigError(f"{source} is a meshpar checkpoint already; use `meshpar checkpoint reshard`.")
    if not Path(source).is_dir():
        raise ConfigError(f"{source} is not a directory.{near_path(Path(source))}")
    if not trust_pickle:
        raise ConfigError(f"{source} holds pickles. They are read by an unpickler that runs nothing; to allow that, add --trust-pickle.")
    how = How(options or Options(), disk or Disk(), resume, dry_run, progress)
    opened, objects, odd = open_dcp(Path(source), how.disk)
    if odd and not skip_objects:
        raise ImpossibleError(f"{len(odd)} objects are not plain values: {', '.join(odd[:5])}. Leave them out with --skip-objects.")
    path = new_target(target, resume)
    tensors = opened.manifest.tensors.each(lambda g: (g.dtype, g.shape))
    rules = keyrules.parse([f"{model_prefix}{{rest*}} -> {{rest*}}"]) if model_prefix else ()
    mapped = keymaps.apply(rules, tensors) if rules else keymaps.identity(tensors)
    kinds = {name: _kind(source, model_prefix) for name, source in mapped.sources.items()}
    mapped = with_dtype(mapped, kinds, dtype)
    division = divide(mapped.tensors, kinds, Grid.parse(mesh) if isinstance(mesh, str) else mesh, plan, {})
    sink = rank_sink(mapped.tensors, division, kinds)
    notes = [f"left out: {', '.join(odd)}"] if odd else []
    values = {"objects": objects} if objects else {}
    work = build(opened, path, "meshpar", mapped, sink, division, values=values, keymap=mapped.rules, notes=notes)
    return execute(work, how)


def _kind(name: str, model_prefix: str) -> str:
    return "model" if name.startswith(model_prefix) else "extra"


def open_dcp(root: Path, disk: Disk) -> tuple[Checkpoint, dict[str, Any], list[str]]:
    """A torch.distributed.checkpoint directory as a checkpoint; its plain values; the names of objects that are not plain."""
    where = str(root / METADATA)
    meta = _unpickle(disk.read_file(root / METADATA, _MAX_METADATA), _KNOWN, where)
    try:
        records, table = meta.get("state_dict_metadata"), meta.get("storage_data")
        places = [(index.get("fqn"), index.state.get("offset"), info) for index, info in table.items()]
    except (AttributeError, TypeError) as error:
        raise CorruptError(f"{where} is malformed: {error!r}") from None
    names = sorted({check_name(info.get("relative_path"), where) for _, _, info in places})
    reader = _Archives(root, names, disk)
    try:
        return _collect(root, records, places, reader, where)
    finally:
        reader.close()


def _collect(root: Path, records: Any, places: list[Any], reader: _Archives, where: str) -> tuple[Checkpoint, dict[str, Any], list[str]]:
    chunks: dict[str, list[tuple[str, Chunk]]] = {}
    objects: dict[str, Any] = {}
    odd = []
    for name, offset, info in places:
        check_tensor_name(name, where)
        if info.state.get("transform_descriptors"):
            raise ImpossibleError(f"{name} was saved with transforms (compression), which from-dcp does not read.")
        if isinstance(records.get(name), _Bytes):
            try:
                objects[name] = json.loads(json.dumps(reader.value(info, name), allow_nan=False))
            except (CorruptError, TypeError, ValueError):
                odd.append(name)
            continue
        chunks.setdefault(name, []).append(reader.chunk(info, name, tuple(offset or ())))
    tensors = {}
    for name, record in records.items():
        if not isinstance(record, _Tensor):
            continue
        shape, dtype = tuple(record.get("size")), record.get("properties").state[0]
        rows = chunks.get(name, [])
        if any(d != dtype for d, _ in rows):
            raise CorruptError(f"{where}: {name} is {dtype}, but its chunks are {', '.join(sorted({d for d, _ in rows}))}.")
        tensors[name] = Stored(dtype, shape, tuple(c for _, c in rows))
    longest = max((t.nbytes for t in tensors.values()), default=0)  # an archive has one checksum of all the bytes of a chunk
    manifest = Manifest(Table.of(tensors), reader.records(), block=max(BLOCK, longest))
    manifests.check(manifest, where)
    return Checkpoint(root, manifest, "dcp"), objects, odd


class _Archives:
    """The `.distcp` files: finds where in them the bytes of each item lie."""

    def __init__(self, root: Path, names: list[str], disk: Disk) -> None:
        self._names, self._root = names, root
        self._files = [os.fdopen(disk.open_file(root / name), "rb") for name in names]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def records(self) -> tuple[FileRecord, ...]:
        return tuple(FileRecord(name, os.fstat(f.fileno()).st_size) for name, f in zip(self._names, self._files, strict=True))

    def _zip(self, info: Any, name: str) -> tuple[zipfile.ZipFile, int, int]:
        index, offset, length = self._names.index(info.get("relative_path")), info.get("offset"), info.get("length")
        size = os.fstat(self._files[index].fileno()).st_size
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= size:
            raise CorruptError(f"{self._names[index]}: {name} should lie at bytes {offset}+{length}, the file has {size}.")
        try:
            return zipfile.ZipFile(_Window(self._files[index], offset, length)), index, offset
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise CorruptError(f"{self._names[index]}, {name}: {error}") from None

    def _member(self, archive: zipfile.ZipFile, ending: str, name: str) -> zipfile.ZipInfo:
        found = [i for i in archive.infolist() if i.filename.partition("/")[2] == ending]
        if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size != found[0].compress_size:
            raise CorruptError(f"{name}: its archive has no plain member {ending}.")
        return found[0]

    def value(self, info: Any, name: str) -> Any:
        """A plain value; any class in its pickle is refused."""
        archive, _, _ = self._zip(info, name)
        with archive:
            return _unpickle(self._small(archive, "data.pkl", name), _SCALARS, name)

    def _small(self, archive: zipfile.ZipFile, ending: str, name: str) -> bytes:
        member = self._member(archive, ending, name)
        if member.file_size > 1 << 24:
            raise CorruptError(f"{name}: {ending} has {member.file_size} bytes.")
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise CorruptError(f"{name}: {error}") from None

    def chunk(self, info: Any, name: str, offset: tuple[int, ...]) -> tuple[str, Chunk]:
        """The dtype and the place of a tensor's bytes."""
        archive, index, start = self._zip(info, name)
        with archive:
            view = _unpickle(self._small(archive, "data.pkl", name), _KNOWN, name)
            if not isinstance(view, _View) or view.offset or not _is_dense(view):
                raise ImpossibleError(f"{name}: only dense tensors with a storage of their own are read.")
            if any(i.filename.endswith("/byteorder") for i in archive.infolist()) and self._small(archive, "byteorder", name) != b"little":
                raise ImpossibleError(f"{name}: was saved big-endian.")
            member = self._member(archive, f"data/{view.key}", name)
        head = os.pread(self._files[index].fileno(), 30, start + member.header_offset)
        if len(head) != 30 or head[:4] != b"PK\x03\x04" or member.file_size < volume(view.shape) * ITEMSIZE[view.dtype]:
            raise CorruptError(f"{self._names[index]}: the bytes of {name} are not where its archive says.")
        begin = start + member.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        is_all = 0 < member.file_size == volume(view.shape) * ITEMSIZE[view.dtype]
        return view.dtype, Chunk(Box(offset, view.shape), index, begin, (member.CRC,) if is_all else ())


def _is_dense(view: _View) -> bool:
    step = 1
    for n, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if n > 1 and stride != step:
            return False
        step *= n
    return True


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._fd, self._start, self._length, self._at = file.fileno(), start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        data = os.pread(self._fd, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data


def to_dcp(
    source: Path | str,
    target: Path | str,
    *,
    model_prefix: str = "",
    options: Options | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    disk: Disk | None = None,
) -> Report:
    """Write a directory that `torch.distributed.checkpoint.load` reads, one file per rank of the source's mesh, chunk by chunk.

    Tensors keep their names, the model's with `model_prefix` in front. Needs torch, which writes the pickles.
    """
    options, disk = options or Options(), disk or Disk()
    began = time.monotonic()
    opened = open_checkpoint(Path(source), disk)
    path = new_target(target, False)
    m = opened.manifest
    files = max(m.grid.size, 1)
    note = ["values beside the tensors are not part of it"] if m.values else []
    report = Report(str(opened.root), str(path), str(m.grid), len(m.tensors), m.nbytes, files, 0, dry_run=dry_run, notes=tuple(note))
    if dry_run:
        return report
    with writing(path, "to-dcp", disk) as partial:
        written = _write_dcp(opened, partial.path, files, model_prefix, options, disk, progress)
        partial.commit()
    seconds = round(time.monotonic() - began, 3)
    return Report(**{**report.to_json(), "bytes_read": m.nbytes, "bytes_written": written, "seconds": seconds})


def _write_dcp(opened: Checkpoint, root: Path, files: int, prefix: str, options: Options, disk: Disk, progress: Progress | None) -> int:
    import torch
    from torch.distributed.checkpoint import metadata as meta

    from meshpar._torch import dcp_storage_info

    m = opened.manifest
    records: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    ends = [0] * files
    handles = [disk.create(root / f"__{k}_0.distcp", 0) for k in range(files)]
    done = 0
    try:
        with Reader(opened, disk) as reader:
            for name, stored in m.tensors.items():
                fqn = prefix + name if stored.kind == "model" else name
                if fqn in records:
                    raise ImpossibleError(f"Two tensors would be called {fqn}; choose another model_prefix.")
                dtype = getattr(torch, next(t for t, s in TORCH_DTYPES.items() if s == stored.dtype))
                chunks: list[meta.ChunkStorageMetadata] = []
                for k, box in _dcp_boxes(stored, options):
                    data, k = _archive(reader, name, box, dtype), k % files
                    disk.write(handles[k], [memoryview(data)], ends[k])
                    info = dcp_storage_info(f"__{k}_0.distcp", ends[k], len(data))
                    storage[meta.MetadataIndex(fqn, box.offset, len(chunks))] = info
                    chunks.append(meta.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)))
                    ends[k] += len(data)
                    done += volume(box.size) * ITEMSIZE[stored.dtype]
                    if progress:
                        progress(done, m.nbytes)
                records[fqn] = meta.TensorStorageMetadata(meta.TensorProperties(dtype=dtype), torch.Size(stored.shape), chunks)
        for handle in handles:
            disk.sync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    metadata = meta.Metadata(records, {fqn: (fqn,) for fqn in records}, storage, meta.StorageMeta(), "1.0.0")
    disk.write_file(root / METADATA, pickle.dumps(metadata))
    return sum(ends)


def _dcp_boxes(stored: Stored, options: Options) -> Iterator[tuple[int, Box]]:
    """The chunks of a tensor with their file, cut to an eighth of the memory allowed: building an archive takes several times its size."""
    limit = max(options.memory // 8, 1 << 16)
    for chunk in stored.chunks:
        for part in slabs(chunk.box.size, ITEMSIZE[stored.dtype], limit):
            yield chunk.file, Box(tuple(a + b for a, b in zip(part.offset, chunk.box.offset, strict=True)), part.size)


def _archive(reader: Reader, name: str, box: Box, dtype: Any) -> bytes:
    import torch

    words = reader.read(name, box)
    flat = torch.frombuffer(bytearray(words.tobytes()), dtype=torch.uint8) if words.nbytes else torch.empty(0, dtype=torch.uint8)
    out = io.BytesIO()
    torch.save(flat.view(dtype).reshape(box.size), out)
    return out.getvalue()
