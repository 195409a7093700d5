"""Stored tensors that are one tensor now: they must hold the same bits, in the parts that any rank reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from meshpar.checkpoint.format.boxes import Box, boxes_of, whole
from meshpar.checkpoint.format.casts import FLOATS, values
from meshpar.checkpoint.format.faults import CorruptError
from meshpar.checkpoint.format.files import ITEMSIZE
from meshpar.checkpoint.move.jobs import slabs
from meshpar.checkpoint.move.reading import Reader
from meshpar.checkpoint.online.placed import Held
from meshpar.errors import raise_all

SLAB = 16 << 20
Twins = Sequence[tuple[str, Sequence[str], Held]]
"""The stored name that is loaded, the others that should be the same, and what this rank holds of it."""


def check_twins(reader: Reader, twins: Twins) -> None:
    """Raise CorruptError for names that differ. Reads only what this rank holds, two slabs at a time."""
    complaints = []
    for name, others, part in twins:
        for other in others:
            where = _difference(reader, name, other, boxes_of(part.runs))
            complaints += [f"{name} and {other}: {where}."] if where else []
    raise_all(
        CorruptError,
        f"{reader.checkpoint.root} holds different values under names that are one tensor in this model. Load it into a model without the "
        "tie.",
        complaints,
    )


def _difference(reader: Reader, name: str, other: str, boxes: Sequence[Box]) -> str:
    """Where two stored tensors differ within the boxes; dtypes may differ if the numbers are the same."""
    a, b = (reader.checkpoint.manifest.tensors[n] for n in (name, other))
    if a.shape != b.shape:
        return f"shapes {list(a.shape)} and {list(b.shape)}"
    if a.dtype != b.dtype and not (a.dtype in FLOATS and b.dtype in FLOATS):
        return f"{a.dtype} and {b.dtype}"
    for box in boxes or ([whole(())] if not a.shape else []):
        for piece in _pieces(box, max(ITEMSIZE[a.dtype], ITEMSIZE[b.dtype])):
            x, y = reader.read(name, piece), reader.read(other, piece)
            if a.dtype != b.dtype:
                x, y = (values(bits, t.dtype).view(np.uint64) for bits, t in ((x, a), (y, b)))
            if not np.array_equal(x.reshape(-1), y.reshape(-1)):
                return f"the values in {piece} differ"
    return ""


def _pieces(box: Box, itemsize: int) -> Iterator[Box]:
    for part in slabs(box.size, itemsize, SLAB) if all(box.size) else ():
        yield Box(tuple(map(sum, zip(part.offset, box.offset, strict=True))), part.size)
