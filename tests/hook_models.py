"""Models with hooks that act in backward, for tests: of capture, of simulated ranks, of gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


def half(grad: Tensor) -> Tensor:
    return grad * 0.5


def clamp(grad: Tensor) -> Tensor:
    return grad.clamp(-1e-3, 1e-3)


def unit(grad: Tensor) -> Tensor:
    """Looks at the whole gradient."""
    return grad / grad.norm()


def shaped(grad: Tensor) -> Tensor:
    return grad / grad.shape[0] if grad.shape[0] > 2 else grad


def branch(grad: Tensor) -> Tensor:
    return grad * 3 if grad.abs().max() > 1e-3 else grad


def nothing(grad: Tensor) -> None:
    return None


HOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {f.__name__: f for f in (half, clamp, unit, shaped, branch, nothing)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Chain(nn.Module):
    """Blocks with a hook at a place: `hook(name)` says what, `where` which tensor."""

    def __init__(self, where: str, hook: str = "half", depth: int = 2) -> None:
        super().__init__()
        self.where, self.hook = where, HOOKS[hook]
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        early = h.sin()
        if self.where == "twice":  # used before and after
            h.register_hook(self.hook)
            h.register_hook(clamp)
        if self.where == "removed":
            h.register_hook(self.hook).remove()
        if self.where == "view":
            v = h.transpose(0, 1)
            v.register_hook(self.hook)
            h = h + v.transpose(0, 1)
        if self.where == "input" and x.requires_grad:
            x.register_hook(self.hook)
        weight = self.first.weight * 2
        if self.where == "weight":
            weight.register_hook(self.hook)
        for layer in self.layers:
            h = layer(h)
            if self.where == "output":
                h.register_hook(self.hook)
        return {"loss": ((h + early) @ weight).square().mean()}


def chain(where: str, hook: str = "half") -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64, with its hook, and a batch."""
    torch.manual_seed(0)
    model = Chain(where, hook).double()
    if where == "parameter":
        model.layers[0].up.weight.register_hook(HOOKS[hook])
        model.first.bias.register_hook(HOOKS[hook])
    if where == "module":
        model.layers[1].register_full_backward_hook(_after)
        model.layers[0].up.register_full_backward_pre_hook(_before)
    return model, {"x": torch.randn(8, 5, WIDTH, dtype=torch.float64)}


def _after(module: nn.Module, given: Any, made: Any) -> Any:
    return (given[0] * 0.5 + made[0].tanh(),)


def _before(module: nn.Module, made: Any) -> Any:
    return (made[0] * 0.25,)


def without(model: nn.Module) -> nn.Module:
    """The same model after its hooks were taken off: what a program that lost them computes."""
    import copy

    new = copy.deepcopy(model)
    for module in new.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    new.where = "nowhere"
    return new
