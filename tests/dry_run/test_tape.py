"""What a tape sees: kernels with their phase, and bytes from the operator that made them until nobody holds them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from meshpar._torch import FakeStore, FakeTensorMode
from meshpar.dry_run.tape import MachineTape, alive, levels


def test_bytes_come_and_go() -> None:
    with MachineTape() as tape:
        x = torch.zeros(10)
        y = x + 1
        del x
        z = y.view(5, 2)
        assert z.shape == (5, 2)
    assert list(levels(tape.storages.changes)) == [40, 80, 40]
    assert list(alive(tape.storages.changes).values()) == [40]


def test_storages_that_are_resized() -> None:
    with FakeTensorMode(), MachineTape() as tape:
        x = torch.zeros(10)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(80)
    assert list(levels(tape.storages.changes)) == [40, 0, 80]


def test_what_is_computed_again_is_known_from_backward() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with MachineTape() as tape:
        y = checkpoint(lambda x: (x @ x).exp(), x, use_reentrant=False)
        assert isinstance(y, torch.Tensor)
        loss = y.sum()
        tape.phase = "backward"
        loss.backward()
    products = [call.phase for call in tape.calls if call.kernel.kind == "matrix"]
    assert products == ["forward", "recompute", "backward", "backward"]


def test_a_peak_is_that_of_real_memory_whatever_is_fake() -> None:
    def step(device: str) -> list[int]:
        x, w = torch.zeros(8, 16, device=device), torch.zeros(32, 16, device=device, requires_grad=True)
        with MachineTape() as tape:
            y = torch.nn.functional.gelu(torch.nn.functional.linear(x, w)).square().sum()
            tape.phase = "backward"
            y.backward()
            del y
        return list(levels(tape.storages.changes))

    with FakeTensorMode():
        fake = step("cpu")
    assert fake == step("cpu") and max(fake) > 8 * 32 * 4


def test_a_rank_computes_with_its_part_of_a_dtensor() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    whole = DTensor.from_local(torch.zeros(2, 16), mesh, [Shard(0)])
    with MachineTape() as tape:
        assert whole.to(torch.float64).shape == (8, 16)
    ((kernel,),) = [[call.kernel for call in tape.calls]]
    assert (kernel.read, kernel.written) == (2 * 16 * 4, 2 * 16 * 8)
