"""Ranks that must run the same program in a step say so to each other: one number per rank, on its way while the step runs.

begin(Step("train_8f3a", ...), new=False)     an all-reduce of a few numbers starts
...the step...
check()                                       it has arrived long ago: all alike, or an error on every rank, no hang, no wrong sum
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar.capture.state.places import Place, described
from meshpar.errors import BatchError, ConfigError, raise_all
from meshpar.simulate import is_simulated


@dataclass(frozen=True, slots=True)
class Step:
    """What ranks must have alike in a step."""

    batch: str
    """Its structure, shapes and modes."""
    trained: str
    """Which parameters require gradients."""
    program: str
    numbers: Mapping[Place, Any]
    """Where the program reads a number, in its order -> the number."""


class Hooks(Protocol):
    """The hooks that a user registered on the parameters of a parallel model."""

    changed: bool
    """Whether they are others than those that ranks have agreed on."""

    def counts(self) -> Mapping[str, int]:
        """How many there are on each parameter of this rank."""

    def agreed(self) -> None:
        """Take these for those of all ranks."""


_DIFFERS = (
    "their batches have other structures or shapes (ParallelConfig(pad_to=1) fills them up), or their models other modes",
    "other parameters require gradients",
    "attributes that forward reads have other values, and lead to other programs",
)
"""By the parts of a step that are no numbers."""
_SLOTS = 16
"""How many numbers are told apart; where there are more, several share a slot."""


class Alike:
    """One exchange per step over all ranks of a mesh; nothing at all where one process stands for them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._device = mesh.device_type
        self._real = mesh.size() > 1 and not is_simulated() and dist.get_backend() != "fake"
        self._pending: tuple[Step, torch.Tensor, Any] | None = None
        self._hooks: Hooks | None = None

    def begin(self, step: Step, *, new: bool, hooks: Hooks | None = None) -> None:
        """Start to compare a step with those of the other ranks. Collective.

        `new`: this rank has not seen such a batch yet. `hooks`: those on the parameters, which are compared when any rank's have changed.
        """
        if self._real:
            self._hooks = hooks
            prints = _prints(step)
            changed = hooks is not None and hooks.changed
            sent = torch.tensor([not new, new, changed, *prints, *(-n for n in prints)], device=self._device)
            self._pending = step, sent, dist.all_reduce(sent, op=dist.ReduceOp.MAX, async_op=True)

    def check(self, closer: Callable[[], None] | None = None) -> None:
        """Wait for the comparison. Raises BatchError where ranks differ, with what this rank knows of it.

        `closer`: a comparison of batches, which tells more; it is made where the batch is new on every rank.
        """
        if self._pending is None:
            if closer is not None:
                closer()
            return
        (step, sent, work), self._pending = self._pending, None
        work.wait()
        known, unknown, changed, *found = sent.tolist()
        if closer is not None and not known:
            closer()
        half = len(found) // 2
        odd = [i for i in range(half) if found[i] != -found[half + i]]
        if odd:
            raise BatchError(_told(step, odd))
        if changed and self._hooks is not None and not (known and unknown):  # (else not all ranks are here now: in a later step)
            self._compare_hooks(self._hooks)

    def _compare_hooks(self, hooks: Hooks) -> None:
        """Raise ConfigError where a rank that has a parameter has not the hooks on it that another has: it would wait for ever."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(hooks.counts()))
        most = {name: max(one.get(name, 0) for one in everyone) for one in everyone for name in one}
        lacking = [
            f"rank {rank} has {one[name]} of the {most[name]} on {name}."
            for rank, one in enumerate(everyone)
            for name in one
            if one[name] < most[name]
        ]
        raise_all(
            ConfigError,
            "hooks on the parameters of a parallel model are called on all ranks that have the parameter, in turn: register them on all.",
            lacking[:8],
        )
        hooks.agreed()

    def all(self, one: bool) -> bool:
        """Whether it is so on every rank. Collective."""
        if not self._real:
            return one
        sent = torch.tensor(int(one), device=self._device)
        dist.all_reduce(sent, op=dist.ReduceOp.MIN)
        return bool(sent)

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


def _prints(step: Step) -> list[int]:
    """A number for every part of a step, as many on every rank."""
    slots = ["" for _ in range(_SLOTS)]
    for i, value in enumerate(step.numbers.values()):
        slots[i % _SLOTS] += f" {described(value)}"
    return [_print(text) for text in (step.batch, step.trained, step.program, *slots)]


def _print(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") if text else 0


def _told(step: Step, odd: Sequence[int]) -> str:
    parts = [_DIFFERS[i] for i in odd if i < len(_DIFFERS)]
    if parts:
        return f"ranks are about to run different programs: {', or '.join(parts)}. Set them alike on every rank."
    slots = {i - len(_DIFFERS) for i in odd}
    here = [f"{place} ({value!r} on this rank)" for i, (place, value) in enumerate(step.numbers.items()) if i % _SLOTS in slots]
    return f"numbers that forward reads differ between ranks: {', '.join(here)}. Set them alike on every rank."
