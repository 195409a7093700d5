"""Numbers of a rank's own parameters are refused where other ranks hold others; what stays right works."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import meshpar as mp
from meshpar.runtime.parameters.apart import NumberApart, Origin, inside_step
from tests.pool import Pool
from tests.runtime.parameters.test_tensors import alone, make, trained

REFUSED: dict[str, Callable[[list[Any]], Any]] = {
    "clip_grad_norm_": lambda ps: nn.utils.clip_grad_norm_(ps, 1.0),
    "clip_grad_norm_ foreach": lambda ps: nn.utils.clip_grad_norm_(ps, 1.0, foreach=True),
    "clip_grad_norm_ one": lambda ps: nn.utils.clip_grad_norm_(ps[0], 1.0),
    "get_total_norm": lambda ps: nn.utils.get_total_norm([p.grad for p in ps], math.inf),
    "squares": lambda ps: sum(p.grad.norm() ** 2 for p in ps),
    "squares of data": lambda ps: sum(p.grad.data.norm(2).item() ** 2 for p in ps),
    "largest": lambda ps: max(p.grad.abs().max() for p in ps),
    "finite": lambda ps: all(torch.isfinite(p.grad).all() for p in ps),
    "nan": lambda ps: any(torch.isnan(p.grad).any().item() for p in ps),
    "vector": lambda ps: nn.utils.parameters_to_vector(p.grad for p in ps).norm(),
    "dot": lambda ps: sum(torch.dot(p.grad.flatten(), p.flatten()) for p in ps),
    "product": lambda ps: sum((p.grad * p.detach()).sum() for p in ps),
    "mean": lambda ps: ps[0].grad.mean(),
    "std": lambda ps: ps[0].grad.std(),
    "foreach norm": lambda ps: torch._foreach_norm([p.grad for p in ps]),
    "weights": lambda ps: sum(p.pow(2).sum() for p in ps),
    "equal": lambda ps: torch.equal(ps[0], ps[0].detach()),
    "allclose": lambda ps: torch.allclose(ps[0].detach(), ps[0].grad),
    "einsum": lambda ps: torch.einsum("ij,ij->", ps[0].grad, ps[0].grad),
    "clone": lambda ps: sum(p.grad.detach().clone().float().square().sum() for p in ps),
    "scaler": lambda ps: _scaler(ps),
}


def _scaler(ps: list[Any]) -> None:
    optimizer, scaler = torch.optim.SGD(ps, lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def refused(spec: str) -> dict[str, str]:
    pm, _ = trained(spec)
    parameters = sorted((p for p in pm.parameters() if p.grad is not None), key=lambda p: -p.ndim)
    found = {}
    for name, number in REFUSED.items():
        try:
            found[name] = f"gave {number(parameters)}"
        except mp.ConfigError as error:
            found[name] = str(error)
    return found


def test_numbers_of_stages_are_refused(gloo: Pool) -> None:
    for found in gloo.run(refused, "pp=2"):
        scaler = found.pop("scaler")
        wrong = {
            name: words for name, words in found.items() if "this rank holds the parameters and gradients of its own stages" not in words
        }
        assert not wrong and "Call mp.clip_grad_norm_(pm.parameters(), max_norm)" in found["clip_grad_norm_"], wrong
        assert scaler.startswith("torch's GradScaler divides the gradient of") and "scaler.scale(pm).train_step(**batch)" in scaler


class Stacked(nn.Module):
    """Stacked experts, each of which every rank of ep has a part of, beside dense parameters; one is too small for all data ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.gate, self.head = nn.Embedding(11, 8), Loop(), nn.Linear(8, 4), nn.Linear(8, 11)
        self.scale, self.few = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(1, 8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).flatten(0, 1)
        weights, chosen = self.gate(h).softmax(-1).topk(2, -1)
        h = h + self.scale * self.few * self.experts(h, chosen, weights)
        return nn.functional.cross_entropy(self.head(h), y.flatten())


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 8, 6)), nn.Parameter(0.3 * torch.randn(4, 6, 8))

    def forward(self, h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(h)
        for i in range(4):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, torch.tanh(h[token] @ self.up[i]) @ self.down[i] * weights[token, place, None])
        return out


WHERE_ALL_HOLD_ALL: dict[str, Callable[[list[Any]], Any]] = {
    name: number for name, number in REFUSED.items() if name not in ("scaler", "equal", "allclose", "einsum", "foreach norm", "clone")
} | {
    "largest norm": lambda ps: nn.utils.get_total_norm([p.grad for p in ps], math.inf),
    "sum of magnitudes": lambda ps: nn.utils.get_total_norm([p.grad for p in ps], 1.0, foreach=False),
    "smallest": lambda ps: min(torch.linalg.vector_norm(p.grad, -math.inf) for p in ps),
    "clipping by a norm": lambda ps: nn.utils.clip_grads_with_norm_(ps, 0.5, torch.tensor(2.0).double()) or 0.0,
    "clipping again": lambda ps: nn.utils.clip_grad_norm_(ps, 0.01, norm_type=math.inf),
}


