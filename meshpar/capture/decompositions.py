"""Calls that are written out, because as they are they hide something from the graph: by operator when a program is decomposed, and by
function while it is recorded, where the operator cannot be recorded at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import meshpar.ops.ctc  # noqa: F401  (registers meshpar::ctc_loss)
from meshpar._torch import OpOverload


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


WRITTEN_OUT: Mapping[OpOverload, Callable[..., Any]] = {torch.ops.aten.instance_norm.default: instance_norm}


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


_INSTEAD: Mapping[Any, Callable[..., Any]] = {F.ctc_loss: _ctc_loss, Tensor.data.__get__: _data}  # type: ignore[attr-defined]
