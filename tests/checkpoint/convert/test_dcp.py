"""torch.distributed.checkpoint directories in and out; pickles that ask for anything else are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from meshpar.checkpoint.convert.dcp import METADATA, from_dcp, to_dcp
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.format.files import Disk
from meshpar.checkpoint.format.manifest import read as read_manifest
from meshpar.checkpoint.inspection import diff, verify
from meshpar.checkpoint.move.transfer import Options
from meshpar.errors import ConfigError
from tests.checkpoint.making import flip, load, same, sample, save


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": {"w": torch.randn(9, 4, dtype=torch.bfloat16), "s": torch.tensor(3.5), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn)},
        "optim": {"m": torch.randn(9, 4, dtype=torch.float64), "groups": [{"lr": 0.1, "params": ["w"]}], "step": 5},
        "rng": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
    }


def test_a_directory_of_torch_is_read_without_torch_and_without_running_its_pickles(tmp_path: Path) -> None:
    want = state()
    dcp.save(want, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ConfigError, match="add --trust-pickle"):
        from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2")
    from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True, model_prefix="model.")
    got, manifest = load(tmp_path / "a"), read_manifest(Disk(), tmp_path / "a")
    flat = {"w": want["model"]["w"], "s": want["model"]["s"], "f8": want["model"]["f8"], "optim.m": want["optim"]["m"]}
    for name, tensor in (flat | {"rng": want["rng"], "flags": want["flags"]}).items():
        assert got[name][1].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
    assert {n: t.kind for n, t in manifest.tensors.items()} == dict.fromkeys(("w", "s", "f8"), "model") | dict.fromkeys(
        ("optim.m", "rng", "flags"), "extra"
    )
    assert manifest.values["objects"] == {"optim.groups.0.lr": 0.1, "optim.groups.0.params": ["w"], "optim.step": 5}
    assert verify(tmp_path / "a").ok


def test_there_and_back(tmp_path: Path) -> None:
    save(tmp_path / "a", sample(), "tp=2,dp=2")
    to_dcp(tmp_path / "a", tmp_path / "dcp", options=Options(memory=1 << 20))
    target = {
        "embed.weight": torch.zeros(131, 8, dtype=torch.bfloat16),
        "scale": torch.zeros(()),
        "codes": torch.zeros(9, 4, dtype=torch.float8_e4m3fn),
    }
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in target.items():
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == sample()[name][1].tobytes()
    from_dcp(tmp_path / "dcp", tmp_path / "b", "pp=2,tp=3", trust_pickle=True)
    assert same(load(tmp_path / "b"), sample()) and diff(tmp_path / "a", tmp_path / "b").same
    reshard(tmp_path / "b", tmp_path / "c", "tp=1")
    assert same(load(tmp_path / "c"), sample())


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/should-not-exist",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for payload in (_Evil(), torch.nn.Linear(1, 1), {"x": os.path.join}):
        (tmp_path / "dcp" / METADATA).write_bytes(pickle.dumps(payload))
        with pytest.raises(CorruptError, match="the pickle asks for .* which is refused"):
            from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)
    for junk in (b"", b"junk", pickle.dumps({"a": 1})):
        (tmp_path / "dcp" / METADATA).write_bytes(junk)
        with pytest.raises(CorruptError):
            from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)


def test_objects_that_are_not_plain_are_an_error_or_left_out(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(2), "odd": {1, 2}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ImpossibleError, match="1 objects are not plain values: odd. Leave them out with --skip-objects"):
        from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)
    report = from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True, skip_objects=True)
    assert report.notes == ("left out: odd",)


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    dcp.save(state()["model"], checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = next((tmp_path / "dcp").glob("*.distcp"))
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(CorruptError, match="__0_0.distcp"):
        from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)
    path.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)


@pytest.mark.parametrize("rows", [40, 3 << 20], ids=["small", "larger than a block of ours"])
def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path, rows: int) -> None:
    words = torch.arange(rows, dtype=torch.int32).numpy().view("u4")
    dcp.save({"w": torch.from_numpy(words.view("i4")), "v": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    from_dcp(tmp_path / "dcp", tmp_path / "a", "tp=2", trust_pickle=True)
    assert load(tmp_path / "a")["w"][1].tobytes() == words.tobytes() and verify(tmp_path / "a").ok
    path = tmp_path / "dcp" / "__0_0.distcp"
    flip(path, path.read_bytes().index(words[rows // 2 :].tobytes()[:64]) + 5)
    with pytest.raises(CorruptError, match=r"__0_0.distcp, tensor w .*crc32 is"):
        from_dcp(tmp_path / "dcp", tmp_path / "b", "tp=2", trust_pickle=True)
    assert not (tmp_path / "b").exists()
