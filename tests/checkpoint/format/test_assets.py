"""What travels beside the tensors of a training run: a model's configuration unasked, other files when named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import meshpar as mp
from meshpar.checkpoint import Saving
from meshpar.checkpoint.convert.hf import to_hf
from meshpar.checkpoint.inspection import inspect, verify
from meshpar.errors import CheckpointError, ConfigError
from tests.checkpoint.making import stamped
from tests.models import text, tiny
from tests.pool import Pool


def model_of(kind: str) -> nn.Module:
    made = {
        "tied": lambda: tiny("llama", tie_word_embeddings=True),
        "bf16": lambda: AutoModelForCausalLM.from_config(tiny("llama").config, dtype=torch.bfloat16),
        "experts": lambda: tiny("mixtral", output_router_logits=False),
    }[kind]()
    made.generation_config.top_k = 7
    return made


def train_and_save(kind: str, mesh: str, path: str) -> None:
    torch.manual_seed(0)
    device_mesh = mp.make_mesh(mesh)
    own = mp.local_batch(text(8), device_mesh)
    pm = mp.parallelize(model_of(kind), device_mesh, example=own, config=mp.ParallelConfig(microbatches=2))
    optimizer = torch.optim.SGD(pm.parameters(), lr=0.1)
    pm.train_step(**own)
    optimizer.step()
    mp.checkpoint.save(path, pm, optimizer)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("kind", "mesh"), [("tied", "pp=2"), ("bf16", "tp=2"), ("experts", "ep=2")])
def test_an_exported_run_loads_with_from_pretrained(gloo: Pool, tmp_path: Path, kind: str, mesh: str) -> None:
    gloo.run(train_and_save, kind, mesh, str(tmp_path / "run"), world=2, timeout=240)
    assert verify(tmp_path / "run").ok
    to_hf(tmp_path / "run", tmp_path / "hf")
    plain = model_of(kind).eval()
    mp.checkpoint.load(tmp_path / "run", plain, unexpected="skip")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager").eval()
    assert type(again) is type(plain) and again.dtype == plain.dtype and again.generation_config.top_k == 7
    ids = text(2)["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [type(plain).__name__]


class Configured(nn.Linear):
    """A module with something called `config`."""

    def __init__(self, config: Any) -> None:
        super().__init__(3, 2)
        self.config = config


class Sayable:
    def __init__(self, facts: Any) -> None:
        self.facts = facts

    def to_dict(self) -> Any:
        return self.facts


def test_only_what_can_say_itself_in_json_is_written(tmp_path: Path) -> None:
    saved = {
        "a dict": ({"width": 3}, None),
        "a class": (Sayable, None),
        "no object": (Sayable([1]), None),
        "a plain one": (Sayable({"width": 3}), {"width": 3}),
        "one of a model": (Sayable({"model_type": "x"}), {"model_type": "x", "architectures": ["Configured"], "dtype": "float32"}),
        "an older one": (
            Sayable({"model_type": "x", "torch_dtype": None}),
            {"model_type": "x", "architectures": ["Configured"], "torch_dtype": "float32"},
        ),
    }
    for name, (config, wanted) in saved.items():
        mp.checkpoint.save(tmp_path / name, Configured(config))
        path = tmp_path / name / "assets" / "config.json"
        assert (json.loads(path.read_text()) if path.exists() else None) == wanted, name
    with pytest.warns(UserWarning, match=r"The model's config was not saved beside it: to_dict\(\) failed: .* not JSON serializable"):
        mp.checkpoint.save(tmp_path / "wrong", Configured(Sayable({"x": object()})))
    assert inspect(tmp_path / "wrong")["assets"] == []


def test_files_that_are_named_travel_along(tmp_path: Path) -> None:
    module = Configured(Sayable({"width": 3}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    mp.checkpoint.save(tmp_path / "a", module, assets=[tmp_path / "tokenizer.json"])
    named = {"config.json": str(tmp_path / "mine.json"), "empty": tmp_path / "nothing"}
    (tmp_path / "nothing").touch()
    saving = mp.checkpoint.save_async(tmp_path / "b", module, assets=named)
    (tmp_path / "mine.json").write_text("changed meanwhile")
    assert isinstance(saving, Saving)
    saving.wait()
    for name, wanted in (
        ("a", {"config.json": {"width": 3}, "tokenizer.json": {}}),
        ("b", {"config.json": {"mine": 1}, "empty": None}),
    ):
        assert verify(tmp_path / name).ok and set(inspect(tmp_path / name)["assets"]) == set(wanted)
        mp.checkpoint.reshard(tmp_path / name, tmp_path / f"{name}2", "tp=2")
        to_hf(tmp_path / f"{name}2", tmp_path / f"{name}3")
        found = {file: (tmp_path / f"{name}3" / file).read_text() for file in wanted}
        assert {file: json.loads(said) if said else None for file, said in found.items()} == wanted


def test_files_that_cannot_travel_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "x.json", tmp_path / "sub" / "x.json", tmp_path / "model.safetensors", tmp_path / "a b"):
        path.write_text("{}")
    for given, message in (
        ([tmp_path / "no.json"], "no.json is not a file"),
        ([tmp_path / "sub"], "sub is not a file"),
        ([tmp_path / "x.json", tmp_path / "sub" / "x.json"], "x.json is named twice"),
        ([tmp_path / "model.safetensors"], "model.safetensors would be taken for weights"),
        ({"../x.json": tmp_path / "x.json"}, "not accepted as a file name"),
        ([tmp_path / "a b"], "not accepted as a file name"),
        (str(tmp_path / "x.json"), "expected a list of files"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            mp.checkpoint.save(tmp_path / "run", nn.Linear(2, 2), assets=given)
        assert not (tmp_path / "run").exists() and not (tmp_path / ".run.partial").exists()


def test_a_file_that_poses_as_weights_is_not_exported(tmp_path: Path) -> None:
    mp.checkpoint.save(tmp_path / "a", Configured(Sayable({"width": 3})))
    path = tmp_path / "a" / "manifest.json"
    body = json.loads(path.read_text())
    body["assets"][0][0] = "model.safetensors"
    path.write_bytes(stamped(body))
    (tmp_path / "a" / "assets" / "config.json").rename(tmp_path / "a" / "assets" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors beside the tensors would be taken for weights"):
        to_hf(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
