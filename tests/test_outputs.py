"""What a parallel model returns: whole tensors of a data rank's samples; asked for cut, DTensors whose parts together are the output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import silu

import meshpar as mp
from meshpar._torch import maybe_disable_local_tensor_mode
from meshpar.simulate import local_tensors
from tests.models import text, tiny
from tests.pool import Pool

WIDTH, HEAD = 16, 4
Outputs = dict[str, torch.Tensor]


class Fused(nn.Module):
    """Attention over one matrix of queries, keys and values: as many heads of each, or fewer keys and values."""

    def __init__(self, queries: int = 4, keys: int = 2) -> None:
        super().__init__()
        self.sizes = [queries * HEAD, keys * HEAD, keys * HEAD]
        self.qkv, self.out = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(queries * HEAD, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        fused = self.qkv(x)
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in fused.split(self.sizes, -1))
        groups = q.shape[1] // k.shape[1]
        mixed = nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return {"out": out, "fused": fused, "keys": k, "rows": fused.flatten(0, 1), "columns": fused.flatten(0, 1).t()}


class Interleaved(nn.Module):
    """Queries, keys and values of every head next to each other."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, heads * 3 * HEAD), nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        fused = self.qkv(x)
        q, k, v = (part.transpose(1, 2) for part in fused.unflatten(-1, (self.heads, 3 * HEAD)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return {"out": self.out(mixed.transpose(1, 2).flatten(2)), "fused": fused, "values": v}


class Gated(nn.Module):
    """Gate and up in one matrix; the width does not divide evenly among all ranks."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * width), nn.Linear(width, WIDTH)

    def forward(self, x: torch.Tensor) -> Outputs:
        both = self.up(x)
        gate, up = both.chunk(2, -1)
        inner = silu(gate) * up
        return {"out": self.down(inner), "both": both, "inner": inner, "flat": both.flatten(), "turned": both.transpose(1, 2).flatten(1)}


class Blocks(nn.Module):
    """A residual stream that may be cut along its sequence, returned whole and with samples and positions in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Fused() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Outputs:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))["out"]
        return {"stream": x, "rows": x.flatten(0, 1), "turned": x.transpose(0, 1).flatten(0, 1)}


MODELS = {
    "fewer keys": Fused,
    "as many keys": lambda: Fused(4, 4),
    "interleaved": Interleaved,
    "gated": Gated,
    "gated, uneven": lambda: Gated(9),
    "blocks": Blocks,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


def against_one_device(name: str, spec: str, samples: int = 4, positions: int = 6) -> set[str]:
    """Compare every output, and every gradient of the sum of their squares; returns the names of those that left in parts."""
    model = made(name)
    x = torch.randn(samples, positions, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alone = copy.deepcopy(model)
    expected = alone(x)
    _squares(expected).backward()
    grads = {key: parameter.grad for key, parameter in alone.named_parameters()}
    mesh = mp.make_mesh(spec)
    pm = mp.parallelize(model, mesh, example=mp.local_batch((x,), mesh), config=mp.ParallelConfig(data_parallel="replicate", outputs="cut"))
    found = pm(*mp.local_batch((x,), mesh))
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    for key, value in whole.items():
        for part in local_tensors(value).values():
            torch.testing.assert_close(part, expected[key], msg=lambda text, key=key: f"{name} on {spec}, {key}: {text}")
    _squares(whole).backward()
    for key, parameter in pm.named_parameters():
        for grad in local_tensors(mp.full_grad(parameter)).values():
            torch.testing.assert_close(grad, grads[key], msg=lambda text, key=key: f"{name} on {spec}, {key}: {text}")
    return {key for key, value in found.items() if isinstance(value, DTensor)}


def _squares(outputs: Outputs) -> Any:
    weights = [torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape) for value in outputs.values()]
    return sum((value.square() * weight).sum() for value, weight in zip(outputs.values(), weights, strict=True))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["tp=2", "tp=3", "dp=2,tp=2"])
def test_outputs_that_are_cut_are_in_order(name: str, spec: str) -> None:
    with mp.simulate(3 if spec == "tp=3" else 2 * spec.count("=")):
        against_one_device(name, spec)


def test_fused_outputs_leave_in_parts() -> None:
    with mp.simulate(2):
        assert {"fused", "keys"} <= against_one_device("fewer keys", "tp=2")
        assert {"both", "inner"} <= against_one_device("gated", "tp=2")


