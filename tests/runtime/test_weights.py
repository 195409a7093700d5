"""Weights from safetensors files: only the asked bytes, round trips, and what is said when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from meshpar.errors import CheckpointError
from meshpar.runtime.init import materialise, meta
from meshpar.runtime.weights import Files, Lazy, read


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.first.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)


NAMES = ["first.weight", "first.bias", "norm.weight", "norm.bias"]


def tensors(model: nn.Module, *, without: tuple[str, ...] = ("head.weight",)) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name not in without}


def saved(tmp_path: Path, values: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    save_file(values, tmp_path / name)
    return tmp_path / name


def load(path: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with meta():
        model = Net()
    found: dict[str, torch.Tensor] = {}
    buffers = materialise(model, NAMES, lambda name, value: found.update({name: read(value)}), weights=path, **options)
    return found, buffers


@pytest.fixture
def real() -> Net:
    model = Net()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.norm.running_mean):
            tensor.normal_()
    return model


def check(found: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], real: Net) -> None:
    assert sorted(found) == sorted(NAMES)
    assert all(torch.equal(found[name], real.get_parameter(name)) for name in NAMES)
    assert torch.equal(buffers["norm.running_mean"], real.norm.running_mean)
    assert buffers["table"].tolist() == [0, 1, 2]


def test_one_file(tmp_path: Path, real: Net) -> None:
    check(*load(saved(tmp_path, tensors(real))), real)
    check(*load(tmp_path), real)  # the directory


def test_a_tied_parameter_under_its_other_name(tmp_path: Path, real: Net) -> None:
    check(*load(saved(tmp_path, tensors(real, without=("first.weight",)))), real)


def test_several_files_with_an_index(tmp_path: Path, real: Net) -> None:
    values = tensors(real)
    names = sorted(values)
    halves = {"a-00001.safetensors": names[:3], "a-00002.safetensors": names[3:]}
    for file, held in halves.items():
        saved(tmp_path, {name: values[name] for name in held}, file)
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in halves.items() for name in held}}))
    check(*load(index), real)
    check(*load(tmp_path), real)
    (tmp_path / "a-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: a-00002.safetensors"):
        load(index)
    index.write_text(json.dumps({"weight_map": {"first.weights": "a-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"the index says that a-00001.safetensors holds these, but it does not: first.weights"):
        load(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r'is not an index of safetensors files: it has no "weight_map"'):
        load(index)


def test_a_plain_meta_model_computes_the_buffers_that_files_lack(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    path = saved(
        tmp_path, {name: torch.ones_like(value, device="cpu") for name, value in model.state_dict().items() if "running" not in name}
    )
    buffers = materialise(model, [name for name, _ in model.named_parameters()], lambda *_: None, weights=path)
    assert buffers["1.running_mean"].tolist() == [0, 0] and buffers["1.num_batches_tracked"] == 1


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path, real: Net) -> None:
    values = tensors(real)
    values["first.wieght"] = values.pop("first.weight")
    values["first.bias"] = values["first.bias"][:4].clone()
    values["norm.bias"] = values["norm.bias"].half()
    values["extra"] = torch.ones(1)
    with pytest.raises(CheckpointError) as caught:
        load(saved(tmp_path, values))
    text = str(caught.value)
    assert "does not fit the model." in text
    assert "first.weight is missing. Did you mean first.wieght?" in text
    assert "first.wieght is not in the model. Did you mean first.weight?" in text
    assert "extra is not in the model." in text
    assert "first.bias has shape [4], the model's [6]." in text
    assert "norm.bias is float16, the model's float32. Build the model in float16, or set a parameter dtype to cast to." in text


@pytest.mark.parametrize("carried", [True, False])
def test_a_common_prefix_is_recognised(tmp_path: Path, real: Net, carried: bool) -> None:
    path = saved(tmp_path, {f"model.{name}" if carried else name: value for name, value in tensors(real).items()})
    wrapped = nn.ModuleDict({"model": Net()})
    names = NAMES if carried else [f"model.{name}" for name in NAMES]
    with pytest.raises(CheckpointError, match=f'Its names {"carry" if carried else "lack"} the prefix "model."'):
        materialise(Net() if carried else wrapped, names, lambda *_: None, weights=path)


def test_casts_only_when_asked(tmp_path: Path, real: Net) -> None:
    path = saved(tmp_path, {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors(real).items()})
    with pytest.raises(
        CheckpointError, match=r"first.bias, first.weight, .* are bfloat16, the model's float32.*Precision\(param_dtype=torch.float32\)"
    ):
        load(path)
    found, buffers = load(path, dtype=torch.float32)
    assert torch.equal(found["first.weight"], real.first.weight.bfloat16().float())
    assert buffers["norm.running_mean"].dtype == torch.float32 and buffers["norm.num_batches_tracked"].dtype == torch.int64


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(CheckpointError, match="is not a safetensors file, or it is cut off"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"there are no weights at .*model.safetensor\. Did you mean model.safetensors\?"):
        load(tmp_path / "model.safetensor")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no"):
        load(tmp_path / "empty")


def test_a_lazy_tensor_reads_ranges(tmp_path: Path) -> None:
    full = torch.arange(48).view(8, 6)
    lazy = Files.open(saved(tmp_path, {"w": full, "s": torch.tensor(3.0)}))["w"]
    assert isinstance(lazy, Lazy) and lazy.shape == (8, 6) and lazy.dtype == torch.int64
    ranges = [(0, 0, 2), (0, 6, 7), (1, 2, 4)]
    assert torch.equal(lazy.read(ranges), full[[0, 1, 6]][:, 2:4])
    assert torch.equal(read(full, ranges), lazy.read(ranges))
    assert torch.equal(lazy.read(), full)
    assert lazy.read([(0, 3, 3)]).shape == (0, 6)
    assert Files.open(tmp_path)["s"].read().item() == 3.0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), max_size=4))
def test_ranges_of_a_tensor_in_memory(ranges: list[tuple[int, int, int]]) -> None:
    ranges = [(dim, min(a, b), max(a, b)) for dim, a, b in ranges]
    full = torch.arange(30).view(5, 6)
    wanted = full
    for dim in (0, 1):
        if any(d == dim for d, _, _ in ranges):
            rows = [i for d, a, b in ranges if d == dim for i in range(a, b)]
            wanted = wanted.index_select(dim, torch.tensor(rows, dtype=torch.int64))
    assert torch.equal(read(full, ranges), wanted)


def test_a_wholly_different_file_gets_a_short_answer(tmp_path: Path) -> None:
    path = saved(tmp_path, {f"block.{i}.weight": torch.ones(1) for i in range(300)})
    with pytest.raises(CheckpointError, match=r"block.\*.weight \(300 tensors\) is not in the model") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) < 40