def on_every_rank(kind: str, spec: str, modes: tuple[str, ...]) -> None:
    """torch's own clipping, and loops over gradients, where every rank has a part of every parameter: right."""
    for mode in modes:
        (model, batch), mesh = make(), mp.make_mesh(spec, "cpu")
        torch.manual_seed(0)
        model = Stacked().double() if kind == "Stacked" else model
        local = mp.local_batch(batch, mesh)
        pm = mp.parallelize(model, mesh, example=local, config=mp.ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]
        pm.train_step(**local)
        alone(model, batch)
        ours = list(pm.parameters())
        theirs = [model.get_parameter(name) for name, _ in pm.named_parameters()]
        for name, number in WHERE_ALL_HOLD_ALL.items():
            found = number(ours)
            found = found.full_tensor() if isinstance(found, DTensor) else found
            assert float(found) == pytest.approx(float(number(theirs)), rel=1e-12, nan_ok=True), (spec, mode, name)
        for name, parameter in pm.named_parameters():
            torch.testing.assert_close(mp.full_grad(parameter), model.get_parameter(name).grad, rtol=1e-12, atol=1e-13)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("kind", "spec", "world", "modes"),
    [
        ("Net", "dp=2,tp=2", 4, ("zero1",)),
        ("Stacked", "dp=2,ep=2", 4, ("zero3",)),
        ("Stacked", "ep=2,tp=2", 4, ("zero3",)),
    ],
)
def test_numbers_where_every_rank_has_a_part_of_all(gloo: Pool, kind: str, spec: str, world: int, modes: tuple[str, ...]) -> None:
    gloo.run(on_every_rank, kind, spec, modes, world=world, timeout=240)


def allowed(spec: str) -> None:
    """What is done to every element, single elements, shapes, our own norms."""
    pm, model = trained(spec)
    for p in (*pm.parameters(), *model.parameters()):
        p.grad.mul_(0.5).add_(p.detach(), alpha=0.1).clamp_(-0.3, 0.3)
        p.grad.lerp_(p.grad.clone().sign(), 0.01)
    for name, parameter in pm.named_parameters():
        theirs = model.get_parameter(name)
        torch.testing.assert_close(mp.full_grad(parameter), theirs.grad, rtol=1e-12, atol=1e-13)
        assert parameter.numel() == theirs.numel() and parameter.shape == theirs.shape
    nn.utils.clip_grad_value_([p for p in pm.parameters()], 0.2)
    nn.utils.clip_grad_value_(model.parameters(), 0.2)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for norm_type in (2.0, math.inf):
        assert float(mp.grad_norm(pm.parameters(), norm_type)) == pytest.approx(float(nn.utils.get_total_norm(grads, norm_type)), rel=1e-12)
    first = next(p for p in pm.parameters() if p.ndim == 2)
    assert first[1, 2].item() == mp.full_tensor(first)[1, 2].item()
    assert first.detach().sum(0).shape == first.shape[1:]


def test_what_is_no_number_is_allowed(gloo: Pool) -> None:
    gloo.run(allowed, "pp=2")


def test_a_number_of_one_parameter_remembers_it() -> None:
    one, other = (NumberApart(2.0, Origin(frozenset({name}), None, True)) for name in ("a", "b"))
    assert max(1.0, one) ** 2 / 4 == 1.0 and -one + one == 0.0 and isinstance(0.0 + one, NumberApart) and {one: 1}[2.0] == 1
    for reckon in (lambda: sum([one, other]), lambda: max(one, other), lambda: one * other, lambda: other - one / 2):
        with pytest.raises(mp.ConfigError, match="of a and 1 more: this rank holds"):
            reckon()
    assert not inside_step()


def schedulers_hooks_and_accumulation(spec: str) -> list[tuple[float, float]]:
    """A learning-rate schedule, hooks around steps, gradients that stay (set_to_none=False), two batches a step, closures."""
    mesh, (model, batch) = mp.make_mesh(spec, "cpu"), make()
    local = mp.local_batch(batch, mesh)
    pm = mp.parallelize(model, mesh, example=local)
    losses: list[list[float]] = []
    for one, step in ((pm, lambda: pm.train_step(**local)), (model, lambda: alone(model, batch))):
        optimizer = torch.optim.AdamW([{"params": one.parameters()}], lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
        calls: list[int] = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append(1))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(2))
        losses.append([])
        for _ in range(3):
            losses[-1].append(float(step().detach()))  # type: ignore[no-untyped-call]
            losses[-1].append(float(optimizer.step(step)))  # type: ignore[arg-type]
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
        assert calls == [1, 2] * 3
    return list(zip(*losses, strict=True))


@pytest.mark.parametrize("spec", ["dp=2", "pp=2"])
def test_loops_around_optimizers(gloo: Pool, spec: str) -> None:
    for found in gloo.run(schedulers_hooks_and_accumulation, spec):
        assert all(ours == pytest.approx(theirs, rel=1e-9) for ours, theirs in found), found
        assert found[0][0] != found[-1][0]
