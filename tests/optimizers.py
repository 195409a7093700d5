"""Every optimizer of torch in every form it has, and some of the kinds that users write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import optim

import meshpar as mp
from meshpar._torch import without_modes

Make = Callable[[list[torch.Tensor]], optim.Optimizer]


class Lamb(optim.Optimizer):
    """The usual way to write it: norms of a parameter and of its update, compared with zero in Python."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["v"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                update = state["m"] / state["v"].sqrt().add(1e-6)
                weight, step = p.norm(), update.norm()
                ratio = weight / step if weight > 0 and step > 0 else 1.0
                p.add_(update * ratio, alpha=-group["lr"])


class Lars(Lamb):
    """Norms as Python's numbers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    ratio = p.norm().item() / (p.grad.norm().item() + 1e-6)
                    p.add_(p.grad, alpha=-group["lr"] * ratio)


class Shampoo(Lamb):
    """Whole matrices: products, an eigenvalue decomposition; state of other shapes, made by `torch.zeros`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.reshape(p.shape[0] if p.ndim else 1, -1)
                if not state:
                    state["left"] = torch.zeros(len(grad), len(grad), dtype=p.dtype)
                state["left"] = state["left"] + grad @ grad.T
                values, vectors = torch.linalg.eigh(state["left"])
                root = vectors @ torch.diag(values.clamp(min=1e-3).rsqrt()) @ vectors.T
                p.sub_((root @ grad).view_as(p), alpha=group["lr"])


class Orthogonal(Lamb):
    """Muon in the dtype of its parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.ndim != 2:
                    continue
                x = p.grad.T if len(p) > p.shape[1] else p.grad.clone()
                x = x / x.norm()
                for _ in range(3):
                    x = 1.5 * x - 0.5 * x @ x.mT @ x
                p.add_(x.T if len(p) > p.shape[1] else x, alpha=-group["lr"])


class Masked(Lamb):
    """Writes through masks, views and rows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.clone()
                grad[grad > 0] *= 0.5
                flat = grad.view(-1)
                flat[::2] *= 0.25
                grad[..., :1].add_(1e-3) if grad.ndim else grad.add_(1e-3)
                largest = flat.abs().topk(min(3, flat.numel())).values.min()
                p.sub_(torch.where(grad.abs() >= largest, grad, 0.1 * grad), alpha=group["lr"])


class Global(Lamb):
    """D-adaptation and Prodigy: one step size for all, from a number added up over all parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        total = 0.0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total += p.grad.abs().sum().item()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / (1 + total))


class Clipping(Lamb):
    """Clips the norm over all parameters itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in params]))
        for p in params:
            p.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])


def _matrices(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p for p in params if p.ndim == 2]


def _groups(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in params if p.ndim < 2], "lr": 0.01}]


PER_PARAMETER: Mapping[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd maximize": lambda p: optim.SGD(p, lr=0.01, maximize=True, weight_decay=0.1),
    "sgd foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam groups": lambda p: optim.Adam(_groups(p), lr=0.05),
    "adam amsgrad": lambda p: optim.Adam(p, lr=0.05, amsgrad=True),
    "adam foreach": lambda p: optim.Adam(p, lr=0.05, foreach=True, amsgrad=True),
    "adam fused": lambda p: optim.Adam(p, lr=0.05, fused=True),
    "adam tensor lr": lambda p: optim.Adam(p, lr=torch.tensor(0.05)),
    "adamw": lambda p: optim.AdamW(p, lr=0.05),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.05, foreach=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.05),
    "adamax foreach": lambda p: optim.Adamax(p, lr=0.05, foreach=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.05),
    "nadam foreach": lambda p: optim.NAdam(p, lr=0.05, foreach=True),
    "radam": lambda p: optim.RAdam(p, lr=0.05),
    "radam foreach": lambda p: optim.RAdam(p, lr=0.05, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, eps=1e-3),
    "rmsprop foreach": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, eps=1e-3, foreach=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "rprop foreach": lambda p: optim.Rprop(p, lr=0.01, foreach=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "adagrad foreach": lambda p: optim.Adagrad(p, lr=0.05, foreach=True),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.05, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "adadelta foreach": lambda p: optim.Adadelta(p, lr=1.0, foreach=True),
    "asgd": lambda p: optim.ASGD(p, lr=0.05),
    "asgd foreach": lambda p: optim.ASGD(p, lr=0.05, foreach=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.05),
    "adafactor foreach": lambda p: optim.Adafactor(p, lr=0.05, foreach=True),
    "muon": lambda p: optim.Muon(_matrices(p), lr=0.05),
    "lamb": lambda p: Lamb(p, lr=0.05),
    "lars": lambda p: Lars(p, lr=0.05),
    "shampoo": lambda p: Shampoo(p, lr=0.01),
    "orthogonal": lambda p: Orthogonal(p, lr=0.05),
    "masked": lambda p: Masked(p, lr=0.05),
}
"""Those that treat every parameter by itself."""

ACROSS: Mapping[str, Make] = {
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "lbfgs wolfe": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "global": lambda p: Global(p, lr=0.05),
    "clipping": lambda p: Clipping(p, lr=0.05),
}
"""Those that make one number of all parameters."""


def train(model: Any, make: Make, loss_of: Callable[[], torch.Tensor], steps: int = 3) -> None:
    """Steps; with a closure where the optimizer wants it."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return loss_of()

    for _ in range(steps):
        if isinstance(optimizer, optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def compared(
    pm: Any, model: torch.nn.Module, names: Iterable[str], ours: Callable[[], Any], theirs: Callable[[Any], Any]
) -> dict[str, Any]:
    """Name of an optimizer -> the largest difference of any parameter after three steps, or the words of the refusal."""
    start, found = copy.deepcopy(model.state_dict()), dict[str, Any]()
    for name in names:
        make = {**PER_PARAMETER, **ACROSS}[name]
        pm.load_state_dict(start)
        with without_modes():  # one device: no simulated ranks
            alone = copy.deepcopy(model)
            train(alone, make, lambda alone=alone: theirs(alone))  # type: ignore[misc]
        assert any(not torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True)), f"{name} does nothing"
        try:
            train(pm, make, ours)
        except mp.ConfigError as error:
            found[name] = str(error)
            continue
        expected = dict(alone.named_parameters())
        found[name] = max(float((mp.full_tensor(p) - expected[n].detach()).abs().max()) for n, p in pm.named_parameters())
    return found
