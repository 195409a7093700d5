"""Hugging Face folders in and out, and torch's own readers on our shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.opened import INDEX, open_checkpoint
from meshpar.checkpoint.inspection import diff, verify
from meshpar.errors import ConfigError
from tests.checkpoint.making import bits, load, same, sample, save, save_folder


def test_one_file_or_many_and_the_files_beside_them(tmp_path: Path) -> None:
    tensors = sample()
    assets = {"config.json": '{"model_type": "x"}', "tokenizer.json": "{}", "merges.txt": "a b"}
    save_folder(tmp_path / "hf", tensors, 3, assets)
    from_hf(tmp_path / "hf", tmp_path / "a", "tp=2,dp=2")
    reshard(tmp_path / "a", tmp_path / "b", "pp=2")
    to_hf(tmp_path / "b", tmp_path / "one")
    to_hf(tmp_path / "b", tmp_path / "many", shard_bytes=600)
    for name in ("one", "many"):
        assert same(load(tmp_path / name), tensors)
        assert {n: (tmp_path / name / n).read_text() for n in assets} == assets
        assert diff(tmp_path / "hf", tmp_path / name).same and verify(tmp_path / name).ok
    assert (tmp_path / "one" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(a.nbytes for _, a in tensors.values())


def test_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    save_folder(tmp_path / "hf", sample())
    from_hf(tmp_path / "hf" / "model.safetensors", tmp_path / "a", "tp=3")
    assert same(load(tmp_path / "a"), sample())


def test_the_safetensors_library_reads_what_we_export(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save(tmp_path / "a", {"w": ("F32", bits("F32", (6, 5))), "b": ("BOOL", bits("BOOL", (3,))), "s": ("F64", bits("F64", ()))}, "tp=2")
    to_hf(tmp_path / "a", tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert np.array_equal(got["w"].view("u4"), bits("F32", (6, 5))) and got["s"].shape == () and got["b"].dtype == bool


def test_only_the_model_is_exported(tmp_path: Path) -> None:
    tensors = {"w": ("F32", bits("F32", (6, 5))), "optim/w/m": ("F32", bits("F32", (6, 5)))}
    save(tmp_path / "a", tensors, "tp=2", kinds={"optim/w/m": "optimizer"})
    report = to_hf(tmp_path / "a", tmp_path / "hf")
    assert list(load(tmp_path / "hf")) == ["w"] and "1 tensors of the optimizer" in report.notes[0]


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    tensors = {f"w{k}": ("F32", bits("F32", (4,))) for k in range(4)}
    root = save_folder(tmp_path / "hf", tensors, 2)
    good = json.loads((root / INDEX).read_text())["weight_map"]
    cases = {
        "does not place there": {k: v for k, v in good.items() if k != "w0"},
        "names 1 tensors that its files do not hold: w9": good | {"w9": good["w0"]},
        "not accepted as a file name": good | {"w0": "../x.safetensors"},
        "not accepted as a file": good | {"w0": "/etc/passwd"},
        "not accepted as a": good | {"w0": 3},
        "is missing": good | {"w9": "model-00009.safetensors"},
        "has no weight_map": {},
        "mixes two exports": good | {"w0": good["w1"]},
    }
    for message, table in cases.items():
        (root / INDEX).write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CorruptError, match=message):
            from_hf(root, tmp_path / "a", "tp=2")


def test_links_into_a_hub_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    """The cache of huggingface_hub keeps files in blobs/ and links to them from snapshots/."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    save_folder(snapshot, sample(), 1, {"config.json": "{}"})
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"sha-{path.name}")
        path.symlink_to(os.path.relpath(blobs / f"sha-{path.name}", snapshot))
    from_hf(snapshot, tmp_path / "a", "tp=2")
    assert same(load(tmp_path / "a"), sample())
    assert (tmp_path / "a" / "assets" / "config.json").read_text() == "{}"
    outside = save_folder(tmp_path / "elsewhere", sample())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CorruptError, match="is a symbolic link to .* outside the folder: refused"):
        from_hf(tmp_path / "hf", tmp_path / "b", "tp=2")


def test_a_link_named_in_a_manifest_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", sample())
    for name in ("manifest.json", "rank-00000.safetensors"):
        path = tmp_path / "a" / name
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
        with pytest.raises(CorruptError, match=f"{name} is a symbolic link"):
            load(tmp_path / "a")
        path.unlink()
        (tmp_path / "moved").rename(path)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(CorruptError, match="holds no checkpoint"):
        open_checkpoint(tmp_path / "x")
    with pytest.raises(ConfigError, match="does not exist"):
        open_checkpoint(tmp_path / "y")
    save(tmp_path / "a", sample())
    with pytest.raises(ConfigError, match="use `meshpar checkpoint reshard`"):
        from_hf(tmp_path / "a", tmp_path / "b", "tp=2")


def test_torchs_reader_loads_our_shards(tmp_path: Path) -> None:
    """Row, column and fused shards, several boxes per rank, on another division: bit-exact."""
    import torch
    import torch.distributed.checkpoint as dcp

    from meshpar.checkpoint.format.boxes import Cut
    from meshpar.checkpoint.format.division import Layout
    from meshpar.sharding.types import Shard, plain

    tensors = {
        "w": ("F32", bits("F32", (7, 5))),
        "qkv": ("BF16", bits("BF16", (16, 3))),
        "s": ("F32", bits("F32", ())),
        "i": ("I64", bits("I64", (4,))),
    }
    layouts = {
        "qkv": Layout((Cut("tp", Shard(0, 1, ((4, 2), (2, 2), (2, 2)))),)),
        "w": Layout((Cut("tp", plain(1, 5)), Cut("dp", plain(0, 7)))),
    }
    save(tmp_path / "a", tensors, "dp=2,tp=2", layouts)
    state = {
        "w": torch.zeros(7, 5),
        "qkv": torch.zeros(16, 3, dtype=torch.bfloat16),
        "s": torch.zeros(()),
        "i": torch.zeros(4, dtype=torch.int64),
    }
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "a")), no_dist=True)
    for name, (_, words) in tensors.items():
        assert state[name].reshape(-1).view(torch.uint8).numpy().tobytes() == words.tobytes(), name


def test_an_exported_folder_loads_with_from_pretrained(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 67,
    }
    ids = torch.arange(12).reshape(1, 12) % 67
    configs = (LlamaConfig(**sizes, tie_word_embeddings=True), MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    for k, config in enumerate(configs):
        torch.manual_seed(0)
        model = (LlamaForCausalLM, MixtralForCausalLM)[k](config).eval()
        model.save_pretrained(tmp_path / f"hf{k}")
        from_hf(tmp_path / f"hf{k}", tmp_path / f"a{k}", "ep=2,tp=2")
        reshard(tmp_path / f"a{k}", tmp_path / f"b{k}", "tp=3,pp=2")
        to_hf(tmp_path / f"b{k}", tmp_path / f"back{k}", shard_bytes=20_000)
        again = type(model).from_pretrained(tmp_path / f"back{k}").eval()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again(ids).logits)
        assert diff(tmp_path / f"hf{k}", tmp_path / f"back{k}").same
