"""What a comparison to many digits needs: no noise, one dtype, moved parameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from meshpar.proof.comparable import cast, comparable, only, without_noise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(attention_dropout=0.1, layer_norm_eps=1e-5, text=SimpleNamespace(router_jitter_noise=0.2))
        self.attn_pdrop = 0.1
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.LayerNorm(8)
        self.table = torch.ones(3)
        self.register_buffer("angles", torch.ones(3))


def test_noise_is_switched_off() -> None:
    net = without_noise(Net())
    assert net.drop.p == net.attention.dropout == net.attn_pdrop == 0.0
    assert net.config.attention_dropout == net.config.text.router_jitter_noise == 0.0
    assert net.config.layer_norm_eps == 1e-5


def test_a_comparable_copy() -> None:
    net = Net().eval()
    copy = comparable(net, dtype=torch.float64, perturb=0.02, seed=0)
    assert copy.training and not net.training and net.drop.p == 0.3
    assert {t.dtype for t in (*copy.parameters(), *copy.buffers(), copy.table)} == {torch.float64}
    assert all(0 < (p - q.double()).abs().max() < 0.2 for p, q in zip(copy.parameters(), net.parameters()))
    again = comparable(net, dtype=torch.float64, perturb=0.02, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(copy.parameters(), again.parameters()))


def test_ties_stay_tied_and_move_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    copy = comparable(net, dtype=torch.float32, perturb=0.02, seed=0)
    assert copy[1].weight is copy[0].weight


def test_batches_are_cast() -> None:
    batch = cast({"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "name": "a"}, torch.float64)
    assert batch["x"].dtype == torch.float64 and batch["ids"].dtype == torch.long and batch["name"] == "a"


def test_tensors_in_containers_are_cast() -> None:
    net = Net()
    net.steps = shared = [torch.ones(2), {"a": torch.ones(2), "n": 3}]
    net.pair, net.names = (torch.ones(2), "b"), ("c",)
    names = net.names
    cast(net, torch.float64)
    assert net.steps is shared and net.names is names and net.pair[1] == "b"
    assert shared[0].dtype == shared[1]["a"].dtype == net.pair[0].dtype == torch.float64


def test_requests_for_narrower_dtypes() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with only(torch.float64):
        for made in (x.float(), x.half(), x.to(torch.float32), x.type(torch.bfloat16), x.softmax(0, dtype=torch.float32), torch.zeros(2)):
            assert made.dtype == torch.float64
        assert (torch.tensor(1) / 2).dtype == torch.full((1,), 1.0, dtype=torch.float32).dtype == torch.float64
        assert x.long().dtype == torch.int64 and x.view(torch.int64).dtype == torch.int64
    assert torch.zeros(2).dtype == x.float().dtype == torch.float32


def test_export_sees_the_same() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.float() * x.to(torch.float32).pow(2).mean().rsqrt()).to(x.dtype)

    x = torch.rand(3, dtype=torch.float64)
    with only(torch.float64):
        program = torch.export.export(Norm(), (x,), strict=False)
    values = [n.meta.get("val") for n in program.graph.nodes]
    assert {v.dtype for v in values if isinstance(v, torch.Tensor)} == {torch.float64}
    assert torch.equal(program.module()(x), x * x.pow(2).mean().rsqrt())


def test_grouped_products_in_float64() -> None:
    x, w, ends = torch.randn(5, 4).double(), torch.randn(2, 4, 3).double(), torch.tensor([2, 5], dtype=torch.int32)
    with only(torch.float64):
        found = torch.nn.functional.grouped_mm(x, w, offs=ends)
    torch.testing.assert_close(found, torch.cat([x[:2] @ w[0], x[2:] @ w[1]]))


def test_values_do_not_depend_on_the_order_of_registration() -> None:
    def moved(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        net = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        return dict(comparable(net, dtype=torch.float64, perturb=0.1, seed=0).named_parameters())

    one, other = moved(("full", "near")), moved(("near", "full"))
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and not torch.equal(*list(one.values())[::2])
