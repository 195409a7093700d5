"""Programs that once went wrong: each one against the model itself, loss, every gradient and every buffer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.capture.moe import MoE


class Body(nn.Module):
    """An embedding, blocks that add something to their input, and a head."""

    def __init__(self, *blocks: nn.Module, vocab: int = 20, **embedding: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 16, **embedding)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, vocab)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.embed(x)
        for block in self.blocks:
            z = z + block(z)
        return F.cross_entropy(self.head(z).flatten(0, 1), y.flatten())


class Shifted(nn.Module):
    """A feed-forward that mixes each position with the one before it, then smooths over both dims."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + 0.5 * F.pad(x, (0, 0, 1, -1))
        return F.avg_pool2d(self.down(F.gelu(self.up(x))), 3, 1, 1)


class Normed(nn.Module):
    """A convolution along the sequence, normalised over it, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.InstanceNorm1d(16, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(16, 12, 2, batch_first=True), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0])


class Selected(nn.Module):
    """Positions chosen by scores of their own: the matrix behind the scores is used, and has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.up, self.down = nn.Linear(16, 8), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.tanh(self.scores(x)).sum(-1).topk(3, -1).indices
        mask = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device).scatter(1, chosen, 1.0)
        return self.down(torch.tanh(self.up(x))) * mask[..., None]


class Spectral(nn.Module):
    """A weight over its largest singular value, whose vectors are buffers that forward improves in place, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 32)), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Squeezed(nn.Module):
    """A dim as long as there are ranks, at which a squeeze that means none of it is aimed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (2, 8)).transpose(1, 2).squeeze(1)
        return self.down(torch.tanh(heads).transpose(1, 2).flatten(-2))


class Broadcast(nn.Module):
    """Matrices with fewer dims than what they multiply: the batch (4) meets four of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))  # 4 6 16
        mixed = y @ y.mT.unsqueeze(1) / 16  # 4 6 16 @ 4 1 16 6 -> 4 4 6 6
        return self.down(mixed.mean(1) @ y)


class Written(nn.Module):
    """Halves of its features are written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).clone()
        y[..., :8] = torch.sin(y[..., 8:16].clone())
        y[:, 0] = 0.5
        return self.down(y)


class Borrowed(nn.Module):
    """A weight that another module has, held past registration."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.borrowed: Tensor
        object.__setattr__(self, "borrowed", self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) + torch.tanh(x @ self.borrowed) @ self.up.weight


MODELS = {
    "borrowed": lambda: Body(Borrowed(), Borrowed()),
    "compiled by torch": lambda: Body(torch.compile(nn.Linear(16, 16))),  # type: ignore[arg-type]
    "selected": lambda: Body(Selected(), Selected()),
    "written": lambda: Body(Written(), Written()),
    "spectral norm": lambda: Body(Spectral()),
    "squeezed": lambda: Body(Squeezed(), Squeezed()),
    "broadcast": lambda: Body(Broadcast(), Broadcast()),
    "shifted": lambda: Body(Shifted(), Shifted()),
    "instance norm": lambda: Body(Normed(), Normed()),
    "glu": lambda: Body(Gated(), Gated()),
    "lstm": lambda: Body(Recurrent()),
    "sparse": lambda: Body(Gated(), sparse=True),
    "scaled by frequency": lambda: Body(Gated(), scale_grad_by_freq=True, padding_idx=3),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("spec", ["tp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("name", MODELS)
def test_against_the_model(name: str, spec: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = torch.randint(0, 20, (4, 6)), torch.randint(0, 20, (4, 6))
    y[0, :4] = -100
    x[2], x[:, 3] = x[0], x[:, 0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    original = copy.deepcopy(model)
    expected = original(x, y)
    expected.backward()
    with mp.simulate(4 if "," in spec else 2):
        mesh = mp.make_mesh(spec)
        batch = mp.local_batch({"x": x, "y": y}, mesh)
        parallel = mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(sequence_parallel=True))
        loss = parallel.train_step(**batch)
        for value in local_tensors(loss).values():
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        for parameter, theirs in zip(parallel.parameters(), original.parameters(), strict=True):
            gradient = theirs.grad.to_dense() if theirs.grad is not None else torch.zeros_like(theirs)
            ours = torch.zeros_like(theirs) if parameter.grad is None else mp.full_grad(parameter)
            torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12)
        for buffer, wanted in zip(parallel.buffers(), original.buffers(), strict=True):
            for value in local_tensors(buffer).values():
                torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


class Alternating(nn.Module):
    """Every second step runs over parameters that the first did not use."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(2))
        self.mixtures = nn.ModuleList(MoE("mixtral", width=16, experts=4) for _ in range(2))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        x = self.blocks[self.turn % 2](x)
        return x + self.mixtures[self.turn % 2](F.rms_norm(x, x.shape[-1:]))[0]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("spec", ["tp=2", "ep=2", "ep=2,tp=2"])
