"""A decoder of given dimensions in plain torch: what a dry run plans when all that is known of a model is its sizes.

x = embedding(ids) (+ positions)
for every layer:  x = x + attention(norm(x));  x = x + feed-forward part, or experts (norm(x))
loss = cross entropy of head(norm(x)) with the next token
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpar.errors import ConfigError
from meshpar.planner import Transformer


class Decoder(nn.Module):
    """The model of a `planner.Transformer`. Its forward takes `input_ids` and `labels` [b, s], and returns the loss.

    `dropout`: of what attention and the feed-forward part add to the residual. Raises `ConfigError` for what it has no layers for.

    >>> with torch.device("meta"):
    ...     model = Decoder(Transformer(layers=2, hidden=64, heads=4, ffn=128, vocab=100))
    >>> sum(p.numel() for p in model.parameters()) == Transformer(layers=2, hidden=64, heads=4, ffn=128, vocab=100).parameters
    True
    """

    def __init__(self, sizes: Transformer, *, dropout: float = 0.0) -> None:
        super().__init__()
        odd = [name for name in ("latent", "window", "predicts") if getattr(sizes, name)]
        if odd:
            raise ConfigError(f"a decoder from sizes alone has no {', '.join(odd)}: give the model itself.")
        self.sizes = sizes
        self.tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.positions = nn.Embedding(sizes.positions, sizes.hidden) if sizes.positions else None
        self.layers = nn.ModuleList(DecoderLayer(sizes, i, dropout) for i in range(sizes.layers))
        self.norm = _norm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        if sizes.tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions(place)
        turn = None if self.positions is not None else _rotation(place, self.sizes.head, x.dtype)
        for layer in self.layers:
            x = layer(x, turn)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class DecoderLayer(nn.Module):
    """A block: attention, then a feed-forward part or experts, each after a norm and beside the residual."""

    def __init__(self, sizes: Transformer, index: int, dropout: float) -> None:
        super().__init__()
        routed = bool(sizes.experts) and index >= sizes.dense_layers
        self.dropout = dropout
        self.norm1, self.norm2 = _norm(sizes.hidden), _norm(sizes.hidden)
        self.attention = Attention(sizes)
        self.feed = Routed(sizes) if routed else FeedForward(sizes.hidden, sizes.ffn, gated=sizes.gated)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x), turn), self.dropout, self.training)
        return x + F.dropout(self.feed(self.norm2(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.width, h, d = sizes.head, sizes.hidden, sizes.head
        self.q = nn.Linear(h, sizes.heads * d, bias=False)
        self.k, self.v = (nn.Linear(h, sizes.keys * d, bias=False) for _ in range(2))
        self.out = nn.Linear(sizes.heads * d, h, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if turn is not None:
            q, k = _turned(q, *turn), _turned(k, *turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with a GELU between, or three with a gate."""

    def __init__(self, hidden: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False) if gated else None
        self.up, self.down = nn.Linear(hidden, width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Routed(nn.Module):
    """Each token through its `top_k` experts, and through the shared one, where there is one."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.shared = FeedForward(sizes.hidden, sizes.shared_ffn, gated=sizes.gated) if sizes.shared_ffn else None
        self.experts = Stacked(sizes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, index = self.router(rows).softmax(-1).topk(self.top_k, -1)
        y = self.experts(rows, index, weights / weights.sum(-1, keepdim=True)).view_as(x)
        return y if self.shared is None else y + self.shared(x)


class Stacked(nn.Module):
    """All experts of a layer in one tensor per matrix, [experts, out, in]."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        e, h, f = sizes.experts, sizes.hidden, sizes.expert_ffn
        self.gate = nn.Parameter(torch.empty(e, f, h)) if sizes.gated else None
        self.up, self.down = nn.Parameter(torch.empty(e, f, h)), nn.Parameter(torch.empty(e, h, f))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        hit = F.one_hot(top_k_index, self.up.shape[0]).permute(2, 1, 0)
        for expert in range(self.up.shape[0]):
            slot, token = torch.where(hit[expert])
            rows = hidden[token]
            up = F.linear(rows, self.up[expert])
            up = F.gelu(up) if self.gate is None else F.silu(F.linear(rows, self.gate[expert])) * up
            out.index_add_(0, token, F.linear(up, self.down[expert]) * top_k_weights[token, slot, None])
        return out


def _norm(hidden: int) -> nn.LayerNorm:
    """A norm that is one kernel whatever the device, with a weight alone."""
    return nn.LayerNorm(hidden, bias=False)


def _rotation(place: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's turn, [s, width]."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=place.device, dtype=torch.float32) / width)
    angle = torch.outer(place.float(), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
