"""Layouts of parameters: parts, DTensors, and the original order back, on real and on simulated ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from meshpar.config import ParallelConfig
from meshpar.runtime import data_parallel
from meshpar.runtime.parameters.specs import ParameterSpec, distribute, full_grad, full_tensor, is_exact, local_part, spec_of
from meshpar.sharding.types import I, Shard, plain
from tests.pool import Pool
from tests.runtime.models import make_batch, make_net, make_tree, world_mesh

LAYOUTS = {
    "plain": plain(0, 8),
    "uneven": plain(0, 7),
    "empty on one": plain(0, 1),
    "second dim": plain(1, 6),
    "equal stretches": Shard(0, 1, ((4, 1), (4, 1))),
    "equal stretches of the second dim": Shard(1, 2, ((4, 1),)),
    "uneven stretches": Shard(0, 3, ((3, 1),)),
    "segments": Shard(0, 1, ((4, 2), (2, 2), (2, 2))),
    "whole units": Shard(0, 1, ((3, 4),)),
}


def spec(type_: Shard, *, other: int = 6) -> ParameterSpec:
    shape = (type_.length, other) if type_.dim == 0 else (8, type_.length)
    return ParameterSpec("w", shape, torch.float64, True, {"tp": type_})


def full(of: ParameterSpec) -> torch.Tensor:
    return torch.arange(torch.Size(of.shape).numel(), dtype=torch.float64).view(of.shape)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_parts_cover_the_whole_once(data: st.DataObject) -> None:
    segments = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3))
    type_ = Shard(data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3)), tuple(segments))
    size = data.draw(st.integers(1, 4))
    of = spec(type_)
    whole = full(of)
    parts = [local_part(whole, of, {"tp": (size, r)}) for r in range(size)]
    assert sorted(torch.cat([p.flatten() for p in parts]).tolist()) == whole.flatten().tolist()
    assert [tuple(p.shape) for p in parts] == [of.local_shape({"tp": (size, r)}) for r in range(size)]
    assert all(p.is_contiguous() for p in parts)


def test_axes_nest_in_the_order_of_the_layout() -> None:
    of = ParameterSpec("w", (8,), torch.int64, False, {"dp": plain(0, 8), "tp": plain(0, 4)})
    assert local_part(torch.arange(8), of, {"dp": (2, 1), "tp": (2, 1)}).tolist() == [6, 7]
    assert local_part(torch.arange(8), ParameterSpec("w", (8,), torch.int64, False, {"tp": I}), {"tp": (2, 1)}).tolist() == list(range(8))


def gather_all() -> dict[str, Any]:
    """Per layout: the full tensor, the full gradient, and what DTensor itself makes of it."""
    mesh = world_mesh("dp=2,tp=2")
    found = {}
    for name, type_ in LAYOUTS.items():
        of = spec(type_)
        p = distribute(full(of), of, mesh)
        p.grad = p.detach() * 2
        exact = is_exact(type_, 2)
        found[name] = (full_tensor(p), full_grad(p), exact, p.full_tensor() if exact else None, tuple(p.shape))  # type: ignore[attr-defined]
    return found


def check_gathered(found: dict[str, Any]) -> None:
    for name, (whole, grad, exact, by_torch, shape) in found.items():
        expected = full(spec(LAYOUTS[name]))
        assert shape == tuple(expected.shape)
        assert torch.equal(whole, expected), name
        assert torch.equal(grad, 2 * expected), name
        assert by_torch is None or torch.equal(by_torch, expected), name
        assert exact == (name not in ("segments", "whole units", "uneven stretches")), name


def test_full_tensors_of_every_layout(gloo: Pool) -> None:
    for found in gloo.run(gather_all, world=4):
        check_gathered(found)


def test_full_tensors_on_simulated_ranks(simulated: Any) -> None:
    whole = {name: full(spec(type_)) for name, type_ in LAYOUTS.items()}
    found = {}
    with simulated(4):
        mesh = world_mesh("dp=2,tp=2")
        for name, type_ in LAYOUTS.items():
            p = distribute(whole[name], spec(type_), mesh)
            p.grad = p.detach() * 2
            found[name] = full_tensor(p), full_grad(p)
    for name, (tensor, grad) in found.items():
        assert type(tensor) is type(grad) is torch.Tensor
        assert torch.equal(tensor, whole[name]) and torch.equal(grad, 2 * whole[name]), name


def save_and_load(mesh_spec: str, mode: str) -> dict[str, Any]:
    """A state dict as any torch code reads it, then loaded into a tree of other values: from DTensors, then from full tensors."""
    mesh = world_mesh(mesh_spec)
    tree = make_tree(make_net(), mesh)
    data_parallel.apply(tree, mesh, ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]
    state = tree.state_dict()
    read = {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in state.items()}
    kinds = {n: type(v).__name__ for n, v in state.items()}
    loaded = []
    for source in ({n: v.clone() for n, v in state.items()}, {n: v.clone() for n, v in read.items()}):
        with torch.no_grad():
            for p in tree.parameters():
                p.fill_(7.0)
        tree.load_state_dict(source)
        loaded.append({n: full_tensor(p) for n, p in tree.named_parameters()})
    (loss,) = tree.run("train", *make_batch())
    loss.backward()
    return {"read": read, "kinds": kinds, "loaded": loaded, "loss": loss.item(), "marked": all(spec_of(p) for p in tree.parameters())}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh, mode", [("dp=2,tp=2", "zero3"), ("tp=2", "zero3"), ("dp=2,tp=2", "replicate")])
def test_state_dicts_tell_the_true_order(gloo: Pool, mesh: str, mode: str) -> None:
    net = make_net()
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for found in gloo.run(save_and_load, mesh, mode, world=2 if mesh == "tp=2" else 4):
        assert list(found["read"]) == list(expected)
        assert found["kinds"]["layers.0.fused.weight"] == "DTensor" and found["marked"]
        for name, value in expected.items():
            assert torch.equal(found["read"][name], value), name
        for loaded in found["loaded"]:
            for name, value in net.named_parameters():
                assert torch.equal(loaded[name], value), name
        assert found["loss"] == pytest.approx(net(*make_batch()).item(), rel=1e-12)
