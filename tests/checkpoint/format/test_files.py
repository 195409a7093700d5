"""Headers: what safetensors writes is read, what it would choke on is refused, hostile numbers are refused before allocation."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import BlockCrc, Disk, Header, build_header, check_name, parse_json, read_header
from tests.checkpoint.making import bits, save_safetensors


def header_of(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(Disk(), fd, str(path))
    finally:
        os.close(fd)


def craft(path: Path, table: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def row(dtype: Any = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(span)}


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    array = np.arange(6, dtype="f4").reshape(2, 3)
    save_safetensors(tmp_path / "ours", {"w": ("F32", array.view("u4")), "s": ("I64", bits("I64", ()))})
    assert np.array_equal(load_file(tmp_path / "ours")["w"], array)
    save_file({"w": array, "b": np.array([True])}, tmp_path / "theirs", metadata={"a": "b"})
    header = header_of(tmp_path / "theirs")
    assert {e.name: (e.dtype, e.shape) for e in header.entries} == {"w": ("F32", (2, 3)), "b": ("BOOL", (1,))}
    assert header.metadata == {"a": "b"}


HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header length beyond the file": ({"w": row()}, b"", 1 << 62, "is no safetensors file: it would begin with a header of"),
    "header length of the whole address space": ({}, b"", (1 << 64) - 1, "is no safetensors file"),
    "not json": (b"{" * 9, b"", None, "not valid JSON"),
    "deep json": (b'{"a":' * 50000, b"", None, "not valid JSON"),
    "a list": (b"[]      ", b"", None, "JSON object"),
    "twice the same name": (b'{"w":{},"w":{}}', b"", None, "occurs twice"),
    "nan": (b'{"w":NaN}', b"", None, "not a number"),
    "unknown dtype": ({"w": row(dtype="F4")}, bytes(8), None, "dtype 'F4' is not one of"),
    "dtype of another type": ({"w": row(dtype=["F32"])}, bytes(8), None, "is not one of"),
    "negative size": ({"w": row(shape=(-2,))}, bytes(8), None, "is not a shape"),
    "true as a size": ({"w": row(shape=[True, 2])}, bytes(8), None, "is not a shape"),
    "a float as a size": ({"w": row(shape=[2.0])}, bytes(8), None, "is not a shape"),
    "overflowing shape": ({"w": row(shape=(1 << 40, 1 << 40))}, bytes(8), None, "is refused"),
    "too many dims": ({"w": row(shape=(1,) * 99)}, bytes(4), None, "is not a shape"),
    "range too short": ({"w": row(span=(0, 4))}, bytes(4), None, "do not hold"),
    "range backwards": ({"w": row(span=(8, 0))}, bytes(8), None, "do not hold"),
    "negative range": ({"w": row(span=(-8, 0))}, bytes(8), None, "not a byte range"),
    "past the end": ({"w": row()}, bytes(4), None, "truncated"),
    "bytes left over": ({"w": row()}, bytes(9), None, "too long"),
    "a hole": ({"w": row(span=(8, 16))}, bytes(16), None, "leaves a hole"),
    "an overlap": ({"v": row(), "w": row(span=(4, 12))}, bytes(12), None, "overlaps"),
    "the same bytes twice": ({"v": row(), "w": row()}, bytes(8), None, "overlaps"),
    "extra keys": ({"w": {**row(), "x": 1}}, bytes(8), None, "expected dtype"),
    "name with a newline": ({"a\nb": row()}, bytes(8), None, "not accepted as a tensor name"),
    "empty name": ({"": row()}, bytes(8), None, "not accepted as a tensor name"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    table, body, length, message = HOSTILE[case]
    with pytest.raises(CorruptError, match=message):
        header_of(craft(tmp_path / "x", table, body, length))


def test_short_files_are_refused(tmp_path: Path) -> None:
    for size in (0, 1, 7):
        (tmp_path / "x").write_bytes(bytes(size))
        with pytest.raises(CorruptError, match="no safetensors header"):
            header_of(tmp_path / "x")


@pytest.mark.parametrize("archive", [True, False])
def test_what_torch_wrote_is_told(tmp_path: Path, archive: bool) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x", _use_new_zipfile_serialization=archive)
    with pytest.raises(CorruptError, match=r"is no safetensors file.*torch.save wrote it: load it with torch.load"):
        header_of(tmp_path / "x")


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    whole = craft(tmp_path / "x", {"w": row()}, bytes(8)).read_bytes()
    (tmp_path / "x").write_bytes(whole[:20])
    with pytest.raises(CorruptError, match="ends within its header, which is said to be .* the whole file has 20"):
        header_of(tmp_path / "x")


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk"
    for data in (junk, struct.pack("<Q", len(junk)) + junk):
        path.write_bytes(data)
        try:
            header_of(path)
        except CorruptError:
            continue


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "x" * 300, 7, None, "a b"])
def test_names_that_could_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(CorruptError, match="not accepted as a file name"):
        check_name(name, "here")


def test_links_pipes_and_directories_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name, message in (("link", "symbolic link"), ("pipe", "not a regular file"), ("dir", "not a regular file"), ("none", "is missing")):
        with pytest.raises(CorruptError, match=message):
            Disk().open_file(tmp_path / name)


def test_large_small_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="more than 1000 are refused"):
        Disk().read_file(tmp_path / "x", 1000)


def test_huge_numbers_in_json_are_refused() -> None:
    with pytest.raises(CorruptError, match="not valid JSON"):
        parse_json(b'{"a":' + b"9" * 5000 + b"}", "x")


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_block_checksums_do_not_depend_on_how_the_bytes_arrive(parts: list[bytes], block: int) -> None:
    from zlib import crc32

    data, running = b"".join(parts), BlockCrc(block)
    for part in parts:
        running.feed(memoryview(part))
    assert running.finish() == tuple(crc32(data[k : k + block]) for k in range(0, len(data), block))


def test_two_tensors_of_one_name_are_refused_when_writing() -> None:
    with pytest.raises(CorruptError, match="called 'w'"):
        build_header(["w", "w"], [("F32", (1,)), ("F32", (2,))], {})
