"""What a program asks of the machine, as it runs: every kernel with its shapes, every collective, every byte that comes and goes.

    with FakeTensorMode(), MachineTape() as tape:      # or on real tensors: then the bytes are those that the process allocates
        loss = run(...)
        tape.phase = "backward"
        loss.backward()

A dispatch mode sees operators after autograd: forward, what a checkpoint computes again, and backward, FSDP2's copies among them. Memory is
that of storages: from the operator that made one until nobody holds it. What a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from meshpar._torch import FakeTensor, TorchDispatchMode, functional, local_of, pytree, saving_is_watched, storages_resized
from meshpar.dry_run.kernels import Kernel, kernel_of

TapeMark = tuple[int, int]
"""A moment of a tape: how many calls, and how many changes of memory, there were."""


@dataclass(frozen=True, slots=True)
class Sounding:
    """One operator of a tape."""

    kernel: Kernel
    phase: str
    """"forward", "recompute", "backward" or "weight"; whatever the tape was told, but for what is computed again in backward."""
    reads: tuple[int, ...]
    """Numbers of the storages it was given."""
    writes: tuple[int, ...]


@dataclass
class Storages:
    """Bytes that are alive, and how they changed."""

    changes: list[tuple[int, int]] = field(default_factory=list)
    """(number of a storage, by how many bytes it grew), in the order in which it happened."""
    _sizes: dict[int, int] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _watched: list[Any] = field(default_factory=list)

    def see(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; a new one is alive from now on."""
        address = storage._cdata
        if address in self._numbers:
            return self._numbers[address]
        number = len(self._watched)
        self._numbers[address] = number
        self._watched.append(weakref.finalize(storage, self._gone, address, number))
        self._resize(number, storage.nbytes())
        return number

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that was seen has another size now."""
        if (number := self._numbers.get(storage._cdata)) is not None:
            self._resize(number, storage.nbytes())

    def forget_all(self) -> None:
        """Watch nothing any more."""
        for watched in self._watched:
            watched.detach()

    def _resize(self, number: int, size: int) -> None:
        if grown := size - self._sizes.get(number, 0):
            self.changes.append((number, grown))
        self._sizes[number] = size

    def _gone(self, address: int, number: int) -> None:
        del self._numbers[address]
        self._resize(number, 0)


class MachineTape(TorchDispatchMode):
    """Records while it is entered. `phase` says what runs now; `mark()` is the present moment."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sounding] = []
        self.storages = Storages()
        self.phase = "forward"
        self._open = ExitStack()

    def __enter__(self) -> Any:
        self._open.enter_context(storages_resized(self.storages.resized))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()
        self.storages.forget_all()

    def mark(self) -> TapeMark:
        """How many calls and how many changes of memory there were so far."""
        return len(self.calls), len(self.storages.changes)

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage, which is alive from now on if it was not seen before."""
        return self.storages.see(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # the fake of waiting is a copy; really it is the tensor itself
        given = [self.number(t) for t in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        made = [self.number(t) for t in _tensors(result)]
        kernel = kernel_of(func, *_local((args, kwargs, result)))
        if kernel is not None:
            phase = "recompute" if self.phase == "backward" and saving_is_watched() else self.phase
            self.calls.append(Sounding(kernel, phase, tuple(given), tuple(made)))
        return result


def levels(changes: Sequence[tuple[int, int]], without: frozenset[int] | set[int] = frozenset()) -> Iterator[int]:
    """Bytes alive after each change, from 0 before the first; `without` some storages."""
    return accumulate(0 if number in without else grown for number, grown in changes)


def alive(changes: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Storage -> its bytes after all changes, of those that have any."""
    found: dict[int, int] = {}
    for number, grown in changes:
        found[number] = found.get(number, 0) + grown
    return {number: size for number, size in found.items() if size}


def _local(tree: Any) -> Any:
    """With what a rank has of every DTensor in its place: that is what it computes with."""
    return pytree.tree_map_only(DTensor, local_of, tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors; of a DTensor the one that has memory."""
    return [local_of(leaf) if isinstance(leaf, DTensor) else leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
