"""Attention of a rank's queries with the keys and values of all ranks, of which no rank keeps more than its own part.

    forward     one all-gather of keys and values together       attention       kept: queries, results, the rank's own keys and values
    backward    the all-gather once more                         gradients       a reduce-scatter of those of keys and values together

What autograd would keep of attention is caught. Whatever can be made again from the gathered keys and values, or from numbers alone (a
mask), is noted as "that part of them", and only the rest is kept. So the kernels are torch's own, and run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from meshpar.ops.collectives import refuse_second_derivative, s_to_r
from meshpar.ops.context import QueryBlock, blocks, mask_of, repeated, repeats_heads, scored
from meshpar.ops.each_rank import each_rank
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import all_gather, reduce_scatter
from meshpar.sharding.types import Shard
from meshpar.simulate import axis_rank, per_rank


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dim: int,
    repeat: int,
    segments: Segments,
    *,
    keys: Segments,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """Attention of the queries that this rank holds, with the keys and values of all ranks.

    `query`: `[b, h, s_local, e]`, cut along its positions in the layout (dim, repeat, segments) of a `Shard`; `key`: `[b, k, t_local, e]`,
    `value`: `[b, k, t_local, f]`, cut in the segments `keys`. `mask`: `[..., s_local, t]`, of this rank's queries and all keys, instead of
    `causal`: the query at position i sees the keys 0 to i, with `window` only the last `window` of them. Returns `[b, h, s_local, f]`.
    """
    b, heads, width = key.shape[0], key.shape[1], key.shape[-1]
    how = _Gather(
        Shard(dim, repeat, tuple(segments)), (0, 1, tuple(keys)), (b, heads, width), causal, window, scale, enable_gqa, (group, size, rank)
    )
    rows = torch.cat([rearrange(x, "b k s e -> s (b k e)") for x in (key, value)], -1)
    needed = any(x is not None and x.requires_grad for x in (query, rows, mask))
    if torch.is_grad_enabled() and needed and not torch.compiler.is_compiling():
        found: Tensor = _GatheredAttention.apply(query, rows, mask, how)
        return found
    whole = s_to_r(rows, *how.layout, group=group, size=size, rank=rank)
    if rank >= 0:
        return _attend(how, rank, query, whole, mask)
    found = each_rank(_attend, *(((how, one, query, whole, mask), {}) for one in range(size)), group=group)
    return found


@dataclass(frozen=True)
class _Gather:
    cut: Shard
    layout: tuple[int, int, Segments]
    """Of the rows of keys and values."""
    shape: tuple[int, int, int]
    """Samples, heads and width of the keys."""
    causal: bool
    window: int | None
    scale: float | None
    enable_gqa: bool
    axis: tuple[str, int, int]

    def parts(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[b, k, t, e]` and values `[b, k, t, f]`, as views."""
        b, heads, width = self.shape
        count = b * heads * width
        key, value = (rearrange(x, "s (b k e) -> b k s e", b=b, k=heads) for x in (whole[:, :count], whole[:, count:]))
        return key, value

    def blocks(self, rank: int, keys: int) -> list[QueryBlock]:
        """The queries that attend together, with the keys that they see."""
        ranges = self.cut.ranges(self.axis[1], rank)
        if self.causal:
            return blocks(ranges, keys, self.window)
        return [QueryBlock(0, sum(high - low for low, high in ranges), 0, 0, keys)]

    def repeats(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether heads of keys and values are to be repeated before they are used."""
        return self.enable_gqa and (self.causal or mask is not None) and repeats_heads(query)


_ROWS, _KEY, _VALUE = -1, -2, -3
"""What backward makes again, beside what is added to the scores of a block."""


def _attend(how: _Gather, rank: int, query: Tensor, whole: Tensor, mask: Tensor | None, kept: _KeptTensors | None = None) -> Tensor:
    """Attention with gathered rows. `kept` is told what can be made again."""
    key, value = how.parts(whole)
    if how.repeats(query, mask):
        key, value = repeated(key, query), repeated(value, query)
        for x, of in ((key, _KEY), (value, _VALUE)):
            if kept is not None:
                kept.can_be_made(x, of)
    found = []
    for at, block in enumerate(how.blocks(rank, key.shape[-2])):
        bias = _bias(how, block, mask, query)
        if kept is not None and bias is not None and bias is not mask:
            kept.can_be_made(bias, at)
        part = query.narrow(-2, block.start, block.length)
        k, v = (x.narrow(-2, block.first, block.last - block.first) for x in (key, value))
        plain = how.causal and bias is None
        grouped = k.shape[1] != part.shape[1] and how.enable_gqa
        found.append(scored(part, k, v, bias, causal=plain, scale=how.scale, enable_gqa=grouped))
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def _bias(how: _Gather, block: QueryBlock, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores of a block."""
    if how.causal:
        return mask_of(block, how.window, like)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


class _Stretch(NamedTuple):
    """A tensor in the memory of one that can be made again: the rows or keys or values, or what is added to the scores of a block."""

    of: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _KeptTensors:
    """What autograd asks to keep of one attention."""

    def __init__(self, whole: Tensor) -> None:
        self.others: list[Tensor] = []
        self.sources = {whole.untyped_storage()._cdata: (_ROWS, whole)}
        self.make: Callable[[int], Tensor] | None = None

    def can_be_made(self, source: Tensor, of: int) -> None:
        """`source` need not be kept."""
        self.sources[source.untyped_storage()._cdata] = of, source

    def pack(self, x: Tensor) -> _Stretch | int:
        """What stands for a tensor until backward."""
        found = self.sources.get(x.untyped_storage()._cdata)
        if found is not None:
            return _Stretch(found[0], x.size(), x.stride(), int(x.storage_offset()))
        self.others.append(x.detach())
        return len(self.others) - 1

    def unpack(self, what: _Stretch | int) -> Tensor:
        """The tensor again."""
        if isinstance(what, int):
            return self.others[what]
        assert self.make is not None
        return self.make(what.of).as_strided(what.size, what.stride, what.offset)


class _Attending:
    """One rank's attention between forward and backward: a graph of its own that holds no large tensor."""

    def __init__(self, how: _Gather, rank: int, needed: Sequence[bool], tensors: Sequence[Tensor | None]) -> None:
        query, whole = tensors[:2]
        assert query is not None and whole is not None
        self.how, self.rank, self.kept = how, rank, _KeptTensors(whole)
        self.like = query.new_empty(()).expand(query.shape)
        with torch.enable_grad(), saved_tensors_hooks(self.kept.pack, self.kept.unpack):
            anchor = torch.empty(0, requires_grad=True)
            roots: list[Any] = [_Beginning.apply(anchor, x.detach()) if need else x for x, need in zip(tensors, needed, strict=True)]  # type: ignore[union-attr]
            out = _attend(how, rank, roots[0], roots[1], roots[2], self.kept)
            self.edges = [get_gradient_edge(x) for x, need in zip(roots, needed, strict=True) if need]
            self.last = get_gradient_edge(out)
        self.kept.sources = {}
        self.out: Tensor | None = out.detach()

    def gradients(self, grad: Tensor, whole: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Those of the tensors that need any."""
        made = {_ROWS: whole}

        def make(of: int) -> Tensor:
            if of not in made:
                made[of] = self._made(of, whole, mask)
            return made[of]

        self.kept.make = make
        try:
            return torch.autograd.grad([self.last], self.edges, [grad], retain_graph=True, materialize_grads=True)
        finally:
            self.kept.make = None

    def _made(self, of: int, whole: Tensor, mask: Tensor | None) -> Tensor:
        if of in (_KEY, _VALUE):
            return repeated(self.how.parts(whole)[of == _VALUE], self.like)
        bias = _bias(self.how, self.how.blocks(self.rank, whole.shape[0])[of], mask, self.like)
        assert bias is not None
        return bias


class _Beginning(torch.autograd.Function):
    """Where a graph begins, without holding the tensor (a leaf would)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, mask: Tensor | None, how: _Gather) -> Tensor:
        whole = all_gather(rows, how.layout, how.axis)
        ctx.how, ctx.needed, ctx.runs = how, ctx.needs_input_grad[:3], {}

        def run(world_rank: int, *tensors: Tensor) -> Tensor:
            rank = how.axis[2] if how.axis[2] >= 0 else axis_rank(how.axis[0], world_rank)
            found = _Attending(how, rank, ctx.needed, [*tensors, *[None] * (3 - len(tensors))])
            out, found.out = found.out, None
            ctx.runs[world_rank] = found
            assert out is not None
            return out

        given = [x for x in (query, whole, mask) if x is not None]
        out: Tensor = per_rank(run, *given)
        others: list[Tensor] = []
        if how.axis[2] >= 0:  # (what simulated ranks keep is not of one length)
            (one,) = ctx.runs.values()
            others, one.kept.others = one.kept.others, []
        ctx.save_for_backward(rows, mask, *others)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        how: _Gather = ctx.how
        rows, mask, *others = ctx.saved_tensors
        whole = all_gather(rows, how.layout, how.axis)

        def run(world_rank: int, grad: Tensor, whole: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
            own: _Attending = ctx.runs[world_rank]
            if how.axis[2] >= 0:
                own.kept.others = others
            try:
                return own.gradients(grad, whole, mask)
            finally:
                if how.axis[2] >= 0:
                    own.kept.others = []

        found = iter(per_rank(run, *[x for x in (grad, whole, mask) if x is not None]))
        of_query, of_whole, of_mask = (next(found) if need else None for need in ctx.needed)
        of_rows = None if of_whole is None else reduce_scatter(of_whole, how.layout, how.axis)
        return of_query, of_rows, of_mask, None
