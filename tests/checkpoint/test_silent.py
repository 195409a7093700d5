"""The thirteen silent corruptions of today's checkpoint tools, each of which must not happen here, or be a loud error."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.boxes import Cut, local_shape, runs_held
from meshpar.checkpoint.format.division import Grid, Layout
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError, StorageError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import read as read_manifest
from meshpar.checkpoint.format.partial import writing
from meshpar.checkpoint.inspection import verify
from meshpar.checkpoint.online.writer import Local, PerRank, finish, merge, rank_tensor, write_rank
from meshpar.sharding.types import Shard, plain
from tests.checkpoint.making import Array, CountingDisk, bits, boxes_held, flip, load, no_space, same, save, save_folder, save_safetensors

WORDS = np.arange(24, dtype="u4").reshape(6, 4)


def local(name: str, array: Array, rows: tuple[int, int], total: int | None = None, dtype: str = "F32") -> Local:
    """Rows `rows` of a tensor of `total` rows, as one rank holds them."""
    shape = (len(array) if total is None else total, *array.shape[1:])
    return Local(name, dtype, shape, ((rows,), *(((0, n),) for n in shape[1:])), lambda: array[rows[0] : rows[1]])


def test_s1_tensors_without_dims_keep_their_value(tmp_path: Path) -> None:
    tensors = {"scale": ("F32", np.float32(3.5).reshape(()).view("u4")), "step": ("I64", np.array(1234).view("u8")), "w": ("F32", WORDS)}
    save(tmp_path / "a", tensors, "tp=2,dp=2")
    reshard(tmp_path / "a", tmp_path / "b", "tp=3")
    to_hf(tmp_path / "b", tmp_path / "c")
    from_hf(tmp_path / "c", tmp_path / "d", "pp=2,tp=2")
    for name in "abcd":
        assert same(load(tmp_path / name), tensors), name


def test_s2_fewer_ranks_later_do_not_mix_with_old_files(tmp_path: Path) -> None:
    old, new = {"w": ("F32", WORDS)}, {"w": ("F32", WORDS + 100)}
    save(tmp_path / "a", old, "dp=6")
    with pytest.raises(StorageError, match="never written over another one"):
        save(tmp_path / "a", new, "dp=2")
    assert same(load(tmp_path / "a"), old)
    # and files of another save that someone copied in are not read, and are reported
    save(tmp_path / "b", new, "dp=2")
    shutil.copy(tmp_path / "a" / "rank-00005.safetensors", tmp_path / "b")
    assert same(load(tmp_path / "b"), new)
    found = verify(tmp_path / "b")
    assert found.status == 1 and "rank-00005.safetensors is not part of this checkpoint" in found.unexpected[0]


def test_s2_a_hugging_face_folder_with_files_of_two_exports_is_refused(tmp_path: Path) -> None:
    tensors = {f"w{k}": ("F32", WORDS) for k in range(4)}
    save_folder(tmp_path / "hf", tensors, 2)
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    with pytest.raises(CorruptError, match="which belong together is unknown"):
        from_hf(tmp_path / "hf", tmp_path / "a", "tp=1")
    save_safetensors(tmp_path / "hf" / "model.safetensors", tensors)
    with pytest.raises(CorruptError, match="which of them belong together is unknown"):
        from_hf(tmp_path / "hf", tmp_path / "a", "tp=1")


def test_s3_a_missing_shard_file_is_an_error_everywhere(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", WORDS)}, "tp=3")
    (tmp_path / "a" / "rank-00001.safetensors").unlink()
    for act in (
        lambda: load(tmp_path / "a"),
        lambda: reshard(tmp_path / "a", tmp_path / "b", "tp=1"),
        lambda: to_hf(tmp_path / "a", tmp_path / "b"),
    ):
        with pytest.raises(CorruptError, match="rank-00001.safetensors is missing"):
            act()
    assert verify(tmp_path / "a").status == 3


def test_s3_rows_that_no_rank_saved_are_an_error_when_saving(tmp_path: Path) -> None:
    with writing_records(tmp_path) as (root, disk):
        records = [write_rank(root, 0, [local("w", WORDS, (0, 2))], {}, disk), write_rank(root, 1, [local("w", WORDS, (3, 6))], {}, disk)]
        with pytest.raises(CorruptError, match=r"w \[6, 4\]: no chunk covers \[2:3, 0:4\]"):
            merge(records)


def test_s4_a_failed_second_export_leaves_the_first_whole(tmp_path: Path) -> None:
    old, new = {"w": ("F32", WORDS), "v": ("F32", WORDS)}, {"w": ("F32", WORDS + 9), "v": ("F32", WORDS + 9)}
    save(tmp_path / "old", old), save(tmp_path / "new", new)
    to_hf(tmp_path / "old", tmp_path / "hf", shard_bytes=100)
    with pytest.raises(StorageError, match="never written over"):
        to_hf(tmp_path / "new", tmp_path / "hf", shard_bytes=100)
    with pytest.raises(StorageError, match="disk is full"):
        to_hf(tmp_path / "new", tmp_path / "hf2", shard_bytes=100, disk=CountingDisk(5, no_space, ("write",)))
    assert not (tmp_path / "hf2").exists()
    assert same(load(tmp_path / "hf"), old)


def test_s5_stage_local_names_are_refused(tmp_path: Path) -> None:
    with writing_records(tmp_path) as (root, disk):
        one = write_rank(root, 0, [local("layers.0.weight", WORDS, (0, 6))], {}, disk)
        two = write_rank(root, 1, [local("layers.0.weight", WORDS + 1, (0, 6))], {}, disk)
        with pytest.raises(CorruptError, match=r"layers.0.weight \[6, 4\]: more than one chunk covers"):
            merge([one, two])
        three = write_rank(root, 2, [local("layers.0.weight", WORDS[:2], (0, 2))], {}, disk)
        with pytest.raises(CorruptError, match=r"is F32 \[6, 4\] \(model\) on rank 0 and F32 \[2, 4\] .* not of a stage"):
            merge([one, three])


def test_s6_every_ranks_own_values_are_kept(tmp_path: Path) -> None:
    states = [bits("U8", (5,), seed) for seed in range(3)]
    with writing(tmp_path / "a", "", Disk()) as partial:
        records = [
            write_rank(partial.path, r, [rank_tensor("rng", r, 3, states[r], "U8")], {"position": PerRank({"file": r})}, partial.disk)
            for r in range(3)
        ]
        finish(partial, merge(records, Grid.parse("dp=3")))
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    for name in "ab":
        assert [row.tolist() for row in load(tmp_path / name)["rng"][1]] == [s.tolist() for s in states]
        assert read_manifest(Disk(), tmp_path / name).values["per_rank"] == {"position": [{"file": r} for r in range(3)]}
        assert read_manifest(Disk(), tmp_path / name).tensors["rng"].kind == "rank"


def test_s6_a_value_that_differs_undeclared_is_refused(tmp_path: Path) -> None:
    with writing_records(tmp_path) as (root, disk):
        records = [write_rank(root, r, [], {"position": r}, disk) for r in range(2)]
        with pytest.raises(CorruptError, match="position is 0 on one rank and 1 on rank 1. If it should differ, declare it PerRank"):
            merge(records)
        records = [write_rank(root, 0, [], {"position": PerRank(1)}, disk), write_rank(root, 1, [], {}, disk)]
        with pytest.raises(CorruptError, match=r"position is missing on ranks \[1\]"):
            merge(records)


def test_s7_hyper_parameters_are_kept_per_parameter_and_never_merged(tmp_path: Path) -> None:
    with writing_records(tmp_path) as (root, disk):
        stages = [{"groups": {"w0": {"lr": 0.1}, "shared": {"lr": 0.3}}}, {"groups": {"w1": {"lr": 0.2}, "shared": {"lr": 0.3}}}]
        merged = merge([write_rank(root, r, [], stages[r], disk) for r in range(2)])
        assert merged.values["groups"] == {"w0": {"lr": 0.1}, "w1": {"lr": 0.2}, "shared": {"lr": 0.3}}
        stages[1]["groups"]["shared"]["lr"] = 0.4
        with pytest.raises(CorruptError, match="groups.shared.lr is 0.3 on one rank and 0.4 on rank 1"):
            merge([write_rank(root, r, [], stages[r], disk) for r in range(2)])


def test_s8_two_chunks_of_one_tensor_on_one_rank_are_both_kept(tmp_path: Path) -> None:
    fused = Layout((Cut("tp", Shard(0, 1, ((4, 1), (2, 1)))),))
    save(tmp_path / "a", {"w": ("F32", WORDS)}, "tp=2", {"w": fused})
    assert [str(c.box) for c in read_manifest(Disk(), tmp_path / "a").tensors["w"].chunks] == [
        "[0:2, 0:4]",
        "[4:5, 0:4]",
        "[2:4, 0:4]",
        "[5:6, 0:4]",
    ]
    assert same(load(tmp_path / "a"), {"w": ("F32", WORDS)})


def test_s9_a_flipped_bit_is_found_by_reading(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", WORDS)}, "tp=2")
    path = tmp_path / "a" / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 7, 3)
    with pytest.raises(CorruptError, match=r"rank-00001.safetensors, tensor w \[3:6, 0:4\], bytes .* crc32 is"):
        load(tmp_path / "a")


def test_s10_dying_while_overwriting_cannot_mix_two_steps(tmp_path: Path) -> None:
    """There is no overwriting: the second save never touches the first, whichever write fails."""
    old, new = {"w": ("F32", WORDS)}, {"w": ("F32", WORDS + 50)}
    save(tmp_path / "a", old, "dp=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for step in range(6):
        with pytest.raises(StorageError):
            save(tmp_path / "a", new, "dp=2", disk=CountingDisk(step, no_space, ("write",)))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_s11_another_dtype_is_a_decision_and_never_makes_infinities(tmp_path: Path) -> None:
    values = np.array([[1.0, 7e4], [3.0, -2.0]], "f4")
    save(tmp_path / "a", {"w": ("F32", values.view("u4"))})
    with pytest.raises(ImpossibleError, match="w: 1 values up to 70000 do not fit F16 and would become infinite"):
        reshard(tmp_path / "a", tmp_path / "b", "tp=2", dtype="F16")
    assert not (tmp_path / "b").exists()
    reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    assert load(tmp_path / "b")["w"][0] == "F32"


def test_s12_equal_fused_segments_go_to_the_ranks_that_compute_with_them(tmp_path: Path) -> None:
    """What torch writes `_StridedShard(0, split_factor=3)`: three blocks, each cut by the axis."""
    import torch
    from torch.distributed.tensor.placement_types import _StridedShard

    full = torch.arange(12)
    ours = Shard(0, 1, ((4, 1),) * 3)
    for rank in range(2):
        runs = runs_held((12,), [Cut("tp", ours)], {"tp": 2}, {"tp": rank})
        mine = torch.cat([full[a:b] for a, b in runs[0]])
        theirs = _StridedShard(0, split_factor=3)._split_tensor(full, 2, with_padding=False)[0][rank]
        assert mine.tolist() == theirs.tolist()
    array = np.arange(12, dtype="u4")
    save(tmp_path / "a", {"w": ("F32", array)}, "tp=2", {"w": Layout((Cut("tp", ours),))})
    reshard(tmp_path / "a", tmp_path / "b", "tp=4")
    chunks = read_manifest(Disk(), tmp_path / "b").tensors["w"].chunks
    assert [str(c.box) for c in chunks][:3] == ["[0:1]", "[4:5]", "[8:9]"]
    assert same(load(tmp_path / "b"), {"w": ("F32", array)})


def test_s13_uneven_cuts_by_two_axes_leave_no_row_unset_and_lies_are_found(tmp_path: Path) -> None:
    """tp does not divide the dim, then three data ranks cut what is left: the claim must be what the rank really holds."""
    cuts = [Cut("tp", plain(0, 7)), Cut("dp", plain(0, 7))]
    sizes = {"tp": 2, "dp": 3}
    rows = [b for t in range(2) for d in range(3) for b in boxes_held((7,), cuts, sizes, {"tp": t, "dp": d})]
    assert sorted(r for b in rows for r in range(b.offset[0], b.offset[0] + b.size[0])) == list(range(7))
    array = np.arange(7, dtype="u4")
    for t in range(2):
        mine = array[:4] if t == 0 else array[4:]
        for d, part in enumerate(np.array_split(mine, range(2 if len(mine) == 4 else 1, len(mine), 2 if len(mine) == 4 else 1))):
            assert local_shape(runs_held((7,), cuts, sizes, {"tp": t, "dp": d})) == part.shape
    save(tmp_path / "a", {"w": ("F32", array)}, "tp=2,dp=3", {"w": Layout(tuple(cuts))})
    reshard(tmp_path / "a", tmp_path / "b", "dp=5")
    assert same(load(tmp_path / "b"), {"w": ("F32", array)})
    with writing_records(tmp_path) as (root, disk):
        lie = replace(local("w", WORDS, (0, 3)), data=lambda: WORDS[:2])
        with pytest.raises(CorruptError, match=r"Rank 0 says it holds .* of w .* that is \[3, 4\], but its local tensor is \[2, 4\]"):
            write_rank(root, 0, [lie], {}, disk)


def test_loud_failures_of_others_work_here(tmp_path: Path) -> None:
    """int and bool tensors, and plain numbers beside tensors."""
    tensors = {"i": ("I32", bits("I32", (5, 2))), "b": ("BOOL", bits("BOOL", (4, 3)))}
    save(tmp_path / "a", tensors, "tp=2", values={"epoch": 3, "note": "x"})
    to_hf(tmp_path / "a", tmp_path / "hf")
    assert same(load(tmp_path / "hf"), tensors)
    assert issubclass(CorruptError, Exception)


class writing_records:
    """A directory to write rank files into, without a commit."""

    def __init__(self, root: Path) -> None:
        self.root = root / "records"

    def __enter__(self) -> tuple[Path, Disk]:
        self.root.mkdir(exist_ok=True)
        return self.root, Disk()

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root)


def test_manifests_are_json_and_hold_no_code(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": ("F32", WORDS)})
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".json", ".safetensors"]
    json.loads((tmp_path / "a" / "manifest.json").read_text())
