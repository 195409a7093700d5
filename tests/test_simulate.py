"""Simulated ranks: entering and leaving, work per rank, autograd, and DTensor on top."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from meshpar import generators
from meshpar._torch import LocalTensor, on_simulated_ranks
from meshpar.errors import ConfigError
from meshpar.simulate import axis_rank, is_simulated, local_tensors, per_rank, ranks, simulate
from tests.pool import Pool

TORCHS = vars(LocalTensor)["__torch_dispatch__"]


def test_enters_and_leaves() -> None:
    assert not is_simulated() and not dist.is_initialized()
    with simulate(3) as world:
        assert is_simulated() and dist.get_world_size() == 3 == world.size
        assert ranks() == (0, 1, 2) == tuple(world)
    assert not is_simulated() and not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), simulate(2):
        _ = 1 / 0
    assert not is_simulated() and not dist.is_initialized()


def test_does_not_nest() -> None:
    with simulate(2), pytest.raises(ConfigError, match=r"simulate\(\) inside simulate\(\)"), simulate(2):
        pass


def simulate_here() -> str:
    try:
        with simulate(2):
            return "entered"
    except ConfigError as error:
        return str(error)


def test_refuses_inside_a_real_process_group(gloo: Pool) -> None:
    found = gloo.run(simulate_here, world=2)
    assert "rank 1 of a real gloo process group" in found[1] and "destroy_process_group" in found[1]


def test_per_rank_maps_tensors_of_any_dtype() -> None:
    with simulate(3):
        for dtype in (torch.float64, torch.int64, torch.bool, torch.bfloat16):
            x = per_rank(lambda rank, d=dtype: torch.tensor([rank, 1]).to(d))
            low, high = per_rank(lambda rank, t: (t[:1], t[1:]), x)
            assert [t.tolist() for t in local_tensors(low).values()] == [torch.tensor([r]).to(dtype).tolist() for r in range(3)]
            assert all(t.item() == 1 for t in local_tensors(high).values())
        uneven = per_rank(lambda rank: torch.arange(rank))
        assert [t.numel() for t in local_tensors(uneven + 1).values()] == [0, 1, 2]
        with pytest.raises(ValueError, match="differ in tensors only"):
            per_rank(lambda rank: rank)


def test_ranks_that_lay_out_a_tensor_otherwise() -> None:
    """An expanded value on one rank, new zeros on another: operators ask the strides of one rank for all."""
    with simulate(2):
        x = per_rank(lambda rank: torch.ones(2, 1).expand(2, 3) if rank == 0 else torch.arange(6.0).view(2, 3))
        assert [t.tolist() for t in local_tensors(x.reshape(6)).values()] == [[1.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
        uneven = per_rank(lambda rank: torch.arange(6.0 + 3 * rank).view(3, -1).t())
        assert [t.tolist()[1] for t in local_tensors(uneven.reshape(-1, 3)).values()] == [[1.0, 3.0, 5.0], [1.0, 4.0, 7.0]]


def test_per_rank_without_simulation_runs_once() -> None:
    x = torch.ones(2)
    assert per_rank(lambda rank, t: (rank, t), x) == (0, x)
    assert list(local_tensors(x)) == [0]


def test_autograd_runs_for_all_ranks() -> None:
    with simulate(2):
        w = per_rank(lambda rank: torch.tensor([2.0 + rank], dtype=torch.float64)).requires_grad_()
        (w**3).sum().backward()
        assert [t.item() for t in local_tensors(w.grad).values()] == [12, 27]


def test_coordinates_on_every_axis_of_a_mesh() -> None:
    with simulate(12):
        mesh = dist.init_device_mesh("cpu", (2, 3, 2), mesh_dim_names=("pp", "dp", "tp"))
        for place, name in enumerate(("pp", "dp", "tp")):
            group = mesh.get_group(name).group_name
            assert [axis_rank(group, rank) for rank in range(12)] == [(rank // 6, rank // 2 % 3, rank % 2)[place] for rank in range(12)]
        both = mesh["pp", "tp"]._flatten("pp_tp").get_group().group_name
        assert [axis_rank(both, rank) for rank in range(12)] == [rank // 6 * 2 + rank % 2 for rank in range(12)]


def test_dtensors_in_and_out() -> None:
    whole = torch.arange(24, dtype=torch.float64).view(6, 4)
    with simulate(4):
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        local = per_rank(lambda rank: whole[3 * (rank // 2) : 3 * (rank // 2) + 3, 2 * (rank % 2) : 2 * (rank % 2) + 2]).requires_grad_()
        x = DTensor.from_local(local, mesh, (Shard(0), Shard(1)))
        assert x.shape == (6, 4)
        (x.full_tensor() * whole).sum().backward()
        for rank, t in local_tensors(x.full_tensor().detach()).items():
            assert t.equal(whole), rank
        assert local.grad is not None and local.grad.shape == (3, 2)
        y = distribute_tensor(whole, mesh, (Shard(1), Replicate()))
        assert all(t.shape == (6, 2) for t in local_tensors(y.to_local()).values())


def test_the_hook_of_uncaught_errors_is_the_users_again() -> None:
    before = sys.excepthook
    for _ in range(2):
        with simulate(2):
            assert sys.excepthook is not before, "torch's, which names the rank"
        assert sys.excepthook is before
    try:
        with simulate(2):
            sys.excepthook = own = lambda *error: None
        assert sys.excepthook is own, "one that was set inside stays"
    finally:
        sys.excepthook = before


@pytest.mark.parametrize("uneven", [False, True])
def test_views_lie_where_torch_says(uneven: bool) -> None:
    """Where a view lies is told at once, not by torch's way; also where every rank's lies elsewhere."""
    aten = torch.ops.aten
    with simulate(2):
        ours = vars(LocalTensor)["__torch_dispatch__"]
        assert ours is not TORCHS
        whole = per_rank(lambda rank: torch.arange(24.0).view(4, 6)[: 4 - rank * uneven, rank * uneven :])
        views = [whole.t(), whole.t()[1:], *whole.split(2), whole[1], whole.unsqueeze(0).expand(3, -1, -1), whole.detach()]
        for view in views:
            assert view.untyped_storage()._cdata == whole.untyped_storage()._cdata
            for asked in (aten.sym_size.default, aten.sym_stride.default, aten.sym_storage_offset.default):
                told = [way.__func__(LocalTensor, asked, (LocalTensor,), (view,)) for way in (ours, TORCHS)]
                one, other = (list(map(str, n)) if isinstance(n, tuple | list) else [str(n)] for n in told)
                assert one == other, asked
    assert vars(LocalTensor)["__torch_dispatch__"] is TORCHS


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum of ranks' and shared": lambda x, shared: x + shared[:1, :1],
    "view": lambda x, shared: x.t(),
    "view of a view": lambda x, shared: x.t()[1:].unsqueeze(0),
    "written through a view": lambda x, shared: (x[0].mul_(2), x),
    "in place": lambda x, shared: x.add_(x),
    "in place, of a shared one": lambda x, shared: shared.clone().mul_(2),
    "copied": lambda x, shared: x.copy_(x * 2),
    "resized in place": lambda x, shared: (x.unsqueeze_(0), x),
    "out": lambda x, shared: torch.mul(x, 2.0, out=torch.empty_like(x)),
    "list": lambda x, shared: torch.cat([x, x * 2]),
    "several": lambda x, shared: torch.max(x, 1),
    "split": lambda x, shared: x.split(3),
    "of a size of ranks": lambda x, shared: torch.zeros(x.shape[0]) + x.numel(),
    "number": lambda x, shared: x.new_ones(1).item(),
    "kind": lambda x, shared: torch.result_type(x, 2.0),
    "drawn": lambda x, shared: torch.rand_like(x),
    "dropout": lambda x, shared: torch.dropout(x, 0.5, True),
    "made": lambda x, shared: torch.arange(3),
    "shared alone": lambda x, shared: shared * 2,
    "hash of empty": lambda x, shared: torch.hash_tensor(x[:0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("uneven", [False, True])
def test_calls_are_what_torch_makes_of_them(call: str, uneven: bool) -> None:
    """Most calls are answered in a shorter way than torch's: with the same values, kinds and places."""

    def found(way: Callable[..., object]) -> list[object]:
        torch.manual_seed(0)
        with simulate(2), patch.object(generators, "on_simulated_ranks", way):
            x = per_rank(lambda rank: torch.arange(24.0).view(4, 6)[: 4 - rank * uneven] * (rank + 1))
            made = CALLS[call](x, shared)
            made = made if isinstance(made, tuple | list) else (made,)
            return [_told(one, x) for one in (x, *made)]

    shared = torch.arange(24.0).view(4, 6)
    assert found(on_simulated_ranks) == found(lambda *_: NotImplemented)


def _told(value: object, x: torch.Tensor) -> object:
    if not isinstance(value, torch.Tensor):
        return str(value)
    lies = value.untyped_storage()._cdata == x.untyped_storage()._cdata
    own = {rank: (tensor.tolist(), tensor.dtype, tensor.stride()) for rank, tensor in local_tensors(value).items()}
    return type(value), str(value.shape), lies, own
