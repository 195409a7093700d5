"""autograd.Functions with a backward of their own, and a model that calls one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def function(forward: Callable[..., Any], backward: Callable[..., Any], **more: Any) -> Any:
    """An autograd.Function of two functions."""
    return type("Own", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward), **more})


class Straight(torch.autograd.Function):
    """A step whose derivative would be zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


straight = Straight.apply


class Reversed(torch.autograd.Function):
    """Gradient reversal, with the factor where the loop can change it."""

    factor = -0.3

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * Reversed.factor


class AddsLoss(torch.autograd.Function):
    """Adds `loss` to the training loss: its gradient is 1, whatever comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=grads[0].dtype)


adds_loss = AddsLoss.apply

clipped = function(lambda ctx, x: x.clone(), lambda ctx, g: g.clamp(-1e-3, 1e-3))
normalised = function(lambda ctx, x: x.clone(), lambda ctx, g: g / (g.norm() + 1e-12))
by_batch = function(lambda ctx, x: x.clone(), lambda ctx, g: g / g.shape[0])
shifted = function(lambda ctx, x: x.clone(), lambda ctx, g: g + 0.01)


class Calls(nn.Module):
    """Two matrices, with `call` in between."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.a, self.b = call, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.b(self.call(self.a(x) * 3)).square().mean()}


class Routed(nn.Module):
    """Experts whose router's loss is added by a backward. `balance`: the loss that balances experts, else a mean over tokens."""

    def __init__(self, *, balance: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RoutedLayer(balance) for _ in range(layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


class RoutedLayer(nn.Module):
    """Four experts in stacked matrices."""

    def __init__(self, balance: bool) -> None:
        super().__init__()
        self.balance, self.gate, self.experts = balance, nn.Linear(8, 4, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.gate(tokens)
        weights, index = scores.softmax(-1).topk(2, -1)
        loss = 0.1 * (scores.softmax(-1).mean(0).square().sum() if self.balance else scores.logsumexp(-1).square().mean())
        return adds_loss(x + self.experts(tokens, index, weights).view_as(x), loss)


class Experts(nn.Module):
    """Two matrices for each of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16) * 0.3), nn.Parameter(torch.randn(4, 16, 8) * 0.3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(4):
            token, place = torch.where(top_k_index == expert)
            y = torch.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            out = out.index_add(0, token, y * top_k_weights[token, place, None])
        return out