def test_parameters_that_a_later_program_uses_first(spec: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 20, (8, 6))
    mp.verify(Body(Alternating()), spec, {"x": x, "y": x}, steps=3).raise_if_failed()


class Listed(Borrowed):
    def __init__(self) -> None:
        super().__init__()
        self.held = {"weights": [self.down.weight]}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) + torch.tanh(x @ self.held["weights"][0]) @ self.up.weight


def test_parameters_out_of_containers_are_refused() -> None:
    x, model = torch.randint(0, 20, (4, 6)), Body(Listed())
    with (
        mp.simulate(2),
        pytest.raises(mp.CaptureError, match=r"test_hunted.py:.*out of a list, a dict or another object.*\n.*ParameterList"),
    ):
        mp.parallelize(model, mp.make_mesh("tp=2"), example={"x": x, "y": x})


class Paired(nn.Module):
    """The halves of the batch are two views of the same samples: an odd number of pairs on two data ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2)
        return (self.down(torch.tanh(self.up(a))).flatten(0, 1) - b.flatten(0, 1)).pow(2).mean()


def test_pairs_that_do_not_divide_by_the_data_ranks() -> None:
    mp.verify(Paired(), "dp=2,tp=2", (torch.randn(6, 32, 16),)).raise_if_failed()


LOSSES = {
    "count of at least one": lambda each, y, n: (each * (y != -100)).sum() / (y != -100).sum().clamp(min=1),
    "count and one": lambda each, y, n: (each * (y != -100)).sum() / ((y != -100).sum().double() + 1.0),
    "the caller's count": lambda each, y, n: each.sum() / n,
    "nll": lambda each, y, n: each.sum() / (y != -100).sum(),
}


class Counted(nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss, self.embed, self.head = loss, nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor, y: Tensor, n: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.embed(x))).log_softmax(-1).flatten(0, 1)
        if self.loss == "nll":
            return F.nll_loss(scores, y.flatten())
        return LOSSES[self.loss](F.nll_loss(scores, y.flatten(), reduction="none"), y.flatten(), n)


@pytest.mark.parametrize("name", LOSSES)
def test_counts_over_microbatches(name: str) -> None:
    torch.manual_seed(0)
    model = Counted(name).double()
    x, y = torch.randint(0, 20, (4, 6)), torch.randint(0, 20, (4, 6))
    y[0], y[2], y[1, :2] = -100, -100, -100  # the first microbatch of both data ranks has no label that counts
    original, n = copy.deepcopy(model), torch.tensor(7.0, dtype=torch.double)
    expected = original(x, y, n)
    expected.backward()
    with mp.simulate(2):
        mesh = mp.make_mesh("dp=2")
        batch = {**mp.local_batch({"x": x, "y": y}, mesh), "n": n}
        parallel = mp.parallelize(model, mesh, example=batch, config=mp.ParallelConfig(microbatches=2))
        for value in local_tensors(parallel.train_step(**batch)).values():
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        for parameter, theirs in zip(parallel.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(mp.full_grad(parameter), theirs.grad, rtol=1e-9, atol=1e-12)
