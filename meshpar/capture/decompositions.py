"""Calls that are written out, because as they are they hide something from the graph: by operator when a program is decomposed, and by
function while it is recorded, where the operator cannot be recorded at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import meshpar.ops.ctc
import meshpar.ops.expect  # noqa: F401  (registers meshpar::expect)
from meshpar._torch import OpOverload
from meshpar.capture.bags import embedding_bag
from meshpar.capture.blame import here
from meshpar.errors import CaptureError


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Each sample and channel normalised over space. The operator updates its running statistics without saying so; here one sees it."""
    dims = list(range(2, x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    per_channel = [1, -1] + [1] * len(dims)
    if use_input_stats:
        var, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        if running_mean is not None and running_var is not None:
            count = wide[0, 0].numel()
            _blend(running_mean, mean, momentum)
            _blend(running_var, var * (count / max(1, count - 1)), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.view(per_channel), running_var.view(per_channel)
    y = (wide - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype)


def _blend(running: Tensor, now: Tensor, momentum: float) -> None:
    running.copy_(running * (1 - momentum) + now.detach().mean(0).flatten() * momentum)


def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """What lies at these places of the memory of `x`, told by the values of `x`: elsewhere they may lie in another order.

    Windows along a dim become `unfold`, anything else an index. Raises CaptureError where the memory holds more than `x`.
    """
    strides = list(x.stride())
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    dense = x.permute(order)
    if any(n != 1 and s != want for n, s, want in zip(dense.shape, [strides[d] for d in order], _strides(dense.shape), strict=True)):
        raise CaptureError(
            "The forward calls as_strided on a tensor that does not fill its memory without gaps.\n"
            "  Call contiguous() before, or use unfold, slices and indices, which do not depend on where values lie."
        )
    start = 0 if storage_offset is None else storage_offset - int(x.storage_offset())
    found = _unfolded(dense, size, stride) if start == 0 else None
    if found is not None:
        return found
    places = torch.full([1] * len(size), start, device=x.device)
    for dim, (n, step) in enumerate(zip(size, stride, strict=True)):
        along = torch.arange(n, device=x.device) * step
        places = places + along.view([n if d == dim else 1 for d in range(len(size))])
    return dense.reshape(-1)[places.view(size)]


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[d + 1 :]) for d in range(len(shape))]


def _unfolded(dense: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor | None:
    """as_strided of a contiguous tensor by slices and windows, or None: at most two dims of the result may run along one of it."""
    extents = [(d, step) for d, step in enumerate(_strides(dense.shape)) if dense.shape[d] > 1]
    along: dict[int, list[tuple[int, int]]] = {d: [] for d, _ in extents}  # dim -> [(step, dim of the result)]
    for dim, (n, step) in enumerate(zip(size, stride, strict=True)):
        if n == 1:
            continue
        held = next(((d, one) for d, one in extents if step and step % one == 0 and step < one * dense.shape[d]), None)
        if held is None:
            return None
        along[held[0]].append((step // held[1], dim))
    value, names = dense, [-1] * dense.dim()
    for dim in along:
        runs = sorted(along[dim], reverse=True)
        if sum((size[d] - 1) * step for step, d in runs) >= dense.shape[dim] or len(runs) > 2:
            return None
        if len(runs) == 2:
            (step, windows), (inner, width) = runs
            if inner != 1:
                return None
            value = value.unfold(dim, size[width], step).narrow(dim, 0, size[windows])
            names[dim] = windows
            names.append(width)
        else:
            step, names[dim] = runs[0] if runs else (1, -1)
            count = size[names[dim]] if runs else 1
            value = value[(slice(None),) * dim + (slice(0, (count - 1) * step + 1, step),)]
    order = sorted(range(value.dim()), key=lambda d: names[d])
    return value.permute(order).reshape(size)


WRITTEN_OUT: Mapping[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.instance_norm.default: instance_norm,
    torch.ops.aten.as_strided.default: as_strided,
}


class Written(TorchFunctionMode):
    """Calls other functions in place of those whose operators have shapes that depend on values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        instead = _INSTEAD.get(func)
        found = None if instead is None else instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor | None:
    """A loss per sample, then its reduction."""
    if log_probs.dim() != 3:
        return None
    lengths = [torch.as_tensor(n, device=targets.device) for n in (input_lengths, target_lengths)]
    each = torch.ops.meshpar.ctc_loss(log_probs, targets, *lengths, blank, zero_infinity)
    if reduction == "mean":
        return (each / lengths[1].clamp(min=1)).mean()
    return each.sum() if reduction == "sum" else each


def _data(tensor: Tensor) -> Tensor:
    """What torch 2.13 records of `x.data` is a constant without values."""
    return tensor.detach()


def _of_some_rows(input: Tensor, *args: Any, **kwargs: Any) -> None:
    """torch 2.13 asks whether there are any rows; when their number is not known, yes: the graph has all of them in the end."""
    rows = input.shape[0] if input.dim() else 1
    if not isinstance(rows, int):
        torch._check(rows > 0)


def _bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor | None:
    """Counts of `minlength` numbers, and a check that there is no larger one: then there would be more counts."""
    if minlength == 0 or not isinstance(input.numel(), int):
        return None
    torch.ops.meshpar.expect((input < minlength).all(), [1], f"{here()}, whether all are below minlength={minlength}")
    if weights is None:
        ones = torch.ones_like(input, dtype=torch.int64)
    else:
        ones = weights.detach() if weights.dtype == torch.float32 else weights.detach().double()
    return ones.new_zeros(minlength).index_add(0, input.long(), ones)


def _asks_for_gradients(*_: Any, **__: Any) -> None:
    raise CaptureError(
        f"The forward asks for gradients{here()}, and the graph of a forward has none before all of it is captured.\n"
        "  A term that is a gradient (a gradient penalty, forces of an energy) has to be written as tensor operations: by hand, or with "
        "torch.func.jvp where it is a derivative along one direction."
    )


_INSTEAD: Mapping[Any, Callable[..., Any]] = {
    F.ctc_loss: _ctc_loss,
    F.embedding_bag: embedding_bag,
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    torch.bincount: _bincount,
    Tensor.bincount: _bincount,
    F.cross_entropy: _of_some_rows,
    F.nll_loss: _of_some_rows,
    torch.autograd.grad: _asks_for_gradients,
    torch.autograd.backward: _asks_for_gradients,
    Tensor.backward: _asks_for_gradients,
}
"""Function -> what to call before it; anything but None is the result."""
