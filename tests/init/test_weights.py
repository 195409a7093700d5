"""Weights from safetensors files: only the asked bytes, round trips, and what is said when they do not fit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from meshpar.errors import CheckpointError
from meshpar.init.fit import Weights
from meshpar.init.meta import materialise, meta
from meshpar.init.weights import Files, Lazy, read


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


# ---- names of one tensor ---------------------------------------------------------------------------------------------------------------


class Thrice(nn.Module):
    """One weight under three names, one table under two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.b.weight = self.c.weight = self.a.weight
        self.a.register_buffer("table", torch.arange(3.0))
        self.b.register_buffer("table", self.a.table)


THRICE = ("a.weight", "b.weight", "c.weight")


def loaded(path: Path | Weights, model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    names = [name for name, _ in model.named_parameters()]
    buffers = materialise(model, names, lambda name, value: found.update({name: read(value).clone()}), weights=path)
    return found | buffers


@pytest.mark.parametrize("on_meta", [True, False])
@pytest.mark.parametrize("held", [("c.weight",), ("b.weight", "a.weight"), THRICE])
def test_one_tensor_of_three_names(tmp_path: Path, held: tuple[str, ...], on_meta: bool) -> None:
    with meta() if on_meta else nullcontext():
        model = Thrice()
    values = {name: torch.full((3, 3), 2.0) for name in held} | {"b.table": torch.ones(3)}
    found = loaded(saved(tmp_path, values), model)
    assert found["a.weight"].eq(2).all()
    assert found["a.table"].eq(1).all() and found["b.table"].eq(1).all(), "a buffer under its other name"
    if len(held) > 1:
        first, last = min(held), max(held)
        values[last][2, 1] = 5.0
        with pytest.raises(CheckpointError, match=rf"{first} and {last}: 2.0 and 5.0 at \[2, 1\]"):
            loaded(saved(tmp_path, values), model)
        with pytest.warns(UserWarning, match="were left in the file"):
            found = loaded(Weights(tmp_path, unexpected=[n for n in held if n != last]), model)
        assert found["a.weight"][2, 1] == 5


def test_buffers_of_two_names_and_of_no_name(tmp_path: Path) -> None:
    values = {"a.weight": torch.ones(3, 3), "a.table": torch.ones(3), "b.table": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"a.table and b.table: 1.0 and 0.0 at \[0\]"):
        loaded(saved(tmp_path, values), Thrice())
    values = tensors(Net()) | {"table": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="table is not in the model"):  # not persistent: the model computes it itself
        loaded(saved(tmp_path, values), Net())
    with pytest.warns(UserWarning, match="these were left in the file: table"):
        assert loaded(Weights(saved(tmp_path, values), unexpected=["table"]), Net())["table"].tolist() == [0, 1, 2]


def test_shared_modules_parametrizations_and_files_in_pieces(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleList([layer, layer, parametrizations.weight_norm(nn.Linear(3, 3)), parametrizations.weight_norm(nn.Linear(3, 3))])
    one, other = model[2], model[3]
    other.parametrizations.weight.original1 = one.parametrizations.weight.original1  # type: ignore[union-attr]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    names = sorted(values)
    for wrong in (None, "1.bias", "3.parametrizations.weight.original1"):
        given = {name: value + 1 if name == wrong else value for name, value in values.items()}
        halves = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
        for file, part in halves.items():
            saved(tmp_path, {name: given[name] for name in part}, file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
        if wrong is None:
            assert torch.equal(loaded(tmp_path, model)["0.bias"], layer.bias)
        else:
            with pytest.raises(CheckpointError, match=wrong):
                loaded(tmp_path, model)


def test_dtypes_of_two_names(tmp_path: Path) -> None:
    values = {"a.weight": torch.full((3, 3), 0.5), "b.weight": torch.full((3, 3), 0.5).bfloat16(), "a.table": torch.ones(3)}
    with pytest.raises(CheckpointError, match="b.weight is bfloat16, the model's float32"):
        loaded(saved(tmp_path, values), Thrice())
    assert loaded(Weights(saved(tmp_path, values), dtype="cast"), Thrice())["a.weight"].eq(0.5).all()
    values["a.weight"][0, 0] = 0.1
    values["b.weight"][0, 0] = 0.1  # equal after rounding only
    with pytest.raises(CheckpointError, match="a.weight and b.weight: 0.1"):
        loaded(Weights(saved(tmp_path, values), dtype="cast"), Thrice().bfloat16())
    values["b.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"b.weight has shape \[3\], the model's \[3, 3\]"):
        loaded(saved(tmp_path, values), Thrice())


# ---- what a file lacks, and what else it has -------------------------------------------------------------------------------------------


def test_a_new_head_keeps_the_initialisation_of_the_model(tmp_path: Path) -> None:
    def model() -> nn.ModuleDict:
        torch.manual_seed(5)
        return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})

    expected = model()
    values = {"body.weight": torch.ones(3, 3), "body.bias": torch.ones(3), "body.masked_bias": torch.tensor(-1e4)}
    path = saved(tmp_path, values)
    with meta():
        torch.manual_seed(5)
        bare = model()
    with pytest.raises(CheckpointError, match=r"head.weight is missing(.|\n)*body.masked_bias is not in the model"):
        loaded(path, bare)
    with pytest.warns(UserWarning) as said:
        found = loaded(Weights(path, missing=["head.*"], unexpected=["*.masked_bias"]), bare)
    assert [str(w.message).partition(": ")[2] for w in said] == [
        "the file lacks these; they have the values of the model's own initialisation: head.weight, head.bias.",
        "these were left in the file: body.masked_bias.",
    ]
    assert torch.equal(found["head.weight"], expected["head"].weight) and found["body.weight"].eq(1).all()
    with pytest.warns(UserWarning):
        found = loaded(Weights(path, missing="skip", unexpected="skip"), expected)
    assert torch.equal(found["head.bias"], expected["head"].bias)
    with pytest.raises(CheckpointError, match=r"missing=\['haed.\*'\] matches no name. Did you mean head"):
        loaded(Weights(path, missing=["haed.*"], unexpected="skip"), bare)


def test_what_a_model_says_it_can_do_without(tmp_path: Path, real: Net) -> None:
    path = saved(tmp_path, tensors(real) | {"h.0.attn.masked_bias": torch.ones(1)})
    real._keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.masked_bias"]  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="left in the file: h.0.attn.masked_bias"):
        loaded(path, real)


def test_casts_never_make_infinities_and_never_of_8_bits(tmp_path: Path) -> None:
    values = {"a.weight": torch.full((3, 3), 1e5), "a.table": torch.ones(3)}
    with pytest.raises(CheckpointError, match="a.weight: 9 values up to 100000 do not fit float16"):
        loaded(Weights(saved(tmp_path, values), dtype="cast"), Thrice().half())
    values["a.weight"] = torch.ones(3, 3).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="8-bit floats have scales of their own"):
        loaded(Weights(saved(tmp_path, values), dtype="cast"), Thrice())


def test_an_index_that_does_not_tell_the_truth(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, "m-1.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="m-1.safetensors holds these, which the index does not place there .*: b"):
        Files.open(index)
    index.write_text('{"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "a": "m-2.safetensors"}}')
    with pytest.raises(CheckpointError, match="the index names a twice, in m-1.safetensors and in m-2.safetensors"):
        Files.open(index)


def test_parts_of_a_checkpoint_are_not_weights(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(1)}, "rank-00000.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"looks like a checkpoint of meshpar.*to-hf"):
        Files.open(tmp_path)
