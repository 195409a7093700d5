"""Small checkpoints to test with, and disks that fail on demand."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from meshpar.checkpoint.format.boxes import Box, Cut, boxes_of, runs_held
from meshpar.checkpoint.format.casts import word
from meshpar.checkpoint.format.division import Division, Grid, Layout, default_division
from meshpar.checkpoint.format.files import ITEMSIZE, Disk, build_header
from meshpar.checkpoint.format.manifest import Manifest
from meshpar.checkpoint.format.opened import open_checkpoint
from meshpar.checkpoint.format.partial import writing
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.online.writer import Local, Record, finish, merge, write_rank

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, tuple[str, Array]]


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random words of a dtype's size; finite if it is a float."""
    rng = np.random.default_rng(seed)
    if dtype in ("F32", "F64", "F16"):
        return rng.standard_normal(shape).astype({"F16": "f2", "F32": "f4", "F64": "f8"}[dtype]).view(word(dtype))
    if dtype == "BF16":
        return (rng.standard_normal(shape).astype("f4").view("u4") >> 16).astype("u2")
    if dtype == "BOOL":
        return rng.integers(0, 2, shape).astype("u1")
    return rng.integers(0, 256, (*shape, ITEMSIZE[dtype]), dtype="u1").view(word(dtype)).reshape(shape)


def sample(seed: int = 0) -> dict[str, tuple[str, Array]]:
    """Some of everything: odd sizes, no dims, no elements, small and wide dtypes, stacked experts."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed.weight": ("BF16", (131, 8)),
        "layers.0.norm.weight": ("F32", (8,)),
        "layers.0.qkv.weight": ("BF16", (32, 8)),
        "layers.0.experts.up": ("F16", (4, 6, 10)),
        "layers.1.down.weight": ("F32", (7, 5)),
        "scale": ("F32", ()),
        "flags": ("BOOL", (3,)),
        "codes": ("F8_E4M3", (9, 4)),
        "step": ("I64", ()),
        "none": ("F32", (0, 4)),
        "wide": ("F64", (3, 17)),
    }
    return {name: (dtype, bits(dtype, shape, seed + k)) for k, (name, (dtype, shape)) in enumerate(shapes.items())}


def save(
    target: Path,
    tensors: Tensors,
    mesh: str = "tp=1",
    layouts: Mapping[str, Layout] | None = None,
    *,
    disk: Disk | None = None,
    values: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Manifest:
    """Save as the ranks of a mesh would, one after the other, each only what it holds."""
    disk, grid = disk or Disk(), Grid.parse(mesh)
    with writing(target, "", disk) as partial:
        manifest = merge(write_all(partial.path, tensors, grid, layouts, disk, values or {}, kinds or {}), grid)
        finish(partial, manifest)
    return manifest


def write_all(
    root: Path,
    tensors: Tensors,
    grid: Grid,
    layouts: Mapping[str, Layout] | None,
    disk: Disk,
    values: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> list[Record]:
    """What all ranks write."""
    division = default_division({n: (d, a.shape) for n, (d, a) in tensors.items()}, grid)
    division = Division(grid, {**division.layouts, **(layouts or {})})
    per_rank: list[list[Local]] = [[] for _ in range(grid.size)]
    for name, (dtype, array) in tensors.items():
        for rank, runs in division.holders(name, array.shape):
            local = array[np.ix_(*([i for a, b in row for i in range(a, b)] for row in runs))] if array.ndim else array
            kind = (kinds or {}).get(name, "model")
            per_rank[rank].append(Local(name, dtype, array.shape, runs, lambda local=local: local, kind, division.layouts[name]))
    return [write_rank(root, rank, locals_, values or {}, disk) for rank, locals_ in enumerate(per_rank)]


def load(path: Path) -> dict[str, tuple[str, Array]]:
    """Every tensor of a checkpoint or folder, checksums verified."""
    opened = open_checkpoint(path)
    with Reader(opened) as reader:
        return {name: (t.dtype, reader.read(name)) for name, t in opened.manifest.tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    """Bitwise equality, names, dtypes and shapes included."""
    return a.keys() == b.keys() and all(
        a[n][0] == b[n][0] and a[n][1].shape == b[n][1].shape and a[n][1].tobytes() == b[n][1].tobytes() for n in a
    )


def save_folder(root: Path, tensors: Tensors, files: int = 1, assets: Mapping[str, str] | None = None) -> Path:
    """A Hugging Face folder."""
    root.mkdir(parents=True)
    names = list(tensors)
    groups = [names[k::files] for k in range(files)]
    table = {}
    for k, group in enumerate(groups):
        file = "model.safetensors" if files == 1 else f"model-{k + 1:05d}-of-{files:05d}.safetensors"
        save_safetensors(root / file, {n: tensors[n] for n in group})
        table |= dict.fromkeys(group, file)
    if files > 1:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for name, text in (assets or {}).items():
        (root / name).write_text(text)
    return root


def save_safetensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    header, _, _ = build_header(list(tensors), [(d, a.shape) for d, a in tensors.values()], {"format": "pt"})
    path.write_bytes(header + b"".join(a.tobytes() for _, a in tensors.values()))


def stamped(body: Any) -> bytes:
    """The bytes of a manifest with this content, its own checksum right."""
    blank = json.dumps({"crc32": "00000000"} | {k: v for k, v in body.items() if k != "crc32"}, separators=(",", ":")).encode()
    return blank.replace(b"00000000", b"%08x" % crc32(blank), 1)


class CountingDisk(Disk):
    """Counts the calls that reach the disk, and does something at the n-th."""

    def __init__(self, at: int = -1, act: Callable[[], None] | None = None, only: tuple[str, ...] = ()) -> None:
        self.calls, self.at, self.act, self.only = 0, at, act, only

    def step(self, what: str) -> None:
        if self.only and what not in self.only:
            return
        if self.calls == self.at and self.act:
            self.act()
        self.calls += 1


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def boxes_held(shape: Sequence[int], cuts: Sequence[Cut], sizes: Mapping[str, int], coords: Mapping[str, int]) -> tuple[Box, ...]:
    """The boxes that the rank at `coords` holds, in the order they lie in its local tensor."""
    return boxes_of(runs_held(shape, cuts, sizes, coords))
