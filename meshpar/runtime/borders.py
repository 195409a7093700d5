"""Gradients at the borders of a parallel model that is part of a larger graph: networks one after the other, input gradients, penalties.

Ranks with batches of their own (dp, ep) have losses of their own, and what is minimised is their mean. Outside of the model gradients are
those of this rank's loss, as in DistributedDataParallel; inside they are those of the mean, so that parameters get the sum over ranks. So a
gradient is multiplied by s, one over the number of those ranks, where it enters through an output, and by 1/s where it leaves through an
input: what `torch.autograd.grad(pm(x).sum(), x)` returns is the derivative of what this rank computed, and one parallel model may follow
another, or a module in DistributedDataParallel.

Where backward began at what is the same on all ranks (the loss of the global batch), and nothing trainable lies before the input, its
gradient is that of the number which was returned: of one device, as its part of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshpar._torch import local_of
from meshpar.mesh import Axis
from meshpar.ops.collectives import p_to_i, refuse_second_derivative


class Passage:
    """One call of a program, `share` being what the loss of one data rank counts for: through which of its outputs did backward come?

    `mean`: the loss is that of all data ranks in any case, as in a step.
    """

    def __init__(self, share: float, *, mean: bool = False) -> None:
        self.share, self._mean = share, mean
        self.own = False
        """Whether backward came through an output that is of this rank's samples, since it last left through the inputs."""

    def enter(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs of a program, whose gradients leave it multiplied by what they have to be."""
        wanted = [x for x in tensors if x.requires_grad]
        if self.share == 1.0 or not wanted or not torch.is_grad_enabled():
            return list(tensors)
        passed = iter(_Entering.apply(self, [_trainable_before(x) for x in wanted], *wanted))
        return [next(passed) if x.requires_grad else x for x in tensors]

    def leave(self, value: torch.Tensor, *, own: bool) -> torch.Tensor:
        """An output, whose gradient enters multiplied by the share; `own`: it is of this rank's samples."""
        if not value.requires_grad or not torch.is_grad_enabled():
            return value
        if value.grad_fn is not None:
            value.register_hook(_plain)
        if self.share == 1.0:
            return value
        return _Leaving.apply(self, own and not self._mean, value)


def _plain(grad: torch.Tensor) -> torch.Tensor | None:
    """A gradient as inside of the model: that of a loss to which a term of parameters was added is a DTensor, whole on every rank."""
    return local_of(grad) if isinstance(grad, DTensor) else None


@contextmanager
def over_stages(inputs: Sequence[Sequence[torch.Tensor]], stages: Axis | None) -> Iterator[Sequence[Sequence[torch.Tensor]]]:
    """For a step of a pipeline: leaves in the place of inputs that want a gradient. Every stage has that of what it uses; afterwards the
    inputs get the sum, on all ranks. Collective over the stages if one of them wants a gradient."""
    wanted = [x for tensors in inputs for x in tensors if x.requires_grad]
    if stages is None or not wanted:
        yield inputs
        return
    leaves = [x.detach().requires_grad_() for x in wanted]
    given = iter(leaves)
    yield [[next(given) if x.requires_grad else x for x in tensors] for tensors in inputs]
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    torch.autograd.backward(wanted, [p_to_i(grad, group=stages.group, size=stages.size, rank=stages.rank) for grad in found])


class _Entering(torch.autograd.Function):
    """All inputs in one node: it runs once in a backward, after every output that leads to them."""

    @staticmethod
    def forward(ctx: Any, passage: Passage, trainable: list[bool], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.passage, ctx.trainable = passage, trainable
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        own, ctx.passage.own = ctx.passage.own, False
        back = [own or trainable for trainable in ctx.trainable]
        return None, None, *(g / ctx.passage.share if g is not None and b else g for g, b in zip(grads, back, strict=True))


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: Passage, own: bool, value: torch.Tensor) -> torch.Tensor:
        ctx.passage, ctx.own = passage, own
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        refuse_second_derivative()
        ctx.passage.own |= ctx.own
        return None, None, grad * ctx.passage.share


def _trainable_before(tensor: torch.Tensor) -> bool:
    """Whether parameters, or another parallel model over data ranks, lie before a tensor in the graph."""
    if tensor.grad_fn is None:
        return isinstance(tensor, nn.Parameter)
    found, seen = [tensor.grad_fn], {tensor.grad_fn}
    while found:
        node = found.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter) or node.name() == f"{_Leaving.__name__}Backward":
            return True
        after = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= after
        found += after
    return False
