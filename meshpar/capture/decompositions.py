"""Operators that are written out when a program is decomposed, because as one call they hide something from the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

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
