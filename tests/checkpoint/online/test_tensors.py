"""Saving from gloo ranks and loading on another mesh, with DTensors of every placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from meshpar._torch import StridedShard
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.inspection import verify
from meshpar.checkpoint.online.tensors import PerRank
from meshpar.checkpoint.online.tensors import load_tensors as load
from meshpar.checkpoint.online.tensors import save_tensors as save
from meshpar.errors import CheckpointError, RankError

SECONDS = 240.0  # the first run of a pool imports everything
SHAPES = {"w": (7, 6), "fused": (12, 3), "u": (5, 5), "s": ()}


def full(name: str) -> torch.Tensor:
    torch.manual_seed(len(name))
    return torch.randn(SHAPES[name], dtype=torch.float64 if name == "u" else torch.bfloat16)


def state(mesh: DeviceMesh, placements: dict[str, Any]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {"s": full("s")}
    for name in ("w", "fused", "u"):
        out[name] = distribute_tensor(full(name), mesh, placements.get(name, [Replicate()] * mesh.ndim))
    return out


def save_on(path: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = {"fused": [Replicate(), StridedShard(0, split_factor=3)], "u": [Shard(1), Shard(0)], "w": [Shard(1), Shard(0)]}
    tensors = state(mesh, placements)
    rank = dist.get_rank()
    save(path, tensors, values={"step": 7, "position": PerRank(rank)}, per_rank={"rng": torch.full((3,), rank)}, kinds={"u": "optimizer"})


def load_on(path: str, shape: tuple[int, ...]) -> tuple[Any, Any, int]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    last = len(shape) - 1
    placements = {"w": [Replicate()] * last + [Shard(1)], "fused": [Shard(0)] * len(shape)}
    tensors = {n: torch.zeros_like(t) for n, t in state(mesh, placements).items()}
    found = load(path, tensors)
    got = {n: t.full_tensor() if n != "s" else t for n, t in tensors.items()}  # type: ignore[attr-defined]
    return {n: torch.equal(t, full(n)) for n, t in got.items()}, found.values, found.per_rank.get("position", -1)


def test_from_one_mesh_to_others(gloo: Any, tmp_path: Path) -> None:
    gloo.run(save_on, str(tmp_path / "a"), world=4, timeout=SECONDS)
    assert verify(tmp_path / "a").ok
    reshard(tmp_path / "a", tmp_path / "b", "tp=3")
    for name in "ab":
        for shape in ((2,), (2, 2)):
            world = shape[0] if len(shape) == 1 else 4
            for rank, (equal, values, position) in enumerate(gloo.run(load_on, str(tmp_path / name), shape, world=world, timeout=SECONDS)):
                assert equal == dict.fromkeys(SHAPES, True) and values == {"step": 7}
                assert position == (rank if world == 4 else -1)


def save_sharded_module(path: str) -> bool:
    """FSDP2 over a tensor-parallel module on the same dim: torch says it with a `_StridedShard`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
    module.weight = torch.nn.Parameter(distribute_tensor(_weight(), mesh["tp"], [Shard(0)]))
    fully_shard(module, mesh=mesh["dp"])
    assert isinstance(module.weight, DTensor) and isinstance(module.weight.placements[0], StridedShard)
    save(path, {"weight": module.weight.detach()})
    with torch.no_grad():
        module.weight.zero_()
    load(path, {"weight": module.weight})
    return torch.equal(module.weight.full_tensor(), _weight())


def _weight() -> torch.Tensor:
    return torch.arange(48.0, dtype=torch.float64).reshape(8, 6)


def test_fsdp_over_tensor_parallel_rows(gloo: Any, tmp_path: Path) -> None:
    assert gloo.run(save_sharded_module, str(tmp_path / "a"), world=4, timeout=SECONDS) == [True] * 4
    target = {"weight": torch.zeros(8, 6, dtype=torch.float64)}
    load(tmp_path / "a", target)
    assert torch.equal(target["weight"], _weight())


def failing_save(path: str) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    tensors = {"w": distribute_tensor(full("w"), mesh, [Shard(0)])}
    values = {"lr": 0.1 * dist.get_rank()}
    try:
        save(path, tensors, values=values)
    except (CheckpointError, RankError) as error:
        return str(error)
    return "saved"


def test_ranks_that_disagree_all_fail_and_nothing_appears(gloo: Any, tmp_path: Path) -> None:
    messages = gloo.run(failing_save, str(tmp_path / "a"), world=2, timeout=SECONDS)
    assert all("The value lr is 0.0 on one rank and 0.1 on rank 1" in text for text in messages), messages
    assert list(tmp_path.iterdir()) == []


def test_one_process_without_a_group(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": full("w")})
    target = {"w": torch.zeros(7, 6, dtype=torch.bfloat16)}
    load(tmp_path / "a", target)
    assert torch.equal(target["w"], full("w"))


def test_what_does_not_match_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": full("w"), "u": full("u")})
    w = torch.zeros(7, 6, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="holds 1 tensors that no rank asks for|does not hold v.*missing='skip'"):
        load(tmp_path / "a", {"w": w, "v": w})
    with pytest.raises(CheckpointError, match="no rank asks for: u. To leave them, unexpected='skip'"):
        load(tmp_path / "a", {"w": w})
    with pytest.raises(CheckpointError, match=r"w is \[7, 6\], but \[6, 7\] is asked for"):
        load(tmp_path / "a", {"w": torch.zeros(6, 7, dtype=torch.bfloat16)}, unexpected="skip")
    with pytest.raises(CheckpointError, match="w is BF16, but F32 is asked for. To convert it, dtype='cast'"):
        load(tmp_path / "a", {"w": w.float()}, unexpected="skip")
    assert not w.any()
    wide = w.float()
    found = load(tmp_path / "a", {"w": wide, "v": w}, unexpected="skip", missing="skip", dtype="cast")
    assert torch.equal(wide, full("w").float()) and (found.missing, found.unexpected, found.cast) == (("v",), ("u",), ("w",))
