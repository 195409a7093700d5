"""Bags of embeddings as a look-up and a reduction, which have rules: the operator that does both has none.

    rows = embedding(ids, table)              # [bags, n, width], or [n, width] where offsets say at which id each bag begins
    sum: rows.sum(1)    mean: the same over how many    max: rows.max(1)        ids that are `padding_idx` count nowhere

So the table is cut as that of an embedding is, by vocabulary or width. Gradients are dense, whatever `sparse` says: a parameter that is cut
cannot hold sparse ones, and the numbers are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import meshpar.ops.expect  # noqa: F401  (registers meshpar::expect)
from meshpar.capture.blame import here

MODES = ("sum", "mean", "max")


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """`F.embedding_bag`, written out; None for what it refuses itself, and for what needs the operator (a norm or a count of all ids)."""
    if mode not in MODES or max_norm is not None or scale_grad_by_freq or (offsets is None) != (input.dim() == 2):
        return None
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += int(weight.shape[0])
    rows = F.embedding(input, weight, padding_idx)
    kept = None if padding_idx is None else input != padding_idx
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is None:
        return _of_rows(rows, kept, mode)
    return _of_parts(rows, kept, mode, _starts(input, offsets, include_last_offset))


def _of_rows(rows: Tensor, kept: Tensor | None, mode: str) -> Tensor:
    """Bags of equal length: `rows` [bags, n, width], `kept` [bags, n] says which of them count."""
    length = rows.shape[1]
    if mode == "max" and not (isinstance(length, int) and length == 0):
        if kept is None:
            return rows.max(1).values
        top = rows.masked_fill(~kept.unsqueeze(-1), float("-inf")).max(1).values
        return torch.where(kept.any(1, keepdim=True), top, 0.0)
    total = (rows if kept is None else torch.where(kept.unsqueeze(-1), rows, 0.0)).sum(1)
    if mode != "mean":
        return total
    if kept is None:
        return total / (max(1, length) if isinstance(length, int) else length)
    return total / kept.sum(1, keepdim=True).clamp(min=1)


def _of_parts(rows: Tensor, kept: Tensor | None, mode: str, starts: Tensor) -> Tensor:
    """Bags of any length: `rows` [n, width], bag i from `starts[i]` on."""
    bag = torch.searchsorted(starts, torch.arange(rows.shape[0], device=starts.device, dtype=starts.dtype), right=True) - 1
    empty = rows.new_zeros(starts.shape[0], rows.shape[1])
    if mode == "max":
        low = rows if kept is None else rows.masked_fill(~kept.unsqueeze(-1), float("-inf"))
        top = empty.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), low, "amax", include_self=False)
        return torch.where(top == float("-inf"), 0.0, top)
    total = empty.index_add(0, bag, rows if kept is None else torch.where(kept.unsqueeze(-1), rows, 0.0))
    if mode != "mean":
        return total
    ones = torch.ones_like(bag) if kept is None else kept.to(bag.dtype)
    return total / torch.zeros_like(starts, dtype=bag.dtype).index_add(0, bag, ones).clamp(min=1).unsqueeze(-1)


def _starts(input: Tensor, offsets: Tensor, last: bool) -> Tensor:
    """Where bags begin; a check, in every step, that the offsets speak of all these ids."""
    rising = (offsets[:1] == 0).all() & (offsets[1:] >= offsets[:-1]).all() & (offsets[-1:] <= input.shape[0]).all()
    if last:
        rising = rising & (offsets[-1:] == input.shape[0]).all()
    told = (
        f"{here()}, whether the offsets of the bags begin at 0, never fall and stay among the ids. The ids of all data ranks are one "
        f"batch: ranks that count from 0 each pass ids [samples, n] without offsets, padded with padding_idx"
    )
    torch.ops.meshpar.expect(rising, [1], told)
    return offsets[:-1] if last else offsets
