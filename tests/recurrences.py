"""Mixers written by hand as their recurrence, a step after the other: each one block of a small language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH, VOCABULARY = 12, 6, 4, 30


class Decay(nn.Module):
    """Linear attention whose state fades, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.fade = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = (layer(x).view(b, s, HEADS, -1) for layer in (self.q, self.k, self.v))
        state = x.new_zeros(b, HEADS, c // HEADS, c // HEADS)
        out = []
        for t in range(s):
            state = torch.sigmoid(self.fade) * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, None, :] @ state).squeeze(-2))
        return self.out(torch.stack(out, 1).reshape(b, s, c))


class Gated(nn.Module):
    """A minimal gated recurrence, whose states are written into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate, new = torch.sigmoid(self.gate(x)), self.new(x)
        state, out = torch.zeros_like(x[:, 0]), torch.empty_like(x)
        for t in range(x.shape[1]):
            state = (1 - gate[:, t]) * state + gate[:, t] * new[:, t]
            out[:, t] = state
        return self.out(out)


class Turning(nn.Module):
    """A linear recurrence of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fade, self.turn = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.complex(*self.enter(x).chunk(2, -1))
        each = torch.exp(torch.complex(-torch.exp(self.fade), self.turn))
        state = torch.zeros_like(u[:, 0])
        out = []
        for one in u.unbind(1):
            state = each * state + one
            out.append(state)
        y = torch.stack(out, 1)
        return self.leave(torch.cat([y.real, y.imag], -1))


def cut_pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def pad_then_slice(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def zeros_before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def written_into_zeros(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    return out


def drawn_forward(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:], x.new_zeros(x.shape[0], 2, x.shape[2])], 1)


class TimeMix(nn.Module):
    """Receptance, keys and values of a position and the one before it; sums that fade, kept small by a running maximum."""

    def __init__(self, shift: Callable[[Tensor], Tensor] = cut_pad) -> None:
        super().__init__()
        self.shift, self.mix = shift, nn.Parameter(torch.rand(3, WIDTH))
        self.fade, self.first = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.r, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        r, k, v = (layer(x * m + before * (1 - m)) for layer, m in zip((self.r, self.k, self.v), self.mix, strict=True))
        above, below, most = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], -1e38)
        out = []
        for t in range(x.shape[1]):
            top = torch.maximum(most, self.first + k[:, t])
            old, new = torch.exp(most - top), torch.exp(self.first + k[:, t] - top)
            out.append((old * above + new * v[:, t]) / (old * below + new))
            top = torch.maximum(most - torch.exp(self.fade), k[:, t])
            old, new = torch.exp(most - torch.exp(self.fade) - top), torch.exp(k[:, t] - top)
            above, below, most = old * above + new * v[:, t], old * below + new, top
        return self.out(torch.sigmoid(r) * torch.stack(out, 1))


class ChannelMix(nn.Module):
    """An MLP of a position and the one before it, with a gate at its end."""

    def __init__(self, shift: Callable[[Tensor], Tensor] = pad_then_slice) -> None:
        super().__init__()
        self.shift, self.mix = shift, nn.Parameter(torch.rand(2, WIDTH))
        self.key, self.value = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        gate, key = (layer(x * m + before * (1 - m)) for layer, m in zip((self.gate, self.key), self.mix, strict=True))
        return torch.sigmoid(gate) * self.value(torch.relu(key) ** 2)


class StateSpace(nn.Module):
    """A diagonal state space of the channels themselves, and one matrix from the stream to the stream."""

    def __init__(self, states: int = 2) -> None:
        super().__init__()
        self.fade, self.enter, self.leave = (nn.Parameter(torch.rand(WIDTH, states)) for _ in range(3))
        self.mix = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], *self.fade.shape, dtype=x.dtype)
        out = []
        for one in x.unbind(1):
            state = torch.exp(-torch.exp(self.fade)) * state + self.enter * one[..., None]
            out.append((state * self.leave).sum(-1))
        return F.glu(self.mix(F.gelu(torch.stack(out, 1))), -1)


class Blocks(nn.Module):
    """A language model with one block of each mixer."""

    def __init__(self, *mixers: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), mixer()) for mixer in mixers)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


MIXERS: tuple[type[nn.Module], ...] = (Decay, Gated, Turning, TimeMix, ChannelMix, StateSpace)


def batch() -> dict[str, Tensor]:
    """Two samples, some of whose labels do not count."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2))
    labels[0, -2:] = -100
    return {"ids": ids, "labels": labels}
