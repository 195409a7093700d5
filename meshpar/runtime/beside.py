"""FSDP2's gathers and sums beside computation, on CPUs: there it waits for each where it is started, for there are no streams.

    gather    started when FSDP2 asks for it (a unit ahead, `set_modules_to_forward_prefetch`), awaited where the values are copied out
    sum       started when a unit's backward is over, awaited before the next unit's begins to be collected, or at the end of backward

What FSDP2 does with a sum after it has asked for it is to make views of it, unless it adds it to gradients that are there, casts it, or
shows it to a hook: then it waits. At most one sum is in flight, so that a rank holds no more than where it waits for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshpar._torch import DefaultAllGather, DefaultReduceScatter, at_end_of_backward, groups_of, in_backward


class SumInFlight:
    """The sum of gradients that is in flight, if there is one."""

    def __init__(self) -> None:
        self._work: Any = None

    def fly(self, work: Any) -> None:
        """Take a sum that was started in a backward, which waits for it when it ends."""
        at_end_of_backward(self.land)
        self._work = work

    def land(self) -> None:
        """Wait for it."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class AllGather(DefaultAllGather):
    """A gather that is awaited where its values are copied out."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
        return super().__call__(output_tensor, input_tensor, group, async_op=True)


class ReduceScatter(DefaultReduceScatter):
    """The sums of one unit, awaited late where nothing reads them at once."""

    def __init__(self, unit: nn.Module, sums: SumInFlight) -> None:
        self._groups, self._sums = groups_of(unit), sums

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for gradients to sum, when those before are summed."""
        self._sums.land()
        return super().allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False) -> Any:
        late = in_backward() and not any(self._reads(one, output_tensor) for one in self._groups)
        work = super().__call__(output_tensor, input_tensor, group, op, async_op=late or async_op)
        if late:
            self._sums.fly(work)
        return work

    @staticmethod
    def _reads(group: Any, summed: Tensor) -> bool:
        """Whether FSDP2 reads the sum at once."""
        held = [one.sharded_param for one in group.fsdp_params]
        return group._orig_dtype != summed.dtype or any(p.grad is not None or p._post_accumulate_grad_hooks for p in held)
