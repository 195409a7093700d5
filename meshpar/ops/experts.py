"""Expert layers as four operators: dispatch rows to experts, multiply each group by its expert's matrix, combine rows back into tokens.

    h [T, h], index [T, k]
        --dispatch-->     x [T*k, h]  rows sorted by expert, offsets [E] (where each expert's rows end), perm [T*k]
        --grouped_mm-->   y [T*k, o]  rows of expert e times w[e]
        --combine-->      [T, o]      sum over a token's k rows, each times its weight

All shapes are static; they are ordinary custom operators with a fake implementation and a gradient, so they are single nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("meshpar::dispatch", mutates_args=())
def dispatch(h: Tensor, index: Tensor, num_experts: int, dropping: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sort token rows by expert: `h` [T, h] and `index` [T, k] (expert of each choice) -> `x`, `offsets`, `perm`.

    `x` [T*k, h] holds the row of every choice, expert by expert, in token order within an expert (a stable sort). `offsets` [E] (int32) is
    the end of each expert's rows. `perm` [T*k] is the flat choice (token * k + slot) that each row came from.

    With `dropping`, `index` may hold `num_experts` for "no expert": such rows come last, after the last offset, and are sent nowhere.
    Give them a weight of zero.
    """
    flat = index.reshape(-1)
    perm = torch.argsort(flat, stable=True)
    experts = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(flat[perm], experts, right=True).to(torch.int32)
    return h.index_select(0, perm // index.shape[1]), offsets, perm


@dispatch.register_fake
def _(h: Tensor, index: Tensor, num_experts: int, dropping: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.shape[0] * index.shape[1]
    offsets = index.new_empty((num_experts,), dtype=torch.int32)
    return h.new_empty((rows, h.shape[1])), offsets, index.new_empty((rows,), dtype=torch.int64)


@torch.library.custom_op("meshpar::undispatch", mutates_args=())
def undispatch(x: Tensor, perm: Tensor, choices: int) -> Tensor:
    """The gradient of `dispatch`: rows in expert order summed into their tokens, [T*k, h] -> [T, h]."""
    of_token = _inverse(perm).view(-1, choices)
    if _in_one_pass(x, x.dtype):
        return torch.nn.functional.embedding_bag(of_token, x, mode="sum")
    result = x.new_empty((x.shape[0] // choices, x.shape[1]))
    for block in _blocks(result):
        rows = x.index_select(0, of_token[block].flatten())
        torch.sum(rows.view(-1, choices, x.shape[1]), 1, out=result[block])
    return result


@undispatch.register_fake
def _(x: Tensor, perm: Tensor, choices: int) -> Tensor:
    return x.new_empty((x.shape[0] // choices, x.shape[1]))


@torch.library.custom_op("meshpar::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Rows of each expert times its matrix: `x` [n, i] sorted by expert, `w` [E, i, o], `offsets` [E] -> [n, o].

    Rows after the last offset come out as zeros. Any floating type; one fused kernel where the device has one for it.
    """
    if _fused(x, w):
        return torch.nn.functional.grouped_mm(x.contiguous(), w, offs=offsets)
    y = x.new_zeros((x.shape[0], w.shape[2]))
    for expert, rows in groups(offsets):
        torch.mm(x[rows], w[expert], out=y[rows])
    return y


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[2]))


@torch.library.custom_op("meshpar::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """The weight gradient of `grouped_mm`: `x` [n, i], `y` [n, o] -> [E, i, o]; an expert without rows gets zeros."""
    w = x.new_zeros((offsets.shape[0], x.shape[1], y.shape[1]))
    for expert, rows in groups(offsets):
        torch.mm(x[rows].t(), y[rows], out=w[expert])
    return w


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((offsets.shape[0], x.shape[1], y.shape[1]))


@torch.library.custom_op("meshpar::combine", mutates_args=())
def combine(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's rows: `y` [T*k, o] in expert order, `perm` from `dispatch`, `weights` [T, k] -> [T, o].

    Summed choice by choice, in float32 or wider, and returned in the type of `y`: the same bits whatever rank computed which expert. (On
    CPUs that can, a product and its sum are rounded once, not twice, in every row alike.)
    """
    wide = torch.promote_types(torch.promote_types(y.dtype, weights.dtype), torch.float32)
    of_token, weights = _inverse(perm).view(weights.shape), weights.to(wide)
    if _in_one_pass(y, wide):
        return torch.nn.functional.embedding_bag(of_token, y, mode="sum", per_sample_weights=weights)
    result = y.new_empty((weights.shape[0], y.shape[1]))
    for block in _blocks(result):
        terms = (
            y.index_select(0, rows).to(wide).mul_(weight.unsqueeze(1))
            for rows, weight in zip(of_token[block].unbind(1), weights[block].unbind(1))
        )
        total = next(terms, 0.0)  # no choices: zeros
        for term in terms:  # no fused multiply-add: its rounding depends on where a row lies
            total += term
        result[block] = total
    return result


@combine.register_fake
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty((weights.shape[0], y.shape[1]))


@torch.library.custom_op("meshpar::combine_backward", mutates_args=())
def combine_backward(grad: Tensor, y: Tensor, perm: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `combine` for `y` and `weights`."""
    wide = torch.promote_types(torch.promote_types(y.dtype, weights.dtype), torch.float32)
    choices = weights.shape[1]
    for_y, for_rows = torch.empty_like(y), torch.empty(y.shape[0], dtype=wide, device=y.device)
    weight = weights.flatten().index_select(0, perm).to(wide).unsqueeze(1)
    for block in _blocks(y):
        of_row = grad.index_select(0, perm[block] // choices).to(wide)
        torch.sum(of_row * y[block], -1, out=for_rows[block])
        for_y[block] = of_row.mul_(weight[block])
    return for_y, for_rows.index_select(0, _inverse(perm)).view(-1, choices).to(weights.dtype)


@combine_backward.register_fake
def _(grad: Tensor, y: Tensor, perm: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), weights.new_empty(weights.shape)


@torch.library.custom_op("meshpar::row_expert", mutates_args=())
def row_expert(x: Tensor, offsets: Tensor) -> Tensor:
    """The expert of every row of `x` [n, ...] sorted by expert: [n] (int64). Rows after the last offset count to the last expert."""
    rows = torch.arange(x.shape[0], device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp_(max=offsets.shape[0] - 1)


@row_expert.register_fake
def _(x: Tensor, offsets: Tensor) -> Tensor:
    return offsets.new_empty((x.shape[0],), dtype=torch.int64)


def _inverse(perm: Tensor) -> Tensor:
    """Where in expert order each choice's row is."""
    return torch.empty_like(perm).index_copy_(0, perm, torch.arange(perm.shape[0], device=perm.device))


def _in_one_pass(rows: Tensor, wide: torch.dtype) -> bool:
    """Whether torch has a kernel that reads rows where they are and sums them in `wide`, each by itself."""
    return rows.dtype == wide and wide in (torch.float32, torch.float64) and rows.device.type == "cpu" and rows.numel() > 0


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Stretches of a matrix to work on one by one: on a CPU, as many rows as its caches hold in wider types too."""
    step = max(1, 2**18 // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, rows.shape[0])
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def groups(offsets: Tensor) -> list[tuple[int, slice]]:
    """The rows of every expert that has some."""
    ends = offsets.tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start < end]


def _fused(x: Tensor, w: Tensor) -> bool:
    """Whether torch's kernel takes these: bfloat16 on an accelerator, every row a multiple of 16 bytes."""
    return x.dtype == w.dtype == torch.bfloat16 and x.is_cuda and w.shape[1] % 8 == 0 and w.shape[2] % 8 == 0 and 1 in w.stride()[1:]


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.choices = inputs[1].shape[1]
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _dispatch_backward(ctx: Any, x: Tensor, offsets: Tensor, perm: Tensor) -> tuple[Tensor, None, None, None]:
    return undispatch(x, *ctx.saved_tensors, ctx.choices), None, None, None


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    for_x = grouped_mm(grad, w.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    for_w = grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return for_x, for_w, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    for_y, for_weights = combine_backward(grad, *ctx.saved_tensors)
    return for_y, None, for_weights


_GRADIENTS: tuple[tuple[Any, Callable[..., Any], Callable[..., Any]], ...] = (
    (dispatch, _dispatch_backward, _dispatch_setup),
    (grouped_mm, _grouped_mm_backward, _grouped_mm_setup),
    (combine, _combine_backward, _combine_setup),
)
for _operator, _backward, _setup in _GRADIENTS:
    _operator.register_autograd(_backward, setup_context=_setup)
