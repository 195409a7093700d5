"""A parallel model that is a part of a larger graph: every gradient is that of the same graph on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import meshpar as mp
from meshpar.simulate import is_simulated, local_tensors
from tests.pool import Pool

Grads = dict[str, Tensor | None]


class Net(nn.Module):
    """Positions 6 of width 8."""

    def __init__(self, out: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.2))


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


class Staged(nn.Module):
    """Whose first and last stage both use the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.layers(x) + x
        return {"h": h, "loss": F.mse_loss(h, y)}


def numbers(seed: int) -> Tensor:
    return torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(kind: Callable[..., nn.Module], seed: int = 0, *args: Any) -> nn.Module:
    torch.manual_seed(seed)
    return kind(*args).double()


class World:
    """One device: models as they are, and batches whole."""

    ranks = 1.0

    def model(self, model: nn.Module) -> nn.Module:
        return model

    def take(self, whole: Tensor) -> Tensor:
        return whole.clone()


class Ranks(World):
    def __init__(self, mesh: str, **config: Any) -> None:
        self.mesh, self.config = mp.make_mesh(mesh), mp.ParallelConfig(**config)
        self.ranks = float(mp.data_rank(self.mesh)[1])

    def model(self, model: nn.Module) -> nn.Module:
        example = (self.take(numbers(0)), self.take(numbers(1)))[: 2 if isinstance(model, (WithLoss, Staged)) else 1]
        return mp.parallelize(model, self.mesh, example=example, config=self.config)

    def take(self, whole: Tensor) -> Tensor:
        return mp.local_batch((whole.clone(),), self.mesh)[0]


def grads(model: nn.Module, prefix: str = "") -> Grads:
    return {prefix + name: parameter.grad for name, parameter in model.named_parameters()}


def adversaries(world: World) -> Grads:
    """Generator and discriminator take turns; the generator's gradient comes through the discriminator."""
    makes, judges = world.model(made(Net)), world.model(made(Net, 1, 1))
    first, second = torch.optim.SGD(makes.parameters(), 0.1), torch.optim.SGD(judges.parameters(), 0.1)
    found: Grads = {}
    for i in range(3):
        fake = makes(world.take(numbers(i)))
        second.zero_grad()
        (F.softplus(-judges(world.take(numbers(10 + i)))).mean() + F.softplus(judges(fake.detach())).mean()).backward()
        second.step()
        first.zero_grad()
        F.softplus(-judges(fake)).mean().backward()
        found |= grads(makes, f"{i} ")
        first.step()
    return found


def one_after_the_other(world: World) -> Grads:
    model = nn.Sequential(world.model(made(Net)), nn.Tanh(), world.model(made(Net, 1)))
    model(world.take(numbers(3))).square().mean().backward()
    return grads(model)


def itself(world: World) -> Grads:
    model = world.model(made(Net))
    model(model(world.take(numbers(3)))).square().mean().backward()
    return grads(model)


def before_a_loss(world: World) -> Grads:
    """What comes out of one is used twice: by a model that has the loss, and outside."""
    first, second = world.model(made(Net)), world.model(made(WithLoss, 1))
    hidden = first(world.take(numbers(3)))
    (second(hidden, world.take(numbers(4))) + hidden.square().mean()).backward()
    return grads(first, "first ") | grads(second, "second ")


def before_a_step(world: World) -> Grads:
    first, second = world.model(made(Net)), world.model(made(WithLoss, 1))
    hidden, y = first(world.take(numbers(3))), world.take(numbers(4))
    if isinstance(second, mp.ParallelModel):
        second.train_step(hidden, y)
    else:
        second(hidden, y).backward()
    return grads(first, "first ") | grads(second, "second ")


def before_a_loss_of_ones_own(world: World) -> Grads:
    first, second = world.model(made(Net)), world.model(made(Net, 1))
    hidden = first(world.take(numbers(3)))
    if isinstance(second, mp.ParallelModel):
        second.forward_backward((hidden,), lambda y, _: y.square().mean())
    else:
        second(hidden).square().mean().backward()
    return grads(first, "first ") | grads(second, "second ")


