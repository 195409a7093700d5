"""Mixtures of experts as people write them in plain PyTorch: one layer, many ways to loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H = 8


class SwiGLU(nn.Module):
    def __init__(self, width: int = H, inner: int = 6) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False), nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """A router with a correction that only chooses, normalised weights, a load-balancing loss and a shared expert; `style` loops."""

    def __init__(self, style: str, *, experts: int = 4, choices: int = 2, width: int = H, inner: int = 6) -> None:
        super().__init__()
        self.style, self.choices, self.width = style, choices, width
        self.gate = nn.Linear(width, experts, bias=False)
        self.bias = nn.Buffer(torch.linspace(-0.1, 0.1, experts))
        self.experts = nn.ModuleList(SwiGLU(width, inner) for _ in range(experts))
        self.shared = SwiGLU(width, inner)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = F.softmax(self.gate(x), -1)
        _, index = torch.topk(scores + self.bias, self.choices, -1)
        weights = scores.gather(1, index)
        weights = weights / weights.sum(-1, keepdim=True)
        load = F.one_hot(index, len(self.experts)).sum(1).to(x.dtype).mean(0)
        return weights, index, (load * scores.mean(0)).sum() * len(self.experts)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(-1, self.width)
        weights, index, penalty = self.route(x)
        out = getattr(self, self.style)(x, weights, index)
        return out.view_as(hidden) + self.shared(hidden), penalty

    def mixtral(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        mask = F.one_hot(index, num_classes=len(self.experts)).permute(2, 1, 0)
        for i in range(len(self.experts)):
            slot, top = torch.where(mask[i])
            current = self.experts[i](x[None, top].reshape(-1, self.width)) * weights[top, slot, None]
            final.index_add_(0, top, current.to(x.dtype))
        return final

    def skipping(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (index == i).any(-1)
            if rows.sum() == 0:
                continue
            out[rows] += expert(x[rows]) * (weights * (index == i)).sum(-1)[rows].unsqueeze(-1)
        return out

    def hits(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(index, len(self.experts)).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for i in hit:
            slot, token = torch.where(mask[i[0]])
            out.index_add_(0, token, self.experts[i[0]](x[token]) * weights[token, slot, None])
        return out

    def unique(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in index.unique().tolist():
            token, slot = (index == i).nonzero(as_tuple=True)
            out[token] += weights[token, slot].unsqueeze(-1) * self.experts[i](x[token])
        return out

    def dense(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], len(self.experts), dtype=x.dtype).scatter(1, index, weights)
        return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]

    def masked(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = torch.where(index == i, weights, 0).sum(-1, keepdim=True)
            out = out + expert(x) * weight
        return out

    def stacked(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        everything = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = everything.gather(1, index[..., None].expand(-1, -1, self.width))
        return (chosen * weights[..., None]).sum(1)

    def flat(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        many, flat = x.repeat_interleave(self.choices, 0), index.view(-1)
        y = torch.empty_like(many)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(many[flat == i])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def sorted(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        counts = torch.bincount(index.flatten(), minlength=len(self.experts)).tolist()
        order = index.view(-1).argsort(stable=True)
        rows, outs, start = x[order // index.shape[1]], [], 0
        for i, count in enumerate(counts):
            if count == 0:
                continue
            outs.append(self.experts[i](rows[start : start + count]))
            start += count
        y = torch.cat(outs)
        new = torch.empty_like(y)
        new[order] = y
        return new.view(*index.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)

    def by_token(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for j in range(self.choices):
                out[t] += weights[t, j] * self.experts[int(index[t, j])](x[t])
        return out

    def by_slot(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for j in range(self.choices):
            for i, expert in enumerate(self.experts):
                rows = index[:, j] == i
                if rows.any():
                    out[rows] += weights[rows, j, None] * expert(x[rows])
        return out

    def select(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Every token's last choice only: a sum over one column of the index."""
        out, last = torch.zeros_like(x), index[:, -1]
        for i, expert in enumerate(self.experts):
            out = torch.where((last == i)[:, None], expert(x) * weights[:, -1:], out)
        return out

    def soft(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        scores = F.softmax(self.gate(x), -1)
        return sum(scores[:, i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]

    def capped(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """At most two tokens per expert: not the sum the index tells."""
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (index == i).any(-1)
            mask = mask & (mask.cumsum(0) <= 2)
            out = out + expert(x) * ((weights * (index == i)).sum(-1) * mask)[:, None]
        return out


LIFTED = (
    "mixtral",
    "skipping",
    "hits",
    "unique",
    "dense",
    "masked",
    "stacked",
    "flat",
    "sorted",
    "by_token",
    "by_slot",
)
"""Styles that are lifted."""


class Model(nn.Module):
    """Two layers of a kind between an embedding and a loss."""

    def __init__(self, *layers: nn.Module, width: int = H) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, width), nn.Linear(width, 17, bias=False)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Any]:
        x, penalty = self.embed(ids), 0.0
        for layer in self.layers:
            y, more = layer(x)
            x, penalty = x + y, penalty + more
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss + 0.1 * penalty, "out": x}


def tokens(samples: int = 4, length: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(17, (samples, length))
    labels[0, :3] = -100
    return {"ids": torch.randint(17, (samples, length)), "labels": labels}
