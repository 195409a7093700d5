"""Ranks that must run the same program in a step say so to each other: one number per rank, on its way while the step runs.

begin("train_8f3a beta=0.5")      an all-reduce of two numbers starts
...the step...
check()                           it has arrived long ago: all alike, or an error on every rank, instead of a hang or a wrong sum
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.errors import BatchError
from meshpar.simulate import is_simulated


class Alike:
    """One exchange per step over all ranks of a mesh; nothing at all where one process stands for them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._device = mesh.device_type
        self._real = mesh.size() > 1 and not is_simulated() and dist.get_backend() != "fake"
        self._pending: tuple[torch.Tensor, Any] | None = None

    def begin(self, text: str, *, new: bool) -> None:
        """Start to compare a text with those of the other ranks. `new`: this rank has not seen such a batch yet. Collective."""
        if self._real:
            number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
            sent = torch.tensor([number, -number, not new], device=self._device)
            self._pending = sent, dist.all_reduce(sent, op=dist.ReduceOp.MAX, async_op=True)

    def check(self, closer: Callable[[], None] | None = None) -> None:
        """Wait for the comparison. Raises BatchError where ranks differ.

        `closer`: a comparison of batches, which tells more; it is made where the batch is new on every rank.
        """
        if self._pending is None:
            if closer is not None:
                closer()
            return
        (sent, work), self._pending = self._pending, None
        work.wait()
        most, least, known = sent.tolist()
        if closer is not None and not known:
            closer()
        if most != -least:
            raise BatchError(
                "ranks are about to run different programs, or the same with different numbers: their batches have other structures or "
                "shapes, their models other modes, or attributes that forward reads have other values. Set them alike on every rank."
            )

    def values(self, found: Mapping[str, str]) -> None:
        """Compare values by name, before a program is made for them. Raises BatchError that names those that differ. Collective."""
        if not self._real:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(found))
        names = dict.fromkeys(name for one in everyone for name in one)
        odd = [
            f"{name}: " + ", ".join(f"{one.get(name, 'unread')} on rank {rank}" for rank, one in enumerate(everyone))
            for name in names
            if len({one.get(name) for one in everyone}) > 1
        ]
        if odd:
            raise BatchError("\n  ".join(["what forward reads differs between ranks:", *odd]) + "\n  Set it alike on every rank.")
