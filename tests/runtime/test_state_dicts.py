"""State dicts loaded into parallel models, and files on several ranks: what does not fit fails everywhere, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import meshpar as mp
from meshpar.checkpoint.convert.hf import from_hf
from meshpar.checkpoint.online.training import load
from meshpar.simulate import local_tensors
from tests.models import plain
from tests.pool import Pool

TIED = ("embed.weight", "head.weight")


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """As after torch.load of a file that kept the names apart."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_state_dicts() -> None:
    model, batch = plain("gpt")
    good = {n: v + 1 if v.is_floating_point() else v for n, v in state_of(model).items()}
    good["head.weight"] = good["embed.weight"].clone()
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)
        before = local_tensors(mp.full_tensor(pm.get_parameter("embed.weight")))[0].clone()
        bad = {**good, "head.weight": good["head.weight"].clone()}
        bad["head.weight"][-1, -1] *= 2
        for strict in (True, False):
            with pytest.raises(mp.CheckpointError, match=r"embed.weight and head.weight: .* at \[52, 31\]"):
                pm.load_state_dict(bad, strict=strict)
        with pytest.raises(mp.CheckpointError, match="model.embed.weight and model.head.weight"):
            nn.ModuleDict({"model": pm}).load_state_dict({f"model.{n}": v for n, v in bad.items()})
        assert torch.equal(local_tensors(mp.full_tensor(pm.get_parameter("embed.weight")))[0], before), "nothing was changed"
        with pytest.raises(mp.ConfigError, match="assign=True"):
            pm.load_state_dict(good, assign=True)
        with pytest.raises(mp.CheckpointError) as caught:
            lacking = {n: v for n, v in good.items() if not n.endswith("norm1.bias")}
            pm.load_state_dict(lacking | {f"blocks.{i}.masked_bias": torch.ones(1) for i in range(2)} | {"norm.bias": torch.ones(3)})
        text = str(caught.value)
        assert "Missing key in state_dict: blocks.*.norm1.bias (2 tensors)." in text
        assert "Unexpected key in state_dict: blocks.*.masked_bias (2 tensors)." in text
        assert "size mismatch for norm.bias: [3] in the state dict, [32] in the model." in text
        with pytest.raises(mp.CheckpointError, match="norm.weight is int64, the model's float32"):
            pm.load_state_dict({**good, "norm.weight": good["norm.weight"].long()})
        with pytest.raises(mp.CheckpointError, match="norm.weight: 32 values do not fit float32"):
            pm.load_state_dict({**good, "norm.weight": good["norm.weight"].double() * 1e300})
        found = pm.load_state_dict({n: v for n, v in good.items() if n != "head.weight"} | {"more": torch.ones(1)}, strict=False)
        assert found.missing_keys == ["head.weight"] and found.unexpected_keys == ["more"]
        pm.load_state_dict({n: v.double() for n, v in good.items()})
        assert torch.equal(local_tensors(mp.full_tensor(pm.get_parameter("head.weight")))[0], good["head.weight"])
        own = pm.state_dict()
        pm.load_state_dict(own)
        assert torch.equal(local_tensors(mp.full_tensor(pm.get_parameter("head.weight")))[0], good["head.weight"])


class Counting(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_is_not_dropped_in_silence() -> None:
    model = nn.Sequential(Counting(4, 4))
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("dp=2"), example=(torch.ones(2, 4),))
        with pytest.raises(mp.CheckpointError, match="0._extra_state: a parallel model keeps no extra state"):
            pm.load_state_dict(model.state_dict())
        pm.load_state_dict(model.state_dict(), strict=False)


def differences(folder: str) -> dict[str, Any]:
    """What each rank says where only one of them reads the element that differs."""
    found: dict[str, Any] = {}
    for spec in ("tp=2", "dp=2", "pp=2"):
        model, batch = plain("gpt")
        mesh = mp.make_mesh(spec)
        local = mp.local_batch(batch, mesh)
        with torch.device("meta"):
            bare = plain("gpt")[0]
        try:
            mp.parallelize(bare, mesh, example=local, weights=folder, config=mp.ParallelConfig(microbatches=2))
        except mp.MeshparError as error:
            found[spec] = str(error)
        pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(microbatches=2))
        try:
            load(f"{folder}-saved", pm, unexpected="skip")
        except mp.MeshparError as error:
            found[f"{spec} load"] = str(error)
        state = pm.state_dict()
        both = [state[n] for n in TIED if n in state]
        pm.load_state_dict(state)
        if len(both) == 2 and isinstance(both[0], DTensor):
            other = both[1].clone()
            if torch.distributed.get_rank() == 1 and other.to_local().numel():
                other.to_local()[-1, -1] += 1
            try:
                pm.load_state_dict({**state, TIED[1]: other})
            except mp.MeshparError as error:
                found[f"{spec} dtensors"] = str(error)
    return found


@pytest.mark.slow
def test_a_difference_in_another_ranks_part(gloo: Pool, tmp_path: Path) -> None:
    values = state_of(plain("gpt")[0])
    values["head.weight"][-1, -1] += 1  # of the last rank's part only
    (tmp_path / "hf").mkdir()
    save_file(values, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "hf-saved", "tp=2")
    everyone = gloo.run(differences, str(tmp_path / "hf"), world=2, timeout=240)
    for said in everyone:
        for spec in ("tp=2", "dp=2", "pp=2"):
            assert "embed.weight and head.weight: " in said[spec] and "at [52, 31]" in said[spec]
            assert "embed.weight and head.weight: the values in " in said[f"{spec} load"]
        assert "embed.weight and head.weight: " in said["tp=2 dtensors"] and "rank's part" in said["tp=2 dtensors"]
        assert "embed.weight and head.weight: " in said["dp=2 dtensors"]


def equal_names(folder: str) -> list[bool]:
    pm = mp.parallelize(plain("gpt")[0], mp.make_mesh("tp=2"), example=plain("gpt")[1])
    load(folder, pm)
    return [torch.equal(mp.full_tensor(pm.get_parameter(n)), mp.full_tensor(pm.get_parameter("embed.weight"))) for n in TIED]


def test_a_checkpoint_that_holds_a_tensor_twice(gloo: Pool, tmp_path: Path) -> None:
    values = state_of(plain("gpt")[0])
    (tmp_path / "hf").mkdir()
    save_file(values, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "a", "tp=1")
    assert all(all(row) for row in gloo.run(equal_names, str(tmp_path / "a"), world=2, timeout=240))
