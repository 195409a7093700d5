"""Whose bytes they are: a resumed run takes over only its own work, and what is called the same was compared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from meshpar.checkpoint.convert import execution
from meshpar.checkpoint.convert.dcp import to_dcp
from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import ImpossibleError, StorageError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import MANIFEST, dump
from meshpar.checkpoint.format.manifest import read as read_manifest
from meshpar.checkpoint.format.partial import JOURNAL, writing
from meshpar.checkpoint.format.sink import Output, folder_sink
from meshpar.checkpoint.inspection import verify
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.online.writer import finish, merge, write_rank
from tests.checkpoint.making import CountingDisk, bits, flip, load, same, save, save_folder
from tests.checkpoint.test_silent import local

SMALL = Options(slab=256, smallest=64)


def tensors(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """A model of a few layers; the same names and shapes whatever the seed."""
    return {f"layers.{k}.weight": ("F32", bits("F32", (13, 7), 100 * seed + k)) for k in range(6)}


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("shard_bytes", [900, 5 * 10**9])
def test_a_finished_folder_is_taken_over_only_if_it_holds_the_same(tmp_path: Path, shard_bytes: int) -> None:
    save(tmp_path / "a", tensors(1), "tp=2")
    save(tmp_path / "b", tensors(2), "tp=2")
    to_hf(tmp_path / "a", tmp_path / "hf", shard_bytes=shard_bytes)
    assert to_hf(tmp_path / "a", tmp_path / "hf", shard_bytes=shard_bytes, resume=True).resumed == 6
    with pytest.raises(StorageError, match="hf exists"):
        to_hf(tmp_path / "b", tmp_path / "hf", shard_bytes=shard_bytes, resume=True)
    assert same(load(tmp_path / "hf"), tensors(1))
    path = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    flip(path, path.stat().st_size - 1)
    with pytest.raises(StorageError, match="hf exists"):
        to_hf(tmp_path / "a", tmp_path / "hf", shard_bytes=shard_bytes, resume=True, options=Options(workers=2))


def test_a_finished_folder_with_another_configuration_is_not_the_same(tmp_path: Path) -> None:
    for k in range(2):
        save_folder(tmp_path / f"from{k}", tensors(1), assets={"config.json": json.dumps({"k": k})})
        from_hf(tmp_path / f"from{k}", tmp_path / f"a{k}", "tp=2")
    to_hf(tmp_path / "a0", tmp_path / "hf")
    assert to_hf(tmp_path / "a0", tmp_path / "hf", resume=True).resumed == 6
    with pytest.raises(StorageError, match="hf exists"):
        to_hf(tmp_path / "a1", tmp_path / "hf", resume=True)


def plain_save(target: Path, seed: int) -> None:
    """A checkpoint without checksums."""
    with writing(target, "", Disk()) as partial:
        rows = [local(n, a, (0, 13)) for n, (_, a) in tensors(seed).items()]
        finish(partial, merge([write_rank(partial.path, 0, rows, {}, Disk(), checksums=False)]))


def test_without_checksums_a_source_that_changed_is_told_by_its_files(tmp_path: Path) -> None:
    plain_save(tmp_path / "a", 1)
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    assert reshard(tmp_path / "a", tmp_path / "b", "tp=2", resume=True).resumed == 6
    shutil.rmtree(tmp_path / "a")
    plain_save(tmp_path / "a", 2)
    with pytest.raises(StorageError, match="b exists"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", resume=True)


def test_without_checksums_half_a_target_is_not_continued_from_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SYNC_BYTES", 1)
    plain_save(tmp_path / "a", 1)
    with pytest.raises(KeyboardInterrupt):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", options=SMALL, disk=CountingDisk(25, interrupt))
    shutil.rmtree(tmp_path / "a")
    plain_save(tmp_path / "a", 2)
    with pytest.raises(ImpossibleError, match="another source"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", options=SMALL, resume=True)


@pytest.mark.parametrize("change", ["values", "mesh", "kinds"])
def test_a_finished_checkpoint_is_taken_over_only_if_all_of_it_is_the_same(tmp_path: Path, change: str) -> None:
    """Tensors alone do not make two checkpoints the same."""
    save(tmp_path / "a", tensors(1), values={"step": 1})
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    mesh = "dp=2" if change == "mesh" else "tp=2"
    if change != "mesh":
        shutil.rmtree(tmp_path / "a")
        kinds = {"layers.0.weight": "extra"} if change == "kinds" else {}
        save(tmp_path / "a", tensors(1), values={"step": 2 if change == "values" else 1}, kinds=kinds)
    with pytest.raises(StorageError, match="b exists"):
        reshard(tmp_path / "a", tmp_path / "b", mesh, resume=True)


def test_work_without_a_readable_journal_is_nobodys(tmp_path: Path) -> None:
    save_folder(tmp_path / "from", tensors(1), assets={"old.json": "{}"})
    from_hf(tmp_path / "from", tmp_path / "a", "tp=2")
    disk = CountingDisk(only=("rename",), at=0, act=interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_hf(tmp_path / "a", tmp_path / "hf", shard_bytes=900, disk=disk)
    flip(tmp_path / ".hf.partial" / JOURNAL, 12)
    save(tmp_path / "b", tensors(2))
    to_hf(tmp_path / "b", tmp_path / "hf", resume=True)
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    assert same(load(tmp_path / "hf"), tensors(2))


def test_what_is_written_while_another_thread_syncs_is_synced_again(tmp_path: Path) -> None:
    sink, disk = folder_sink({"w": ("F32", (4,))}, 100), CountingDisk(only=("sync",))
    output = Output(tmp_path, sink.files, disk)
    with output.use(0) as fd:
        output.sync()
        before = disk.calls
        disk.write(fd, [memoryview(bytes(16))], len(sink.files[0].header))
    output.sync()
    assert disk.calls == before + 1
    output.close()


def test_a_manifest_that_exchanges_two_tensors_contradicts_the_headers(tmp_path: Path) -> None:
    save(tmp_path / "a", tensors(1), "tp=2")
    path, manifest = tmp_path / "a" / MANIFEST, read_manifest(Disk(), tmp_path / "a")
    (group,) = manifest.tensors.groups
    group.position[[0, 1]] = group.position[[1, 0]]
    os.truncate(path, 0)
    path.write_bytes(dump(manifest))
    found = verify(tmp_path / "a")
    assert found.status == 3 and "the header does not describe layers.0.weight as the manifest does" in " ".join(found.corrupt)


def test_two_tensors_under_one_name_of_torch_are_refused(tmp_path: Path) -> None:
    both = {"w": ("F32", bits("F32", (3,), 1)), "model.w": ("F32", bits("F32", (3,), 2))}
    save(tmp_path / "a", both, kinds={"model.w": "extra"})
    with pytest.raises(ImpossibleError, match=r"Two tensors would be called model\.w"):
        to_dcp(tmp_path / "a", tmp_path / "d", model_prefix="model.")
    assert not (tmp_path / "d").exists()


def test_what_a_writer_left_when_it_died_after_the_rename_is_removed(tmp_path: Path) -> None:
    save(tmp_path / "a", tensors(1), "tp=2")
    with pytest.raises(KeyboardInterrupt):
        to_hf(tmp_path / "a", tmp_path / "hf", disk=CountingDisk(0, interrupt, ("unlink",)))
    assert (tmp_path / "hf" / JOURNAL).exists()
    assert to_hf(tmp_path / "a", tmp_path / "hf", resume=True).resumed == 6
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