def of_the_input(world: World) -> Grads:
    """Of the loss that is returned, directly and through what has no parameters; and of a step."""
    model, found = world.model(made(WithLoss)), dict[str, Tensor | None]()
    for name, between in (("x", torch.Tensor.clone), ("through", torch.tanh), ("twice", torch.Tensor.square)):
        x, y = world.take(numbers(3)).requires_grad_(), world.take(numbers(4))
        if name == "twice":
            step = model.train_step if isinstance(model, mp.ParallelModel) else lambda *batch: model(*batch).backward()
            step(x, y)
        model(between(x), y).backward()
        found[f"samples {name}"] = x.grad
    return found | grads(model)


def of_the_input_of_a_step(world: World) -> Grads:
    """With a loss of one's own, which is the mean over all ranks."""
    model, x = world.model(made(Net)), world.take(numbers(3)).requires_grad_()
    if isinstance(model, mp.ParallelModel):
        model.forward_backward((x,), lambda y, _: y.square().mean())
    else:
        model(x).square().mean().backward()
    return {"samples x": x.grad} | grads(model)


def behind_a_module(world: World) -> Grads:
    """A step, and one with a loss of one's own, of what a module outside gives: it has the gradient on all ranks."""
    first, model, x = made(Net, 2), world.model(made(Staged)), world.take(numbers(3)).requires_grad_()
    for own in (False, True):
        hidden, y = first(x), world.take(numbers(4))
        if not isinstance(model, mp.ParallelModel):
            out = model(hidden, y)
            (out["h"].square().mean() if own else out["loss"]).backward()
        elif own:
            model.forward_backward((hidden, y), lambda out, _: out["h"].square().mean())
        else:
            model.train_step(hidden, y)
    for parameter in first.parameters():
        assert parameter.grad is not None
        if isinstance(model, mp.ParallelModel) and world.ranks > 1:
            torch.distributed.all_reduce(parameter.grad, group=model.mesh.get_group("dp"))
            parameter.grad /= world.ranks
    assert x.grad is not None
    return grads(first, "first ") | {"samples x": x.grad / world.ranks}


