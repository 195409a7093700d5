"""Batches as loaders give them, made fit for all ranks: compared in every step, and padded to one length.

    data rank 0    input_ids [4, 17]  labels [4, 17]            input_ids [4, 23]  labels [4, 23]
    data rank 1    input_ids [4, 23]  labels [4, 23]     -->    input_ids [4, 23]  labels [4, 23]

Padding is on the right, with values that count nothing: it is what one process does that pads the whole global batch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from meshpar.consensus import content_digest, gather_rows, is_real, same_batch_ranks
from meshpar.errors import BatchError, raise_all
from meshpar.mesh import listed

PADDING: Mapping[str, int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "shift_labels": -100,
    "token_type_ids": 0,
    "position_ids": 0,
    "special_tokens_mask": 1,
}
"""Name in a batch -> what fills it up on the right. Ids are only filled where an attention mask says that they count nothing."""
_ROW = 128
"""Numbers that a rank tells of its shapes: more than batches have."""
MOST_LENGTHS = _ROW - 1

BatchShapes = tuple[tuple[int, ...], ...]


def agreed(batch: Any, mesh: DeviceMesh, padding: Mapping[str, int] = PADDING) -> Any:
    """This rank's batch, as long as the longest of all data ranks. Collective, in every step: one small exchange per axis of the mesh.

    Raises BatchError on every rank where ranks that share a batch were given different ones, where data ranks have other names or numbers
    of samples, and for what cannot be padded.
    """
    tensors = dict(_named(batch))
    if not is_real(mesh):
        return batch
    table = gather_rows(content_digest(batch) + _row(tensors), mesh)
    complaints = [
        f"{listed(odd)} of {listed(ranks)}."
        for ranks in same_batch_ranks(mesh)
        if (odd := [rank for rank in ranks if table[rank][:32] != table[ranks[0]][:32]])
    ]
    raise_all(
        BatchError,
        "ranks that share a batch must be given the same one in every step, but these differ from the first. Does a sampler, the dataset "
        "or the collator draw random numbers that were seeded by global rank? Seed them alike, or by mp.data_rank(mesh):",
        complaints,
    )
    shapes = {rank: _shapes(row[32:]) for rank, row in table.items()}
    if len(set(shapes.values())) == 1:
        return batch
    return _padded(batch, tensors, shapes, padding)


def agreeing(loader: Any, agree: Callable[[Any], Any]) -> Any:
    """A loader whose batches go through `agree` before they are used."""
    kind: Any = type(loader)
    vars(object)["__class__"].__set__(loader, _class_of(kind))  # (accelerate's loaders show another class than they have)
    loader.meshpar_agree = agree
    return loader


@cache
def _class_of(kind: Hashable) -> type:
    """The class of a loader whose batches are compared; a loader keeps its kind, which tools ask for."""
    assert isinstance(kind, type)
    if hasattr(kind, "meshpar_agree"):
        return kind

    def __iter__(self: Any) -> Iterator[Any]:
        return (self.meshpar_agree(batch) for batch in kind.__iter__(self))  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"__iter__": __iter__, "meshpar_agree": None})


def _named(batch: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch by name or position."""
    several = isinstance(batch, (list, tuple))
    pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch if several else [batch])
    return ((str(name), value) for name, value in pairs if isinstance(value, torch.Tensor))


def _row(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Names' digest and shapes, in a fixed number of bytes."""
    numbers = [n for tensor in tensors.values() for n in (tensor.ndim, *tensor.shape)][:MOST_LENGTHS]
    names = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    digest = sum(byte << (8 * i) for i, byte in enumerate(content_digest([torch.tensor(list(names.encode() or b" "))])[:7]))
    return struct.pack(f"{_ROW}q", digest, *numbers, *([-1] * (MOST_LENGTHS - len(numbers))))


def _shapes(row: bytes) -> BatchShapes:
    """The digest of the names, and the shapes."""
    digest, *numbers = struct.unpack(f"{_ROW}q", row)
    found: list[tuple[int, ...]] = [(digest,)]
    at = 0
    while at < len(numbers) and numbers[at] >= 0:
        found.append(tuple(numbers[at + 1 : at + 1 + numbers[at]]))
        at += 1 + numbers[at]
    return tuple(found)


def _padded(batch: Any, tensors: Mapping[str, torch.Tensor], shapes: Mapping[int, BatchShapes], padding: Mapping[str, int]) -> Any:
    """Every tensor as long as the longest, or BatchError; the same on all ranks, as it depends on what all ranks have."""
    firsts = {(row[0], tuple((len(s), *s[:1]) for s in row[1:])) for row in shapes.values()}
    if len(firsts) > 1:
        raise BatchError(
            "data ranks were given other names, dtypes, dimensions or numbers of samples. A last batch that is smaller is left out with "
            "drop_last=True, or filled up by the loader (accelerate's even_batches)."
        )
    longest = [tuple(map(max, zip(*per))) for per in zip(*(row[1:] for row in shapes.values()))]
    changed = [i for i, per in enumerate(zip(*(row[1:] for row in shapes.values()))) if len(set(per)) > 1]
    names = list(tensors)
    unknown = [names[i] for i in changed if names[i] not in padding]
    if unknown or ("input_ids" in {names[i] for i in changed} and "attention_mask" not in tensors):
        what = ", ".join(unknown) if unknown else "input_ids without an attention_mask"
        raise BatchError(
            f"data ranks have batches of different lengths, and {what} cannot be filled up so that it counts nothing: pad to one length "
            f"in the collator (pad_to_multiple_of=, padding='max_length')" + (", or say padding={name: value}." if unknown else ".")
        )
    made = {names[i]: _filled(tensors[names[i]], longest[i], padding[names[i]]) for i in changed}
    kept = dict(batch.items())
    return type(batch)({**kept, **made}) if isinstance(batch, dict) or not isinstance(batch, Mapping) else _updated(batch, made)


def _updated(batch: Any, made: Mapping[str, torch.Tensor]) -> Any:
    for name, value in made.items():
        batch[name] = value
    return batch


def _filled(tensor: torch.Tensor, shape: tuple[int, ...], value: int) -> torch.Tensor:
    ends = [end for have, want in zip(reversed(tensor.shape), reversed(shape)) for end in (0, want - have)]
    return F.pad(tensor, ends, value=value)
