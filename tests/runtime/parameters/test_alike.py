"""A loop's own term of parameters and other tensors: right where ranks compute the same, or a mean of theirs, refused where neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial

import meshpar as mp
from meshpar.simulate import local_tensors
from tests.pool import Pool

Term = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a weight, this rank's samples, and what every rank has alike."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def whole(weight: Tensor) -> Tensor:
    """A parallel model's parameter as one tensor, another one's itself."""
    return weight.full_tensor() if isinstance(weight, torch.distributed.tensor.DTensor) else weight


EXACT: dict[str, Term] = {
    "norm of the whole": lambda w, x, same: whole(w).norm(),
    "singular values": lambda w, x, same: torch.linalg.svdvals(whole(w)).sum(),
    "used twice": lambda w, x, same: (whole(w) @ whole(w).t()).square().mean() + whole(w)[:3].sum(),
    "samples and the whole": lambda w, x, same: (x @ whole(w).t()).square().mean(),
    "prototypes and the whole": lambda w, x, same: (same @ whole(w).t()).square().mean(),
    "prototypes": lambda w, x, same: (same @ w.t()).square().mean(),
    "a target": lambda w, x, same: (w.t() @ w - same.t() @ same).square().mean(),
    "a number that all have": lambda w, x, same: w.square().sum() * same.mean(),
    "a loss of samples beside it": lambda w, x, same: w.square().sum() + x.square().mean(),
    "a loss of samples before it": lambda w, x, same: x.square().mean() - 0.1 * w.norm(),
}
REFUSED: dict[str, Term] = {
    "samples": lambda w, x, same: (x @ w.t()).square().mean(),
    "samples, looked up": lambda w, x, same: (w * 1.0)[x.argmax(-1)].square().mean(),
    "a number of samples": lambda w, x, same: w.square().sum() * x.mean(),
    "a norm over a number of samples": lambda w, x, same: w.norm() / (1 + x.square().mean()),
}


def alone(term: Term) -> tuple[nn.Module, dict[str, Tensor | None]]:
    """A model, and its gradients on one device."""
    torch.manual_seed(0)
    model, x = Net().double(), numbers(4, 8)
    (model(x).square().mean() + 0.3 * term(model.up.weight, x, numbers(5, 8))).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return model, found


def compare(mesh: str, term: Term, model: nn.Module, right: dict[str, Tensor | None], **config: object) -> None:
    made = mp.make_mesh(mesh)
    (own,) = mp.local_batch((numbers(4, 8),), made)
    pm = mp.parallelize(model, made, example=(own,), config=mp.ParallelConfig(**config))  # type: ignore[arg-type]
    (pm(own).square().mean() + 0.3 * term(pm.up.weight, own, numbers(5, 8))).backward()
    for name, parameter in pm.named_parameters():
        for part in local_tensors(mp.full_grad(parameter)).values():
            torch.testing.assert_close(part, right[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.sweep(9)
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("name", EXACT)
def test_terms_that_count_once(name: str, mesh: str) -> None:
    model, right = alone(EXACT[name])
    with mp.simulate(4 if "," in mesh else 2):
        compare(mesh, EXACT[name], model, right)


@pytest.mark.parametrize("name", REFUSED)
def test_terms_that_ranks_have_apart(name: str) -> None:
    model, right = alone(REFUSED[name])
    with mp.simulate(2):
        compare("tp=2", REFUSED[name], model, right)  # (ranks of one batch have the same samples)
    with (
        mp.simulate(2),
        pytest.raises(mp.ConfigError, match="of up.weight and a tensor of shape .* that is another one on every data rank"),
    ):
        compare("dp=2", REFUSED[name], model, right)


def test_what_needs_no_gradient_is_not_asked() -> None:
    with mp.simulate(2):
        mesh = mp.make_mesh("dp=2")
        (own,) = mp.local_batch((numbers(4, 8),), mesh)
        pm = mp.parallelize(Net().double(), mesh, example=(own,))
        with torch.no_grad():
            assert (own @ pm.up.weight.t()).shape == (2, 16)
        assert (own @ pm.up.weight.detach().t()).shape == (2, 16)
        assert not mp.full_tensor(pm.up.weight).requires_grad
        with pytest.raises(mp.ConfigError, match="the gradient of up.weight as a whole is Replicate"):
            pm.up.weight.full_tensor(grad_placements=[Partial()])


def between(mode: str) -> None:
    """What is shown of a parameter after forward, when FSDP2 has gathered ones in their place."""
    mesh = mp.make_mesh("dp=2")
    (own,) = mp.local_batch((numbers(4, 8),), mesh)
    pm = mp.parallelize(Net().double(), mesh, example=(own,), config=mp.ParallelConfig(data_parallel=mode))
    before = dict(pm.named_parameters())
    loss = pm(own).square().mean()
    assert {name: id(p) for name, p in pm.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert [id(p) for p in pm.parameters()] == [id(p) for p in before.values()]
    assert pm.up.weight is pm.get_parameter("up.weight") is before["up.weight"] is next(pm.up.parameters())
    loss.backward()
    assert pm.up.weight is before["up.weight"]


def on_ranks(mode: str) -> None:
    between(mode)
    for term in EXACT.values():
        compare("dp=2", term, *alone(term), data_parallel=mode)
    for term in REFUSED.values():
        with pytest.raises(mp.ConfigError, match="another one on every data rank"):
            compare("dp=2", term, *alone(term), data_parallel=mode)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["replicate", "zero1", "zero3"])
def test_on_processes(gloo: Pool, mode: str) -> None:
    gloo.run(on_ranks, mode, world=2, timeout=240)