def share(mesh: Any, rank: int) -> int:
    """The data rank of a rank."""
    place = dict(zip(mesh.mesh_dim_names, (mesh.mesh == rank).nonzero()[0].tolist(), strict=True))
    sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    return place.get("dp", 0) * sizes.get("ep", 1) + place.get("ep", 0)


def losses_of_their_own(model: nn.Module, batch: tuple[Any, ...], spec: str, loss: Callable[..., torch.Tensor], **config: Any) -> None:
    """Every data rank has a loss of its own, of the plain tensors that the model returns for its samples: each of them, and the gradients
    of their mean over the data ranks, as on one device."""
    mesh = mp.make_mesh(spec)
    data = mp.data_rank(mesh)[1]
    alone = copy.deepcopy(model)
    with maybe_disable_local_tensor_mode():  # what is written in place would be written once for every simulated rank
        parts = [tuple(x.chunk(data)[r] for x in batch) for r in range(data)]
        expected = [alone(*part) for part in parts]
        losses = [loss(out, *part) for out, part in zip(expected, parts, strict=True)]
        (sum(losses) / data).backward()  # type: ignore[union-attr]
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(**config))
    with torch.no_grad():
        evaluated = pm(*local)
    found = pm(*local)
    for outputs in (found, evaluated):
        for key, value in outputs.items():
            assert not isinstance(value, DTensor)
            for rank, own in local_tensors(value).items():
                at = share(grid(mesh), rank)
                torch.testing.assert_close(own, expected[at][key], msg=lambda text, key=key: f"{key} on {spec}: {text}")
    own_loss = loss(found, *local)
    for rank, value in local_tensors(own_loss).items():
        torch.testing.assert_close(value, losses[share(grid(mesh), rank)].detach())
    own_loss.backward()
    wanted = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in pm.named_parameters():
        for grad in local_tensors(mp.full_grad(parameter)).values():
            torch.testing.assert_close(grad, wanted[name], msg=lambda text, name=name: f"{name} on {spec}: {text}")


def grid(mesh: Any) -> Any:
    """A mesh that can be asked for ranks where they are simulated, too."""
    with maybe_disable_local_tensor_mode():
        return SimpleNamespace(mesh=mesh.mesh.clone(), mesh_dim_names=mesh.mesh_dim_names)


def of_squares(outputs: Outputs, x: torch.Tensor) -> torch.Tensor:
    """Another one for each sample, with one output used twice."""
    first = next(iter(outputs.values()))
    found: torch.Tensor = _squares(outputs) + (first * x.mean()).sum()
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["tp=2", "tp=3", "dp=2,tp=2", "cp=2", "dp=2,cp=2"])
def test_losses_of_data_ranks_outside(name: str, spec: str) -> None:
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with mp.simulate(3 if spec == "tp=3" else 2 * spec.count("=")):
        losses_of_their_own(made(name), (x,), spec, of_squares)


class Causal(nn.Module):
    """A small language model that returns logits, hidden states and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(24, WIDTH), Blocks(), nn.Linear(WIDTH, 24, bias=False)
        self.mix = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Outputs:
        hidden = self.blocks(self.embed(ids))["stream"]
        q, k = (part.unflatten(-1, (4, HEAD)).transpose(1, 2) for part in self.mix(hidden).chunk(2, -1))
        attention = (q @ k.transpose(-1, -2)).softmax(-1)
        return {"logits": self.head(hidden + attention.mean(1) @ hidden), "hidden": hidden, "attention": attention}


def per_token(outputs: Outputs, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss per token, weighed by another output, with hidden states used twice."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    tokens = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    weights = outputs["attention"].mean((1, 2))[:, 1:]
    found: torch.Tensor = (tokens * weights).sum(1).mean() + outputs["hidden"].square().mean() + outputs["hidden"].abs().mean()
    return found


def causal_outside(spec: str, **config: Any) -> None:
    torch.manual_seed(3)
    model = Causal().double()
    ids = torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(1))
    losses_of_their_own(model, (ids, ids.clone()), spec, per_token, **config)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("spec", ["tp=2", "dp=2,tp=2", "cp=2,tp=2", "dp=2,cp=2"])
def test_a_loss_per_token(spec: str, sequence: bool) -> None:
    with mp.simulate(2 * spec.count("=")):
        causal_outside(spec, sequence_parallel=sequence)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["zero3", "replicate"])
def test_losses_of_real_data_ranks(gloo: Pool, mode: str) -> None:
    gloo.run(causal_outside, "dp=2,tp=2", world=4, data_parallel=mode)


class Routed(nn.Module):
    """Experts in a list, called for the tokens that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4, bias=False), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Outputs:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            out.index_add_(0, token, expert(rows[token]) * weights[token, place, None])
        return {"out": out.view(x.shape), "weights": weights}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("spec", ["ep=2", "dp=2,ep=2", "ep=2,tp=2"])
