"""A Llama-like model, and the same model cut by hand the Megatron way: local tensors, f and g, nothing between them and torch.

`Model` is the ordinary one: meshpar and `parallelize_module` are given it as it is. `Handwritten` holds one rank's slices of its
parameters. Without sequence parallelism: f (identity / all-reduce) before a column-parallel matmul, g (all-reduce / identity) after a
row-parallel one. With it the residual stream and the norms are cut along the sequence: all-gather / reduce-scatter in the place of f, its
mirror in that of g, and the gradients of the norm weights are pending sums, all-reduced together per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """RMS norm with a weight, torch's fused operator."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, hidden: int, head: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
        self.attention, self.mlp = Attention(hidden, head), MLP(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Blocks between an input and a squared-error loss: what tensor parallelism is about, and nothing else."""

    def __init__(self, layers: int, hidden: int, head: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden, head, width) for _ in range(layers))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, target)


# ---- by hand -----------------------------------------------------------------------------------------------------------------------------


class _CopyIn(torch.autograd.Function):
    """Megatron's f: identity, all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _ReduceOut(torch.autograd.Function):
    """Megatron's g: all-reduce, identity for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _GatherIn(torch.autograd.Function):
    """f with sequence parallelism: all-gather along dim 1, reduce-scatter of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return scatter(grad)


class _ScatterOut(torch.autograd.Function):
    """g with sequence parallelism: reduce-scatter along dim 1, all-gather of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gather(grad)


class _SumGradients(torch.autograd.Function):
    """Identity of several weights, one all-reduce of all their gradients."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([g.view(-1) for g in grads])
        dist.all_reduce(flat)
        return tuple(part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True))


class _Share(torch.autograd.Function):
    """Identity of the loss's share of one rank: the sum forward, the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def gather(x: Tensor) -> Tensor:
    """All slices of dim 1, in order."""
    size = dist.get_world_size()
    b, s, h = x.shape
    out = x.new_empty((size * b, s, h))
    dist.all_gather_into_tensor(out, x.contiguous())
    return out if b == 1 and size == 1 else out.view(size, b, s, h).transpose(0, 1).reshape(b, size * s, h)


def scatter(x: Tensor) -> Tensor:
    """This rank's slice of the sum along dim 1."""
    size = dist.get_world_size()
    b, s, h = x.shape
    out = x.new_empty((b, s // size, h))
    dist.reduce_scatter_tensor(out, x.view(b, size, s // size, h).transpose(0, 1).reshape(size * b, s // size, h))
    return out


class HandwrittenBlock(nn.Module):
    """One rank's part of a `Block`."""

    def __init__(self, block: Block, rank: int, size: int, sequence: bool) -> None:
        super().__init__()
        self.head, self.sequence = block.attention.head, sequence
        self.norm1, self.norm2 = _own(block.norm1.weight), _own(block.norm2.weight)
        a, m = block.attention, block.mlp
        self.q, self.k, self.v, self.gate, self.up = (_own(w.weight.chunk(size, 0)[rank]) for w in (a.q, a.k, a.v, m.gate, m.up))
        self.o, self.down = (_own(w.weight.chunk(size, 1)[rank]) for w in (a.o, m.down))

    def forward(self, x: Tensor) -> Tensor:
        f, g = (_GatherIn, _ScatterOut) if self.sequence else (_CopyIn, _ReduceOut)
        norm1, norm2 = _SumGradients.apply(self.norm1, self.norm2) if self.sequence else (self.norm1, self.norm2)
        shape = (x.shape[-1],)
        y = f.apply(F.rms_norm(x, shape, norm1, 1e-6))
        b, s, _ = y.shape
        q, k, v = (F.linear(y, w).view(b, s, -1, self.head).transpose(1, 2) for w in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1)
        x = x + g.apply(F.linear(a, self.o))
        y = f.apply(F.rms_norm(x, shape, norm2, 1e-6))
        return x + g.apply(F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down))


class Handwritten(nn.Module):
    """One rank's part of a `Model`. Input and target are whole on every rank."""

    def __init__(self, model: Model, *, sequence: bool) -> None:
        super().__init__()
        self.rank, self.size, self.sequence = dist.get_rank(), dist.get_world_size(), sequence
        self.layers = nn.ModuleList(HandwrittenBlock(block, self.rank, self.size, sequence) for block in model.layers)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        count = x.numel()
        if self.sequence:
            x, target = (t.chunk(self.size, 1)[self.rank].contiguous() for t in (x, target))
        for layer in self.layers:
            x = layer(x)
        if not self.sequence:
            return F.mse_loss(x, target)
        return _Share.apply(F.mse_loss(x, target, reduction="sum") / count)

    def gradients(self) -> Sequence[dict[str, Tensor]]:
        """Per block, this rank's gradients under the names of `Block`."""
        names = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.o"}
        names |= {n: f"mlp.{n}" for n in ("gate", "up", "down")} | {n: n for n in ("norm1", "norm2")}
        return [{f"{new}.weight": getattr(block, old).grad for old, new in names.items()} for block in self.layers]


def _own(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
