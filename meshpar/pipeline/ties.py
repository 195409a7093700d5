"""Parameters that several stages of a pipeline use: every one of these stages holds a copy, and their gradients are summed once per step.

All holders add the gradients in the order of the stages, so that all get the same bits and copies stay equal. Copies on one rank are one
Parameter. FSDP2 cuts every rank's copy alike, so what travels are the local parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshpar._torch import dtensor_like, part_here, resolve_process_group
from meshpar.mesh import Axis


@dataclass(frozen=True)
class Ties:
    """`holders`: name of a shared parameter -> the pipeline ranks that hold it, in order; `parameters`: those that this rank holds."""

    axis: Axis
    holders: Mapping[str, Sequence[int]]
    parameters: Mapping[str, nn.Parameter]

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Around a step: what it adds to the gradients of any copy is added to all. Collective over the ranks that hold one."""
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None  # gradients of earlier steps have been summed already
        try:
            yield
        except BaseException:
            for name, parameter in self.parameters.items():
                parameter.grad = before[name]
            raise
        self.sum(before)

    @torch.no_grad()
    def sum(self, before: Mapping[str, torch.Tensor | None]) -> None:
        """Make the gradient of every copy what `before` says plus the gradients of all copies. Collective over the ranks that hold one."""
        group = resolve_process_group(self.axis.group) if self.parameters else None
        mine = {name: _local_grad(parameter) for name, parameter in self.parameters.items()}
        theirs, ops = dict[tuple[str, int], torch.Tensor](), list[dist.P2POp]()
        for name, grad in mine.items():
            for peer in self.holders[name]:
                if peer != self.axis.rank:
                    theirs[name, peer] = torch.empty_like(grad)
                    ops.append(dist.P2POp(dist.isend, grad, group=group, group_peer=peer))
                    ops.append(dist.P2POp(dist.irecv, theirs[name, peer], group=group, group_peer=peer))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        for name, parameter in self.parameters.items():
            parts = [mine[name] if peer == self.axis.rank else theirs[name, peer] for peer in self.holders[name]]
            earlier = before.get(name)
            total = torch.zeros_like(parts[0]) if earlier is None else part_here(earlier).clone()
            for part in parts:
                total += part
            parameter.grad = dtensor_like(total, parameter) if isinstance(parameter, DTensor) else total


def _local_grad(parameter: nn.Parameter) -> torch.Tensor:
    """The local gradient, contiguous; zeros where there is none."""
    return torch.zeros_like(part_here(parameter)) if parameter.grad is None else part_here(parameter.grad).contiguous()
