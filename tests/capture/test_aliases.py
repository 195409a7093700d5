"""Tensors that share memory: what would not follow is refused, what shares nothing but a storage is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.capture.aliases import shared_memory
from meshpar.simulate import local_tensors


class Net(nn.Module):
    def __init__(self, change: Callable[[Net], object], read: Callable[[Net, Tensor], Tensor] = lambda net, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.read = nn.Linear(8, 8).double(), nn.Linear(8, 8).double(), read
        change(self)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.b(torch.tanh(self.a(x))) + self.read(self, x), y)


def tied_data(net: Net) -> None:
    net.b.weight.data = net.a.weight.data


def made_of_data(net: Net) -> None:
    net.b.weight = nn.Parameter(net.a.weight.data)


def rows_of_one(net: Net) -> None:
    whole = torch.randn(12, 8, dtype=torch.float64)
    net.a.weight, net.b.weight = nn.Parameter(whole[:8]), nn.Parameter(whole[4:])


def columns_that_meet(net: Net) -> None:
    whole = torch.randn(8, 15, dtype=torch.float64)
    net.a.weight, net.b.weight = nn.Parameter(whole[:, :8]), nn.Parameter(whole[:, 7:])


def followed(net: Net) -> None:
    net.register_buffer("target", net.a.weight.detach())


def plain(net: Net) -> None:
    net.target = net.a.weight.data.t()  # type: ignore[assignment]


def in_a_list(net: Net) -> None:
    net.targets = [net.a.weight.detach()[2:]]  # type: ignore[assignment]


def in_a_function(net: Net) -> None:
    target = net.a.weight.detach()
    net.target = lambda: target  # type: ignore[assignment]


SHARED = {
    tied_data: "a.weight and b.weight lie in the same memory",
    made_of_data: "a.weight and b.weight",
    rows_of_one: "a.weight and b.weight",
    columns_that_meet: "a.weight and b.weight",
    followed: "a.weight and target",
    plain: "a.weight and target",
    in_a_list: "a.weight and targets.0",
    in_a_function: "a.weight and target",
}


@pytest.mark.parametrize("change", SHARED, ids=lambda change: change.__name__)
def test_what_shares_memory_with_a_parameter_is_refused(change: Callable[[Net], None]) -> None:
    model, batch = Net(change), {name: torch.ones(4, 8, dtype=torch.float64) for name in ("x", "y")}
    with pytest.raises(mp.ConfigError, match=SHARED[change]):
        mp.verify(model, "tp=2", batch)
    with mp.simulate(2), pytest.raises(mp.ConfigError, match=f"{SHARED[change]}(?s:.*)decoder.weight = encoder.weight"):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)


def one_parameter(net: Net) -> None:
    net.b.weight = net.a.weight
    net.names = {"first": net.a.weight}  # type: ignore[assignment]


def halves(net: Net) -> None:
    whole = torch.randn(16, 8, dtype=torch.float64)
    net.a.weight, net.b.weight = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])


def columns(net: Net) -> None:
    whole = torch.randn(8, 16, dtype=torch.float64)
    net.a.weight, net.b.weight = nn.Parameter(whole[:, :8]), nn.Parameter(whole[:, 8:])


def every_other(net: Net) -> None:
    whole = torch.randn(8, 8, 2, dtype=torch.float64)
    net.a.weight, net.b.weight = nn.Parameter(whole[..., 0]), nn.Parameter(whole[..., 1])


def cloned(net: Net) -> None:
    net.register_buffer("target", net.a.weight.detach().clone())


def buffers(net: Net) -> None:
    whole = torch.ones(8, dtype=torch.float64)
    net.register_buffer("m", whole[:])
    net.register_buffer("n", whole[:])


@pytest.mark.parametrize("change", [one_parameter, halves, columns, every_other, cloned, buffers], ids=lambda change: change.__name__)
def test_what_shares_no_element_is_exact(change: Callable[[Net], None]) -> None:
    reads = {cloned: lambda net, x: F.linear(x, net.target), buffers: lambda net, x: net.m + net.n}
    model, alone = (Net(change, reads.get(change, lambda net, x: x)) for _ in range(2))
    numbers = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(4, 8, dtype=torch.float64, generator=numbers) for name in ("x", "y")}
    alone.load_state_dict(model.state_dict())
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)
        ours, theirs = (torch.optim.SGD(one.parameters(), 0.5) for one in (pm, alone))
        for _ in range(3):
            theirs.zero_grad()
            right = alone(**batch)
            right.backward()
            theirs.step()
            ours.zero_grad()
            for part in local_tensors(pm.train_step(**batch)).values():
                torch.testing.assert_close(part, right.detach())
            ours.step()


def counted(net: Net, x: Tensor) -> Tensor:
    net.m += 1  # type: ignore[operator, assignment]
    return net.n  # type: ignore[return-value]


def test_a_buffer_that_is_written_and_another_one_in_its_memory() -> None:
    model, batch = Net(buffers, counted), {name: torch.ones(4, 8, dtype=torch.float64) for name in ("x", "y")}
    with mp.simulate(2), pytest.raises(mp.CaptureError, match="writes to m, and m and n lie in the same memory"):
        mp.parallelize(model, mp.make_mesh("tp=2"), example=batch)


def test_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert shared_memory(model) == []
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert shared_memory(model) == [("0.weight", "1.weight")]
