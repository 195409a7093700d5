"""Context parallelism of what goes along positions without attention: convolutions, cumulative sums."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.plan import Comm
from meshpar.proof.alone import static_report
from tests.pool import Pool

S, H, V = 16, 16, 37


class Convolution(nn.Module):
    """A convolution along positions, in one of the ways that models write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, (kernel, options) = kind, _CONVOLUTIONS[kind]
        self.before = nn.Linear(H, H)
        self.along = nn.Conv1d(H, 2 * H if kind == "multiplied" else H, kernel, **options)  # type: ignore[arg-type]
        self.after = nn.Linear(self.along.out_channels, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x).transpose(1, 2)
        if self.kind == "padded":
            y = F.pad(y, (3, 0))
        y = self.along(y)
        return self.after(torch.tanh(y[..., : x.shape[1]]).transpose(1, 2))


_CONVOLUTIONS = {
    "causal": (4, {"padding": 3, "groups": H}),
    "same": (3, {"padding": 1}),
    "string": (4, {"padding": "same"}),
    "dilated": (3, {"padding": 4, "dilation": 2, "groups": H}),
    "padded": (4, {}),
    "grouped": (3, {"padding": 2, "groups": 4}),
    "multiplied": (2, {"padding": 1, "groups": H}),
    "wide": (13, {"padding": 12, "groups": H}),  # wider than the part of a rank
    "strided": (4, {"padding": 1, "stride": 2}),
}


class Cumulative(nn.Module):
    """A cumulative sum or product along positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.before, self.after = kind, nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if self.kind == "cumsum":
            y = y.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        elif self.kind == "cumprod":
            y = (y.sigmoid() + 0.3).cumprod(-2)
        elif self.kind == "logcumsumexp":
            y = y.logcumsumexp(1)
        elif self.kind == "transposed":
            y = y.transpose(1, 2).cumsum(-1).transpose(1, 2) / 8
        else:  # linear attention
            f = y.relu().view(*y.shape[:2], 4, H // 4)
            y = torch.einsum("bshe,bshef->bshf", f, torch.einsum("bshe,bshf->bshef", f, f).cumsum(1)).reshape(x.shape) / 8
        return self.after(y)


class Stack(nn.Module):
    """A causal attention, for which positions are dealt out from both ends, and layers of these kinds, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.query, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V)
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(H), "mix": one, "mlp": nn.Linear(H, H)}) for one in layers)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        q = self.query(x).view(*ids.shape, 4, H // 4).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)
        for layer in self.layers:
            y = layer["mix"](layer["norm"](x))  # type: ignore[index]
            x = (x + y if x.shape == y.shape else y) + torch.tanh(layer["mlp"](y))  # type: ignore[index]
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.reshape(-1, V), labels[:, : x.shape[1]].reshape(-1)), "logits": logits}


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, V, (2, S))
    return {"ids": ids, "labels": ids}


def program(model: nn.Module, mesh: str, size: int) -> tuple[str, tuple[Comm, ...]]:
    """What is said of a program, and what it sends."""
    with mp.simulate(size):
        pm = mp.parallelize(model, mp.make_mesh(mesh), example=batch())
        return pm.explain(), pm.comms()


def convolutions() -> Stack:
    torch.manual_seed(0)
    return Stack(*(Convolution(kind) for kind in _CONVOLUTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["cp=4"])
def test_convolutions_over_a_boundary(mesh: str) -> None:
    mp.verify(convolutions(), mesh, batch()).raise_if_failed()


def test_convolutions_fetch_what_lies_around_and_say_so() -> None:
    text, comms = program(convolutions(), "cp=2", 2)
    lines = re.findall(r"x(\d+) +halo_convolution +a rank has its own positions, and fetches those around them: .* forward", text)
    assert sum(map(int, lines)) == len(_CONVOLUTIONS)
    causal = [one for one in comms if one.kind == "halo" and one.module == "layers.0.mix.along"]
    # rank 0 has 0 to 3 and 12 to 15, rank 1 what is between: either sends the three positions before a piece of the other
    assert [(one.phase, one.nbytes) for one in causal] == [(phase, 3 * 2 * H * 4.0) for phase in ("forward", "backward")]


@pytest.mark.parametrize("mesh", ["cp=2,tp=2"])
def test_cumulative_sums_and_products(mesh: str) -> None:
    torch.manual_seed(0)
    mp.verify(
        Stack(*(Cumulative(kind) for kind in ("cumsum", "cumprod", "logcumsumexp", "transposed", "linear"))), mesh, batch()
    ).raise_if_failed()


def test_cumulative_sums_send_totals_and_say_so() -> None:
    text, comms = program(Stack(Cumulative("cumsum")), "cp=2", 2)
    assert "a rank has its own positions, and is told what those before come to" in text
    sent = [(one.kind, one.phase, one.nbytes) for one in comms if one.node.startswith("cumulated")]
    every = 4 * 2 * H * 4.0  # of four pieces, one number for each sample and channel
    assert sent == [("all_gather", "forward", every / 2), ("reduce_scatter", "backward", every / 2)]


def test_all_of_it_is_proved() -> None:
    report = static_report(
        Stack(*map(Convolution, _CONVOLUTIONS), *map(Cumulative, ("cumsum", "cumprod", "logcumsumexp"))), "cp=2,tp=2", batch()
    )
    report.check()
    assert report.share == 1.0 and not report.unproved


def of_several_kinds() -> Stack:
    torch.manual_seed(0)
    return Stack(Convolution("causal"), Convolution("wide"), *map(Cumulative, ("cumsum", "cumprod", "logcumsumexp"))).double()


def stepped() -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of a step on this mesh of two."""
    pm = mp.parallelize(of_several_kinds(), mp.make_mesh("cp=2"), example=batch(), config=mp.ParallelConfig(data_parallel="replicate"))
    loss = pm.train_step(**batch())
    return float(loss), {name: mp.full_grad(p) for name, p in pm.named_parameters()}  # type: ignore[misc]


def test_processes_send_what_lies_around_and_what_came_before(gloo: Pool) -> None:
    model = of_several_kinds()
    right = model(**batch())["loss"]
    right.backward()
    for loss, gradients in gloo.run(stepped):
        assert abs(loss - float(right.detach())) < 1e-12
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)
