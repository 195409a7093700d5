"""Safetensors headers and sequential I/O: every number in a header is checked before anything is allocated.

A safetensors file is 8 bytes of header length, a JSON header, and the bytes of the tensors without holes:

    | u64 n | {"name": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, ...} | bytes |

`Disk` is the only door to the file system; tests put a failing one in its place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

from meshpar.checkpoint.format.faults import CorruptError

ITEMSIZE: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
MAX_DIMS = 64
BLOCK = 8 << 20  # bytes per crc32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
_IOV = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file; `begin` is the absolute byte offset in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it contains, after every check."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    length: int
    crc: int


class Disk:
    """Every system call a checkpoint makes, one method each. `step` is called before each; a test may count, fail or die there."""

    def step(self, what: str) -> None:
        """Before every call that touches the disk."""

    def open_file(self, path: Path, *, follow: bool = False) -> int:
        """Open a regular file for reading; a link, directory, pipe or device is refused."""
        self.step("open")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing.") from None
        except OSError as error:
            if path.is_symlink():
                raise CorruptError(f"{path} is a symbolic link; checkpoints are read from regular files only.") from None
            raise error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CorruptError(f"{path} is not a regular file.")
        return fd

    def create(self, path: Path, size: int | None, *, inside: int | None = None) -> int:
        """Open a file for writing, keep what it holds, set its size if given. `inside`: a new file of this name in an opened directory."""
        self.step("create")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        if inside is None:
            fd = os.open(path, flags, 0o644)
        else:
            fd = os.open(path.name, flags | os.O_EXCL, 0o644, dir_fd=inside)
        if size is not None:
            os.ftruncate(fd, size)
        return fd

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> None:
        """Fill the views with consecutive bytes from `offset` on."""
        self.step("read")
        _all(os.preadv, fd, views, offset, "read")

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> None:
        """Write the views one after the other from `offset` on."""
        self.step("write")
        _all(os.pwritev, fd, views, offset, "written")

    def sync(self, fd: int) -> None:
        self.step("sync")
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        self.step("sync")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        self.step("mkdir")
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        self.step("rename")
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        self.step("unlink")
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        self.step("remove")
        shutil.rmtree(path)

    def write_file(self, path: Path, data: bytes) -> None:
        """A whole small file, on the disk when this returns."""
        fd = self.create(path, 0)
        try:
            self.write(fd, [memoryview(data)], 0)
            self.sync(fd)
        finally:
            os.close(fd)

    def read_file(self, path: Path, limit: int, *, follow: bool = False) -> bytes:
        """A whole small file of at most `limit` bytes."""
        fd = self.open_file(path, follow=follow)
        try:
            size = os.fstat(fd).st_size
            if size > limit:
                raise CorruptError(f"{path} has {size} bytes; more than {limit} are refused.")
            data = bytearray(size)
            self.read(fd, [memoryview(data)], 0)
            return bytes(data)
        finally:
            os.close(fd)


def _all(call: Any, fd: int, views: Sequence[memoryview], offset: int, done: str) -> None:
    for at in range(0, len(views), _IOV):
        part = [v for v in views[at : at + _IOV] if len(v)]
        while part:
            count = call(fd, part, offset)
            if count == 0:
                raise CorruptError(f"Only part of the bytes at {offset} could be {done}: the file is shorter than it should be.")
            offset += count
            while part and count >= len(part[0]):
                count -= len(part[0])
                part.pop(0)
            if count:
                part[0] = part[0][count:]


class BlockCrc:
    """The crc32 of every block of a stream that is fed in order."""

    __slots__ = ("_block", "_crc", "_done", "_fill")

    def __init__(self, block: int = BLOCK) -> None:
        self._block, self._crc, self._fill = block, 0, 0
        self._done: list[int] = []

    def feed(self, view: memoryview) -> None:
        at, length = 0, len(view)
        while at < length:
            take = min(self._block - self._fill, length - at)
            self._crc = crc32(view[at : at + take], self._crc)
            self._fill += take
            at += take
            if self._fill == self._block:
                self._done.append(self._crc)
                self._crc = self._fill = 0

    def finish(self) -> tuple[int, ...]:
        """The checksums of all blocks, the last one possibly short."""
        return (*self._done, self._crc) if self._fill else tuple(self._done)


def check_name(name: object, where: str) -> str:
    """A file name that stays inside its directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CorruptError(f"{where}: {str(name)[:80]!r} is not accepted as a file name (letters, digits and ._+=- only, no directories).")
    return name


def check_tensor_name(name: object, where: str) -> str:
    """A tensor name that can be printed and stored."""
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or not name.isprintable() or name == "__metadata__":
        raise CorruptError(f"{where}: {str(name)[:80]!r} is not accepted as a tensor name.")
    return name


