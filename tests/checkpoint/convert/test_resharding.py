"""Any division to any other equals slicing the full tensor, in bounded memory, reading and writing every byte once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.boxes import Cut
from meshpar.checkpoint.format.casts import cast
from meshpar.checkpoint.format.division import Layout
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.format.files import ITEMSIZE
from meshpar.checkpoint.format.manifest import check
from meshpar.checkpoint.format.manifest import read as read_manifest
from meshpar.checkpoint.format.opened import open_checkpoint
from meshpar.checkpoint.format.table import Table
from meshpar.checkpoint.inspection import diff, inspect, verify
from meshpar.checkpoint.move.jobs import slabs
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.move.transfer import Options
from meshpar.errors import ConfigError
from meshpar.sharding.types import Shard, plain
from tests.checkpoint.making import Disk, bits, load, same, sample, save

FUSED = Shard(0, 1, ((4, 4), (2, 4), (2, 4)))  # q | k | v rows: 16 + 8 + 8


@pytest.mark.parametrize("mesh", ["tp=1", "tp=3", "dp=2,tp=2", "pp=3,dp=2", "ep=2,tp=2,dp=2", "cp=2,dp_replicate=2,dp_shard=2"])
def test_a_reshard_keeps_every_bit(tmp_path: Path, mesh: str) -> None:
    tensors = sample()
    save(tmp_path / "a", tensors, "tp=2,dp=2")
    report = reshard(tmp_path / "a", tmp_path / "b", mesh)
    assert same(load(tmp_path / "b"), tensors)
    assert verify(tmp_path / "b").ok and diff(tmp_path / "a", tmp_path / "b").same
    assert report.bytes_read == report.bytes_written == sum(a.nbytes for _, a in tensors.values())


def test_every_rank_file_holds_exactly_its_slice(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", bits("F32", (6, 5)))})
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    from safetensors.numpy import load_file

    full = load(tmp_path / "a")["w"][1].view("f4")
    for rank in range(2):
        assert np.array_equal(load_file(tmp_path / "b" / f"rank-{rank:05d}.safetensors")["w"], full[3 * rank : 3 * rank + 3])


def test_a_recorded_fused_layout_survives_the_change_of_mesh(tmp_path: Path) -> None:
    tensors = {"qkv": ("F32", bits("F32", (32, 6)))}
    save(tmp_path / "a", tensors, "tp=2", {"qkv": Layout((Cut("tp", FUSED),))})
    reshard(tmp_path / "a", tmp_path / "b", "tp=2,dp=2")
    reshard(tmp_path / "b", tmp_path / "c", "tp=1")
    reshard(tmp_path / "c", tmp_path / "d", "tp=2")
    assert all(same(load(tmp_path / x), tensors) for x in "abcd")
    held = [[str(c.box) for c in read_manifest(Disk(), tmp_path / x).tensors["qkv"].chunks] for x in "ad"]
    assert held[0] == held[1]
    assert "[0:8, 0:6]" in held[0] and "[16:20, 0:6]" in held[0]


def test_a_layout_with_many_boxes_stays_in_one_file(tmp_path: Path) -> None:
    tensors = {"w": ("F32", bits("F32", (2, 48)))}
    save(tmp_path / "a", tensors, "tp=2", {"w": Layout((Cut("tp", Shard(1, 12, ((4, 1),))),))})
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 2
    reshard(tmp_path / "a", tmp_path / "b", "tp=4")
    assert same(load(tmp_path / "b"), tensors)


def test_a_plan_file_decides_the_division(tmp_path: Path) -> None:
    tensors = {"layers.0.qkv": ("F32", bits("F32", (32, 6))), "layers.0.norm": ("F32", bits("F32", (6,)))}
    save(tmp_path / "a", tensors)
    plan = {
        "mesh": "pp=2,tp=2",
        "tensors": {"*.qkv": {"cuts": [["tp", 0, 1, [[4, 4], [2, 4], [2, 4]]]], "stage": 1}, "*.norm": {"cuts": []}},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    reshard(tmp_path / "a", tmp_path / "b", plan=tmp_path / "plan.json")
    facts = inspect(tmp_path / "b")["tensors"]
    assert facts["layers.0.qkv"]["stage"] == 1 and facts["layers.0.qkv"]["chunks"] == 6
    assert same(load(tmp_path / "b"), tensors)
    (tmp_path / "plan.json").write_text(json.dumps({"mesh": "tp=2", "tensors": {"layer.0.qkv": {}}}))
    with pytest.raises(ImpossibleError, match=r"match no tensor. Did you mean layers.0.qkv"):
        reshard(tmp_path / "a", tmp_path / "c", plan=tmp_path / "plan.json")
    assert not (tmp_path / "c").exists() and not (tmp_path / ".c.partial").exists()


@st.composite
def cases(draw: Any) -> tuple[str, tuple[int, ...], list[Layout], list[str]]:
    """A dtype, a shape, and two layouts on two meshes."""
    dtype = draw(st.sampled_from(["U8", "BF16", "F32", "I64"]))
    shape = list(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    fused = None
    if shape and draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        segments = tuple(draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3)))
        fused = Shard(dim, draw(st.integers(1, 3)), segments)
        shape[dim] = fused.length
    layouts, meshes = [], []
    for _ in range(2):
        sizes = {axis: draw(st.integers(1, 3)) for axis in ("dp", "ep", "tp")}
        cuts = []
        if fused is not None and draw(st.booleans()):
            cuts.append(Cut("tp", fused))
        for axis in draw(st.permutations(["dp", "ep"])) if shape else []:
            if draw(st.booleans()):
                dim = draw(st.integers(0, len(shape) - 1))
                cuts.append(Cut(axis, plain(dim, shape[dim])))
        layouts.append(Layout(tuple(cuts)))
        meshes.append(",".join(f"{a}={n}" for a, n in sizes.items()))
    return dtype, tuple(shape), layouts, meshes


@given(cases(), st.integers(16, 400), st.sampled_from([1, 2]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_to_any_layout(tmp_path_factory: pytest.TempPathFactory, case: Any, slab: int, workers: int) -> None:
    dtype, shape, layouts, meshes = case
    root = tmp_path_factory.mktemp("any")
    tensors = {"w": (dtype, bits(dtype, shape)), "other": ("F32", bits("F32", (5,)))}
    save(root / "a", tensors, meshes[0], {"w": layouts[0]})
    plan = {
        "mesh": meshes[1],
        "tensors": {"w": {"cuts": [[c.axis, c.shard.dim, c.shard.repeat, c.shard.segments] for c in layouts[1].cuts]}},
    }
    (root / "plan.json").write_text(json.dumps(plan))
    options = Options(workers=workers, slab=slab, smallest=16)
    report = reshard(root / "a", root / "b", plan=root / "plan.json", options=options)
    assert same(load(root / "b"), tensors)
    assert report.bytes_read == report.bytes_written == sum(a.nbytes for _, a in tensors.values())
    assert verify(root / "b").ok


@given(st.lists(st.integers(1, 9), max_size=4).map(tuple), st.sampled_from([1, 2, 8]), st.integers(8, 300))
@settings(max_examples=200, deadline=None)
def test_slabs_follow_the_bytes_and_stay_small(shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    seen = []
    full = np.arange(int(np.prod(shape))).reshape(shape)
    for box in slabs(shape, itemsize, limit):
        part = full[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size))]
        assert part.nbytes // 8 * itemsize <= limit
        seen += part.reshape(-1).tolist()
    assert seen == list(range(full.size))


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    root = tmp_path_factory.mktemp("box")
    shape = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple))
    tensors = {"w": ("F32", bits("F32", shape))}
    save(root / "a", tensors, "ep=2,tp=3,dp=2")
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset))
    from meshpar.checkpoint.format.boxes import Box

    with Reader(open_checkpoint(root / "a")) as reader:
        found = reader.read("w", Box(offset, size))
    assert np.array_equal(found, tensors["w"][1][tuple(slice(o, o + n) for o, n in zip(offset, size))])


def test_memory_stays_flat_and_blocks_are_checked_across_slabs(tmp_path: Path) -> None:
    """More bytes than the buffers, chunks of more than one block: the checksums are the same as those of a single stretch."""
    array = np.random.default_rng(0).integers(0, 1 << 16, (5000, 2000), dtype="u2")
    save(tmp_path / "a", {"w": ("BF16", array)}, "tp=2")
    import tracemalloc

    tracemalloc.start()
    options = Options(memory=2 << 20)
    reshard(tmp_path / "a", tmp_path / "b", "ep=3", plan=_columns(tmp_path, 3, array.shape), options=options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, peak
    assert same(load(tmp_path / "b"), {"w": ("BF16", array)})
    assert verify(tmp_path / "b").checked_bytes == array.nbytes


def _columns(root: Path, size: int, shape: tuple[int, ...]) -> Path:
    (root / "columns.json").write_text(json.dumps({"mesh": f"ep={size}", "tensors": {"w": {"cuts": [["ep", 1, 1, [[shape[1], 1]]]]}}}))
    return root / "columns.json"


def test_casting_rounds_to_nearest_even_and_never_overflows_in_silence(tmp_path: Path) -> None:
    import torch

    values = torch.cat([torch.randn(999), torch.tensor([float("nan"), float("inf"), -0.0, 3.3e38])])
    for source, dtype in (("F32", "BF16"), ("F32", "F64")):
        got = cast(values.numpy().view("u4"), source, dtype, "w")
        wanted = values.to({"BF16": torch.bfloat16, "F64": torch.float64}[dtype])
        assert np.array_equal(got[:999], wanted.view({2: torch.int16, 8: torch.int64}[ITEMSIZE[dtype]]).numpy().view(got.dtype)[:999])
        assert np.isnan(np.float32(0)) == False and len(got) == 1003  # noqa: E712
    with pytest.raises(ImpossibleError, match=r"w: 1 values up to 3.3e\+38 do not fit F16"):
        cast(values.numpy().view("u4"), "F32", "F16", "w")


def test_dtype_casts_the_model_and_leaves_the_rest(tmp_path: Path) -> None:
    tensors = {"w": ("F32", bits("F32", (6, 5))), "m": ("F32", bits("F32", (6, 5))), "n": ("I64", bits("I64", ()))}
    save(tmp_path / "a", tensors, "tp=2", kinds={"m": "optimizer"})
    reshard(tmp_path / "a", tmp_path / "b", "tp=3", dtype="BF16")
    got = load(tmp_path / "b")
    assert {n: d for n, (d, _) in got.items()} == {"w": "BF16", "m": "F32", "n": "I64"}
    assert np.abs((got["w"][1].astype("u4") << 16).view("f4") - tensors["w"][1].view("f4")).max() < 0.02
    assert same({"m": got["m"], "n": got["n"]}, {"m": tensors["m"], "n": tensors["n"]})


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a", sample())
    before = sorted(tmp_path.iterdir())
    report = reshard(tmp_path / "a", tmp_path / "b", "tp=4,pp=2,dp=2,ep=8", dry_run=True)
    assert report.files > 8 and report.dry_run and sorted(tmp_path.iterdir()) == before


def test_what_lies_beside_the_tensors_travels_along(tmp_path: Path) -> None:
    save(tmp_path / "a", sample(), values={"step": 7, "schedule": {"last_lr": [0.1]}}, kinds={"scale": "optimizer"})
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    manifest = read_manifest(Disk(), tmp_path / "b")
    assert manifest.values == {"step": 7, "schedule": {"last_lr": [0.1]}}
    assert manifest.tensors["scale"].kind == "optimizer"


def test_a_target_that_exists_is_never_touched(tmp_path: Path) -> None:
    save(tmp_path / "a", sample())
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="never written over another one"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    assert list((tmp_path / "b").iterdir()) == []
    with pytest.raises(ConfigError, match="is not a directory; make it first"):
        reshard(tmp_path / "a", tmp_path / "no" / "b", "tp=2")


def test_too_little_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path / "a", sample())
    with pytest.raises(ImpossibleError, match="at least 1048576 are needed"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", options=Options(memory=1000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_without_checksums_nothing_is_claimed(tmp_path: Path) -> None:
    tensors = sample()
    save(tmp_path / "a", tensors)
    reshard(tmp_path / "a", tmp_path / "b", "tp=2", options=Options(checksums=False, verify=False))
    assert same(load(tmp_path / "b"), tensors)
    found = verify(tmp_path / "b")
    assert found.ok and found.checked_bytes == 0 and "no checksums" in found.notes[0]
    assert inspect(tmp_path / "b")["checksums"] is False


def test_a_source_changed_under_the_manifest_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a", sample(), "tp=2")
    path = tmp_path / "a" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="rank-00000.safetensors, tensor .* crc32 is"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=1")
    assert not (tmp_path / "b").exists() and not (tmp_path / ".b.partial").exists()


def test_small_tensors_of_several_kinds_interleaved(tmp_path: Path) -> None:
    """Evenly spaced and scattered stretches, empty tensors alone and among others, more than one file on both sides."""
    tensors = {
        f"{k:03d}": ("BF16", bits("BF16", (8, 3 + 2 * (k % 3 == 0)), k)) if k % 5 else ("F32", bits("F32", (0, 2))) for k in range(60)
    }
    save(tmp_path / "a", tensors, "tp=3,pp=2")
    for k, (mesh, options) in enumerate(
        [("tp=4", Options()), ("pp=3,tp=2", Options(slab=600, smallest=64)), ("tp=1", Options(verify=False))]
    ):
        report = reshard(tmp_path / "a", tmp_path / f"b{k}", mesh, options=options)
        assert same(load(tmp_path / f"b{k}"), tensors) and verify(tmp_path / f"b{k}").ok
        assert report.bytes_read == report.bytes_written == sum(a.nbytes for _, a in tensors.values())


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    tensors = {"none": ("F32", bits("F32", (0, 4)))}
    save(tmp_path / "a", tensors, "tp=2")
    reshard(tmp_path / "a", tmp_path / "b", "tp=3")
    assert same(load(tmp_path / "b"), tensors)


def test_two_tensors_on_the_same_bytes_are_refused(tmp_path: Path) -> None:
    manifest = save(tmp_path / "a", {"v": ("F32", bits("F32", (4,))), "w": ("F32", bits("F32", (4,)))})
    v, w = manifest.tensors["v"].chunks[0], manifest.tensors["w"].chunks[0]
    begin = min(v.begin, w.begin)
    moved = {n: t._replace(chunks=(t.chunks[0]._replace(begin=begin + 4 * (n == "w")),)) for n, t in manifest.tensors.items()}
    with pytest.raises(CorruptError, match=rf"v and w share bytes {begin + 4}\.\.{begin + 16} of rank-00000.safetensors"):
        check(dataclasses.replace(manifest, tensors=Table.of(moved)), "here")
