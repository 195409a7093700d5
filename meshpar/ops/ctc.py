"""Connectionist temporal classification at fixed shapes: one loss per sample, and a gradient that computes it again.

torch's own operator keeps a table as wide as the longest target, a size that depends on values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@torch.library.custom_op("meshpar::ctc_loss", mutates_args=())
def ctc_loss(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool) -> Tensor:
    """The loss of every sample [n], as `torch.nn.functional.ctc_loss(..., reduction="none")`.

    `log_probs` [t, n, c]; `targets` [n, s], or [sum of target_lengths], one sample after the other; lengths [n].
    """
    loss, _ = _alpha(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    return torch.where(loss == torch.inf, 0.0, loss) if zero_infinity else loss.clone()


@ctc_loss.register_fake
def _(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool) -> Tensor:
    return log_probs.new_empty((log_probs.shape[1],))


@torch.library.custom_op("meshpar::ctc_loss_backward", mutates_args=())
def ctc_loss_backward(
    grad: Tensor, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """The gradient of `ctc_loss` in `log_probs`."""
    if log_probs.shape[1] == 0:
        return torch.zeros_like(log_probs)
    lengths = input_lengths.tolist(), target_lengths.tolist()
    found = _alpha(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    return aten._ctc_loss_backward(grad.contiguous(), log_probs, targets, *lengths, *found, blank, zero_infinity)


@ctc_loss_backward.register_fake
def _(
    grad: Tensor, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    return torch.empty_like(log_probs)


def _alpha(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """The losses, and the table that the gradient is made of."""
    if log_probs.shape[1] == 0:
        return log_probs.sum((0, 2)), log_probs
    return aten._ctc_loss(log_probs, targets, input_lengths.tolist(), target_lengths.tolist(), blank, zero_infinity)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.blank, ctx.zero_infinity = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.meshpar.ctc_loss_backward(grad, *ctx.saved_tensors, ctx.blank, ctx.zero_infinity), None, None, None, None, None


ctc_loss.register_autograd(_backward, setup_context=_keep)