def test_outputs_of_experts(spec: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    model = Routed().double()
    with mp.simulate(2 * spec.count("=")):
        losses_of_their_own(model, (x,), spec, of_squares)


def test_samples_that_were_mixed_leave_whole() -> None:
    """A value made of all samples together is that of the global batch, on every rank; ranks' losses of it still give their mean."""

    class Mixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> Outputs:
            y = super().forward(x)
            return {"own": y, "mixed": y.softmax(0), "alike": y @ y.t(), "mean": y.mean(0)}

    torch.manual_seed(3)
    model, x, scale = Mixed(8, 8).double(), torch.randn(4, 8, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    alone = copy.deepcopy(model)
    expected = alone(x)
    own = expected["own"].chunk(2)
    rest = sum(expected[name].square().sum() for name in ("mixed", "alike", "mean"))
    (sum(scale[r] * (own[r].square().sum() + rest) for r in range(2)) / 2).backward()  # type: ignore[union-attr]
    with mp.simulate(2):
        mesh = mp.make_mesh("dp=2")
        local, mine = mp.local_batch((x, scale), mesh)
        pm = mp.parallelize(model, mesh, example=(local,))
        found = pm(local)
        for name in ("mixed", "alike", "mean"):
            for rank, value in local_tensors(found[name]).items():
                torch.testing.assert_close(value, expected[name], msg=lambda text, rank=rank: f"rank {rank}: {text}")
        (mine * sum(value.square().sum() for value in found.values())).sum().backward()
        for grad in local_tensors(mp.full_grad(pm.weight)).values():
            torch.testing.assert_close(grad, alone.weight.grad)


def test_the_loss_in_the_output_is_the_global_one() -> None:
    class Own(Causal):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Outputs:
            logits = super().forward(ids, labels)["logits"]
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    torch.manual_seed(3)
    model = Own().double()
    ids = torch.randint(24, (4, 6))
    labels = ids.clone()
    labels[0, 1:] = -100  # uneven
    alone = copy.deepcopy(model)
    alone(ids, labels)["loss"].backward()
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,tp=2")
        local = mp.local_batch((ids, labels), mesh)
        pm = mp.parallelize(model, mesh, example=local)
        (pm(*local)["loss"] * 2).backward()
        for (name, parameter), other in zip(pm.named_parameters(), alone.parameters(), strict=True):
            for grad in local_tensors(mp.full_grad(parameter)).values():
                torch.testing.assert_close(grad, 2 * other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_which_loss_is_meant() -> None:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = super().forward(x)
            return y.square().mean(), y.abs().mean()

    x = torch.randn(4, 8)
    with mp.simulate(2):
        mesh = mp.make_mesh("tp=2")
        pm = mp.parallelize(Two(8, 8), mesh, example=(x,))
        with pytest.raises(
            mp.BatchError, match=r"The model returned float32 \[\], float32 \[\].*loss_fn=lambda output, batch: output\[0\]"
        ):
            pm.train_step(x)
        first = mp.parallelize(Two(8, 8), mesh, example=(x,), loss_fn=lambda output, batch: output[0] + 0.1 * output[1])
        assert torch.isfinite(first.train_step(x)).all()


def test_outputs_of_real_ranks(gloo: Pool) -> None:
    for cut in gloo.run(against_one_device, "fewer keys", "dp=2,tp=2", world=4):
        assert {"fused", "rows"} <= cut


def test_hidden_states_after_the_model_itself_ran() -> None:
    """A library registers hooks when the model is run, and an attribute that says so: the one is not handed on without the others."""
    model, batch = tiny("llama").double().eval(), text(4)
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("tp=2"), example=batch).eval()
        for _ in range(2):
            wanted = model(**batch, output_hidden_states=True).hidden_states
            with torch.no_grad():
                found = pm(**batch, output_hidden_states=True).hidden_states
            assert len(found) == len(wanted) > 1
            assert all((mp.full_tensor(a) - b).abs().max() < 1e-12 for a, b in zip(found, wanted, strict=True))
