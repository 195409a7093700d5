"""Meshes: what is accepted, what every error says, ranks on each axis, shares of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from meshpar import roles
from meshpar._torch import FakeStore
from meshpar.consensus import agree, check_batch
from meshpar.errors import BatchError, ConfigError
from meshpar.mesh import (
    Axis,
    axis,
    check_mesh,
    data_axis,
    data_rank,
    format_mesh,
    local_batch,
    make_mesh,
    mesh_sizes,
    nearest_meshes,
    parse_mesh,
    rank_grid,
    typed_axes,
)
from meshpar.simulate import local_tensors


@contextmanager
def fake(size: int, rank: int = 0) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_parse_and_format() -> None:
    assert parse_mesh("pp=2, dp=4,tp=8") == {"pp": 2, "dp": 4, "tp": 8}
    assert format_mesh(parse_mesh({"dp_replicate": 2, "dp_shard": 4})) == "dp_replicate=2,dp_shard=4"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tp=2,dp=2", 'outermost first. Write "dp=2,tp=2".'),
        ("dp=2,tq=2", "unknown axis 'tq'; axes are pp, dp, dp_replicate, dp_shard, cp, ep, tp. Did you mean tp?"),
        ("tp=2,tp=2", "axis 'tp' is given 2 times."),
        ("dp=2,dp_shard=2", "dp and dp_replicate / dp_shard are two ways to say the same"),
        ("tp=0", "tp=0: a size is a whole number of at least 1."),
        ("tp", '"tp" is not name=size, as in "dp=2,tp=4".'),
        ("tp=two", '"tp=two" is not name=size'),
        ("", '"" is not name=size'),
    ],
)
def test_one_clear_error_for_each_mistake(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_mesh(spec)


def test_a_mesh_that_does_not_fit_is_told_which_do() -> None:
    with fake(16), pytest.raises(ConfigError) as caught:
        make_mesh("pp=2,dp=2,tp=2")
    assert str(caught.value) == (
        'mesh "pp=2,dp=2,tp=2" needs 8 ranks, but there are 16 ranks. Meshes that fit: "pp=2,dp=2,tp=4" or "pp=2,dp=4,tp=2" or '
        '"pp=4,dp=2,tp=2". Or start 8 processes with `torchrun --nproc-per-node 8 ...`, or simulate them with `with mp.simulate(8):`.'
    )


@given(st.dictionaries(st.sampled_from(("pp", "dp", "cp", "ep", "tp")), st.integers(1, 8), min_size=1), st.integers(1, 48))
def test_nearest_meshes_fit_and_start_with_the_mesh_itself(sizes: dict[str, int], world: int) -> None:
    sizes = {name: sizes[name] for name in roles.names() if name in sizes}
    found = nearest_meshes(sizes, world)
    assert found and all(prod(mesh.values()) == world for mesh in found)
    assert len({tuple(mesh.items()) for mesh in found}) == len(found)
    for mesh in found:
        assert parse_mesh(mesh) == mesh
    if prod(sizes.values()) == world:
        assert found[0] == sizes


def test_axes_of_a_rank() -> None:
    with fake(16, rank=5):
        mesh = make_mesh("pp=2,dp=2,ep=2,tp=2")
        check_mesh(mesh)
        assert mesh_sizes(mesh) == {"pp": 2, "dp": 2, "ep": 2, "tp": 2}
        tp = axis(mesh, "tp")
        assert (tp.name, tp.size, tp.rank) == ("tp", 2, 1)
        assert tp.group == mesh.get_group("tp").group_name
        assert axis(mesh, "cp") == Axis("cp", 1, 0, "")
        with pytest.raises(ConfigError, match=r"no mesh axis named 'tpp'.*Did you mean tp"):
            axis(mesh, "tpp")
        data = data_axis(mesh)
        assert (data.name, data.size, data.rank) == ("dp_ep", 4, 2)
        assert data_axis(mesh) == data
        assert data_rank(mesh) == (2, 4)
        assert [(a.name, a.size) for a in typed_axes(mesh)] == [("dp", 2), ("ep", 2), ("tp", 2)]


def test_a_mesh_without_data_axes() -> None:
    with fake(4):
        mesh = make_mesh("tp=4")
        assert data_axis(mesh) == Axis("dp", 1, 0, "")
        assert local_batch(torch.arange(3), mesh).tolist() == [0, 1, 2]


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match='mesh "tp=2" needs 2 ranks, but this is one process. Meshes that fit: "tp=1"'):
        make_mesh("tp=2")
    assert not dist.is_initialized()
    mesh = make_mesh("dp=1,tp=1", "cpu")
    assert axis(mesh, "tp").rank == 0
    agree("a", mesh, "the plan")
    check_batch({"x": torch.ones(2)}, mesh)


def test_user_built_meshes_are_checked() -> None:
    with fake(4):
        with pytest.raises(ConfigError, match=re.escape('mesh_dim_names=("dp", "tp")')):
            check_mesh(init_device_mesh("cpu", (2, 2)))
        with pytest.raises(ConfigError, match="unknown axis 'model'"):
            check_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "model")))
        with pytest.raises(ConfigError, match="outermost first"):
            check_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp")))
        with pytest.raises(ConfigError, match="mesh is a str, not a DeviceMesh"):
            check_mesh("tp=2")  # type: ignore[arg-type]
        whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        check_mesh(whole)
        check_mesh(whole["tp"])
        assert axis(whole["tp"], "tp") == axis(whole, "tp")


def test_local_batch() -> None:
    with fake(4, rank=3):
        mesh = make_mesh("dp=2,tp=2")
        batch = local_batch({"x": torch.arange(8).view(4, 2), "scale": torch.tensor(3.0), "name": "a", "more": [torch.arange(2)]}, mesh)
        assert batch["x"].tolist() == [[4, 5], [6, 7]]
        assert batch["scale"] == 3.0 and batch["name"] == "a" and batch["more"][0].tolist() == [1]
        with pytest.raises(BatchError, match=r"divisible by the 2 data ranks .*torch.stack.*: \['y'\] has 3 samples"):
            local_batch({"x": torch.ones(2), "y": torch.ones(3)}, mesh)


def test_rank_grid_shows_both_factorisations() -> None:
    with fake(8):
        assert rank_grid(make_mesh("dp=2,ep=2,tp=2")).splitlines() == [
            "dp=2,ep=2,tp=2: 8 ranks",
            "dense layers: data=4 x tp=2   (data = dp x ep)",
            "    data 0: 0 1",
            "    data 1: 2 3",
            "    data 2: 4 5",
            "    data 3: 6 7",
            "expert layers: edp=2 x ep=2 x tp=2   (edp = dp)",
            "    edp 0 ep 0: 0 1",
            "    edp 0 ep 1: 2 3",
            "    edp 1 ep 0: 4 5",
            "    edp 1 ep 1: 6 7",
        ]


def test_rank_grid_of_the_reference_configuration() -> None:
    with fake(1024):
        lines = rank_grid(make_mesh("pp=4,dp=8,ep=8,tp=4")).splitlines()
    assert lines[1] == "dense layers: pp=4 x data=64 x tp=4   (data = dp x ep)"
    assert "expert layers: pp=4 x edp=8 x ep=8 x tp=4   (edp = dp)" in lines
    assert len(lines) < 100


def test_simulated_ranks(simulated: Callable[[int], Any]) -> None:
    with simulated(4):
        mesh = make_mesh("dp=2,tp=2")
        check_mesh(mesh)
        assert axis(mesh, "tp").rank == -1 and data_rank(mesh) == (-1, 2)
        for batch in (torch.arange(4), torch.arange(4) * 1):
            share = local_tensors(local_batch({"x": batch}, mesh)["x"])
            assert [share[r].tolist() for r in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
        agree("a", mesh, "the plan")
