"""Tensors of a model that lie in the same memory: what changes one changes the other, on one device.

    self.decoder.weight.data = self.encoder.weight.data        two parameters, and every step of an optimizer changes both, twice
    self.register_buffer("target", self.weight.detach())       follows the parameter

A parallel model has its own memory for every parameter, and copies do not keep this either, so it is said before anything is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import takewhile

import torch
from torch import nn

from meshpar.capture.copies import held
from meshpar.errors import CaptureError


def shared_memory(model: nn.Module) -> list[tuple[str, str]]:
    """Parameters, and for each the other parameter, buffer or plain tensor of the model that lies in its memory, in part or whole."""
    parameters = {id(parameter) for parameter in model.parameters()}
    return [(a, b) for (a, x), (b, y) in _pairs(model) if id(x) in parameters or id(y) in parameters]


def buffers_in_shared_memory(model: nn.Module) -> list[tuple[str, str]]:
    """Buffers, and for each another tensor that lies in its memory: a forward that writes one writes both."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return [(a, b) for (a, x), (b, y) in _pairs(model) if id(x) in buffers or id(y) in buffers]


def refuse_written(pairs: Collection[tuple[str, str]], written: Collection[str]) -> None:
    """Raise CaptureError for a buffer that forward writes and whose memory another tensor shares."""
    found = next((pair for pair in pairs if not set(pair).isdisjoint(written)), None)
    if found is not None:
        raise CaptureError(
            f"the forward writes to {found[0] if found[0] in written else found[1]}, and {' and '.join(found)} lie in the same memory, so "
            "that both change: a program holds them apart. Make one of them, or clone() it where it is made."
        )


Named = tuple[str, torch.Tensor]


def _pairs(model: nn.Module) -> Iterator[tuple[Named, Named]]:
    """Every two tensors that share memory, those that are registered first."""
    registered: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        registered.setdefault(id(tensor), name)
    places = {tensor: place for place, tensor in enumerate(registered)}
    found: dict[int, dict[int, Named]] = {}
    for path, value in held(model):
        if (
            isinstance(value, torch.Tensor)
            and type(value) in (torch.Tensor, nn.Parameter)
            and value.layout == torch.strided
            and value.numel()
        ):
            where = found.setdefault(value.untyped_storage()._cdata, {})
            where.setdefault(id(value), (registered.get(id(value), path), value))
    for tensors in found.values():
        by_start = sorted(tensors.values(), key=lambda one: _extent(one[1]))
        for at, one in enumerate(by_start):
            end = _extent(one[1])[1]
            for other in takewhile(lambda other: _extent(other[1])[0] < end, by_start[at + 1 :]):  # noqa: B023  (used at once)
                if _overlap(one[1], other[1]):
                    first, second = sorted((one, other), key=lambda named: places.get(id(named[1]), len(places)))
                    yield first, second


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of one is one of the other; both are of one storage, and b begins inside of the stretch that a spans."""
    (first, last), (start, stop) = _extent(a), _extent(b)
    if all(stop - start == t.numel() * t.element_size() for t, start, stop in ((a, first, last), (b, start, stop))):
        return True
    low, high = min(first, start), max(last, stop)
    marked = torch.zeros(high - low, dtype=torch.bool)
    _bytes(marked, a, first - low).fill_(True)
    return bool(_bytes(marked, b, start - low).any())


def _bytes(memory: torch.Tensor, tensor: torch.Tensor, begin: int) -> torch.Tensor:
    """Those of a tensor, in a memory of one element per byte."""
    size = tensor.element_size()
    return memory.as_strided((*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), begin)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of the storage that it has, and the one after its last."""
    first = tensor.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first * tensor.element_size()), int((last + 1) * tensor.element_size())