def derivatives(world: World) -> Grads:
    """Of what this rank's samples give, times what a loss over all of them would divide by."""
    model, x = world.model(made(Net)), world.take(numbers(3)).requires_grad_()
    y = model(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.retain_grad()
    (y.square().mean() / world.ranks).backward()
    return {"samples sum": first, "samples mean": x.grad, "samples y": y.grad}


def adversarial(world: World) -> Grads:
    model, x, y = world.model(made(WithLoss)), world.take(numbers(3)).requires_grad_(), world.take(numbers(4))
    (toward,) = torch.autograd.grad(model(x, y), x)
    model.zero_grad()
    model((x + 3 * toward).detach(), y).backward()
    return grads(model)


def kept(world: World) -> Grads:
    """Two backwards of one graph: through this rank's samples, then from the loss of all."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x)
            return {"y": y, "loss": y.square().mean()}

    model, x = world.model(made(Both)), world.take(numbers(3)).requires_grad_()
    out = model(x)
    (first,) = torch.autograd.grad(out["y"].sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(out["loss"], x, retain_graph=True)
    out["loss"].backward()
    return grads(model) | {"samples y": first, "samples loss": second}


GRAPHS = [
    *(adversaries, one_after_the_other, itself, before_a_loss, before_a_step, before_a_loss_of_ones_own),
    *(of_the_input, of_the_input_of_a_step, derivatives, adversarial, kept),
]


def compare(graph: Callable[[World], Grads], world: Ranks) -> None:
    expected, found = graph(World()), graph(world)
    assert expected.keys() == found.keys()
    for name, right in expected.items():
        value = found[name]
        assert right is not None and value is not None, name
        rank, size = mp.data_rank(world.mesh)
        if name.startswith("samples"):
            parts = list(local_tensors(value).values())
            if not is_simulated():
                right = right.chunk(size)[rank]
            elif len(parts) > size:
                parts = parts[:: len(parts) // size]
            value = torch.cat(parts)
            torch.testing.assert_close(value, right, msg=lambda text, name=name: f"{name}: {text}")
            continue
        for part in local_tensors(mp.full_tensor(value.detach())).values():
            torch.testing.assert_close(part, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2", "cp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_gradients_across_borders(graph: Callable[[World], Grads], mesh: str) -> None:
    with mp.simulate(4 if "," in mesh else 2):
        compare(graph, Ranks(mesh))


class Experts(nn.Module):
    """Of which each token goes to two of four."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4, bias=False), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, 8)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y.view_as(h)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mixture, self.down = nn.Linear(8, 8), Experts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return self.down(h + self.mixture(h))


def mixtures(world: World) -> Grads:
    first, second = world.model(made(Mixture)), world.model(made(Mixture, 1))
    for _ in range(2):  # (gradients add up)
        second(torch.tanh(first(world.take(numbers(3))))).square().mean().backward()
    return grads(first, "first ") | grads(second, "second ")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh", ["ep=2", "ep=2,tp=2"])
def test_experts_after_experts(mesh: str) -> None:
    with mp.simulate(4 if "," in mesh else 2):
        compare(mixtures, Ranks(mesh))


def test_parameters_are_no_inputs_of_a_graph() -> None:
    """`torch.autograd.grad` says so, as docs/outputs.md does."""
    with mp.simulate(2):
        world = Ranks("tp=2")
        model = world.model(made(WithLoss))
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(model(world.take(numbers(3)), world.take(numbers(4))), list(model.parameters()))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
def test_second_derivatives_are_refused(mesh: str) -> None:
    """FSDP2 gives parameters back after a backward, so that real ranks could not go on."""
    with mp.simulate(2):
        world = Ranks(mesh)
        model, x = world.model(made(Net)), world.take(numbers(3)).requires_grad_()
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)


def after_data_parallel(world: World) -> Grads:
    """Before a loss: a module of torch's own data parallelism, which averages over ranks, and a parameter that a rank averages itself."""
    first, model = made(Net, 2), world.model(made(WithLoss))
    shift = nn.Parameter(torch.linspace(0, 1, 8, dtype=torch.float64))
    before = DistributedDataParallel(first) if isinstance(model, mp.ParallelModel) else first
    model(before(world.take(numbers(3))) + shift, world.take(numbers(4))).backward()
    assert shift.grad is not None
    if isinstance(model, mp.ParallelModel):
        torch.distributed.all_reduce(shift.grad, torch.distributed.ReduceOp.SUM)
        shift.grad /= world.ranks
    return grads(first, "first ") | grads(model) | {"shift": shift.grad}


def on_ranks(mode: str) -> None:
    for graph in [*GRAPHS, after_data_parallel]:
        compare(graph, Ranks("dp=2", data_parallel=mode))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["replicate", "zero1", "zero3"])
def test_on_processes(gloo: Pool, mode: str) -> None:
    gloo.run(on_ranks, mode, world=2, timeout=240)


def over_stages() -> None:
    compare(behind_a_module, Ranks("pp=2"))
    compare(behind_a_module, Ranks("pp=2", microbatches=2, schedule="1f1b"))


def over_stages_and_ranks() -> None:
    compare(behind_a_module, Ranks("pp=2,dp=2", microbatches=2, schedule="zbv"))


def test_stages_share_the_gradient_of_an_input(gloo: Pool) -> None:
    gloo.run(over_stages, world=2, timeout=240)


def test_stages_of_data_ranks(gloo: Pool) -> None:
    gloo.run(over_stages_and_ranks, world=4, timeout=240)