def check_tensor_names(names: object, where: str) -> tuple[str, ...]:
    """A list of tensor names, no two alike: looked at together, since there may be very many."""
    if not isinstance(names, list):
        raise CorruptError(f"{where}: the names are not a list.")
    sound = set(map(type, names)) <= {str} and "".join(names).isprintable() and "__metadata__" not in names
    if not sound or (names and not 0 < min(map(len, names)) <= max(map(len, names)) <= 1000):
        for name in names:
            check_tensor_name(name, where)
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(n for n in names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        raise CorruptError(f"{where}: tensor {twice} is named twice.")
    return tuple(names)


def check_shape(shape: object, where: str) -> tuple[int, ...]:
    """A list of plain non-negative integers whose product fits 63 bits."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or (shape and (set(map(type, shape)) != {int} or min(shape) < 0)):
        raise CorruptError(f"{where}: {str(shape)[:80]} is not a shape.")
    if prod([n or 1 for n in shape]) >= 1 << 60:
        raise CorruptError(f"{where}: a shape of {str(shape)[:80]} is refused.")
    return tuple(shape)


def check_dtype(dtype: object, where: str) -> str:
    """A dtype that safetensors defines with whole bytes."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CorruptError(f"{where}: dtype {str(dtype)[:40]!r} is not one of {', '.join(ITEMSIZE)}.")
    return dtype


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and without NaN; too deep or malformed input is refused."""
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptError(f"{where} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{where} should hold a JSON object.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {name[:80]!r} occurs twice")
    return out


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def read_header(disk: Disk, fd: int, where: str) -> Header:
    """Read and check the header of an open safetensors file.

    Raises CorruptError when the length, an offset, a shape, a dtype or a name cannot be right, or when the tensors leave holes,
    overlap, or do not end where the file ends.
    """
    size = os.fstat(fd).st_size
    first = bytearray(8)
    if size < 8:
        raise CorruptError(f"{where} has {size} bytes and no safetensors header.")
    disk.read(fd, [memoryview(first)], 0)
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER:
        raise CorruptError(
            f"{where} is no safetensors file: it would begin with a header of {length} bytes, and at most {MAX_HEADER} are accepted."
            f"{_written_by(disk, fd)}"
        )
    if 8 + length > size:
        raise CorruptError(f"{where} ends within its header, which is said to be {length} bytes long: the whole file has {size}.")
    text = bytearray(length)
    disk.read(fd, [memoryview(text)], 8)
    table = parse_json(bytes(text), f"the header of {where}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CorruptError(f"{where}: __metadata__ should map names to strings.")
    entries = sorted((_entry(name, row, where, 8 + length) for name, row in table.items()), key=lambda e: (e.begin, e.nbytes))
    _check_packed(entries, 8 + length, size, where)
    return Header(tuple(entries), metadata, 8 + length, crc32(text, crc32(first)))


def _written_by(disk: Disk, fd: int) -> str:
    """What else a file is, by its first bytes."""
    first = bytearray(4)
    disk.read(fd, [memoryview(first)], 0)
    if bytes(first) in (b"PK\3\4", b"\x80\2\x8a\n"):
        return " torch.save wrote it: load it with torch.load, and write it with safetensors.torch.save_file."
    return ""


def _entry(name: str, row: Any, where: str, base: int) -> Entry:
    at = f"{where}, tensor {name[:80]!r}"
    check_tensor_name(name, where)
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"{at}: expected dtype, shape and data_offsets.")
    dtype, shape, span = check_dtype(row["dtype"], at), check_shape(row["shape"], at), row["data_offsets"]
    if not isinstance(span, list) or len(span) != 2 or any(type(n) is not int or n < 0 for n in span):
        raise CorruptError(f"{at}: {str(span)[:80]} is not a byte range.")
    if span[1] - span[0] != prod(shape) * ITEMSIZE[dtype]:
        raise CorruptError(f"{at}: bytes {span[0]}..{span[1]} do not hold {dtype} {list(shape)}.")
    return Entry(name, dtype, shape, base + span[0])


def _check_packed(entries: Sequence[Entry], start: int, size: int, where: str) -> None:
    for entry in entries:
        if entry.begin != start:
            kind = "overlaps the tensor before it" if entry.begin < start else "leaves a hole before it"
            raise CorruptError(f"{where}, tensor {entry.name!r} at byte {entry.begin} {kind} (expected {start}).")
        start += entry.nbytes
    if start != size:
        raise CorruptError(f"{where} has {size} bytes, its header describes {start}: it is {'truncated' if size < start else 'too long'}.")


def build_header(
    names: Sequence[str], kinds: Sequence[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[int, ...], int]:
    """The header of a file with tensors of these names and `(dtype, shape)` in order: its bytes, where each begins, the file's size."""
    if len(set(names)) != len(names):
        raise CorruptError(f"Two tensors of one file are called {Counter(names).most_common(1)[0][0]!r}.")
    said = {kind: _said(*kind) for kind in set(kinds)}  # thousands of tensors have a few shapes
    table, begins, end = [], [], 0
    for name, kind in zip(map(encode_basestring, names), kinds, strict=True):
        text, nbytes = said[kind]
        begins.append(end)
        table.append(f"{name}:{text}[{end},{end + nbytes}]}}")
        end += nbytes
    if metadata:
        table.insert(0, f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)}')
    packed = f"{{{','.join(table)}}}".encode()
    packed += b" " * (-len(packed) % 8)
    if len(packed) > MAX_HEADER:
        raise CorruptError(f"A header of {len(packed)} bytes is larger than safetensors allows; use more files.")
    base = 8 + len(packed)
    return struct.pack("<Q", len(packed)) + packed, tuple([base + b for b in begins]), base + end


def _said(dtype: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """What a header says of a tensor, up to its place, and how many bytes it has."""
    return f'{{"dtype":"{dtype}","shape":{json.dumps(shape, separators=(",", ":"))},"data_offsets":', prod(shape) * ITEMSIZE[dtype]
