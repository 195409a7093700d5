"""What queries see of keys, block by block, and which blocks a kernel without masks computes.

                      keys 0 to 3    4 to 7    8 to 11
    queries 4 to 7    all            own       none            "own": the query at a position sees the keys up to it
    with a mask       some           own       none            of each sample: padding hides key 2

Blocks of which all is seen are joined where their keys are held in a row. What is "some", or too small to be worth a call, is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar.ops.pairings import Pairing, Sight, Stretch, short

LEAST = 64
"""The fewest queries, and the fewest keys, for which a kernel is called."""
MASKED = 1024
"""The most queries of a block, and keys, where a mask is looked at: what it hides there is left to tiles."""

Shows = Literal["none", "all", "own", "some"]
SeenTable = tuple[tuple[Shows, ...], ...]
"""Of each stretch of queries, what it sees of each stretch of keys."""


class SeenBlock(NamedTuple):
    """Queries held in a row that see every one of some keys held in a row, or those up to their own position."""

    rows: tuple[int, int]
    """Where the first is held, and how many there are."""
    columns: tuple[int, int]
    causal: bool

    def queries(self, x: Tensor) -> Tensor:
        """Those of `[b, h, s, ...]`."""
        return x.narrow(2, *self.rows)

    def keys(self, x: Tensor) -> Tensor:
        """Those of `[b, k, t, ...]`."""
        return x.narrow(2, *self.columns)


class Parted(NamedTuple):
    """What a kernel computes in whole calls, and the rest."""

    whole: Sequence[SeenBlock]
    rest: Sequence[Pairing]


def by_position(pairing: Pairing, sight: Sight) -> SeenTable:
    """What is seen by positions alone.

    >>> by_position(Pairing((Stretch(0, 4, 4),), tuple(Stretch(at, at, 4) for at in (0, 4, 8))), Sight(causal=True))
    (('all', 'own', 'none'),)
    """
    return tuple(tuple(_kind(rows, columns, sight) for columns in pairing.keys) for rows in pairing.queries)


def _kind(rows: Stretch, columns: Stretch, sight: Sight) -> Shows:
    if sight.none(rows, columns):
        return "none"
    if sight.all(rows, columns):
        return "all"
    same = (rows.at, rows.size) == (columns.at, columns.size)
    return "own" if same and (sight.window is None or sight.window >= rows.size) else "some"


class Mask(NamedTuple):
    """What an operand of `[b, h, s, all positions]`, any dim of which may be 1, does to scores; rows are held as queries are."""

    shown: Tensor
    """True where it does not hide."""
    left: Tensor
    """True where it does nothing: what it adds is 0."""


def by_masks(pairing: Pairing, table: SeenTable, masks: Sequence[Mask]) -> Iterator[tuple[slice, SeenTable]]:
    """The same of samples that see alike, one after the other."""
    found = [_Shown(pairing, mask) for mask in masks]
    samples = max(mask.shown.shape[0] for mask in masks)
    kept = torch.cat([one.numbers.expand(samples, -1) for one in found], 1).tolist()  # (an accelerator is waited for once)
    tables = []
    for row in kept:
        new, at = table, 0
        for one in found:
            new = one.read(new, row[at : at + one.numbers.shape[1]])
            at += one.numbers.shape[1]
        tables.append(new)
    start = 0
    for seen, several in groupby(tables):
        count = len(list(several))
        yield slice(start, start + count if len(tables) > 1 else None), seen
        start += count


class _Shown:
    """What one mask shows of blocks, as numbers of each sample.

    Of each block how many keys it leaves to all queries; of each how many it shows to any; then of each of which queries and keys have the
    same positions, whether it is causal there, and whether it leaves the past.
    """

    def __init__(self, pairing: Pairing, mask: Mask) -> None:
        self.pairing = pairing
        self.own = [(i, j) for i, r in enumerate(pairing.queries) for j, c in enumerate(pairing.keys) if r[1:] == c[1:]]
        every = [self._by_columns(_rows(mask.left, rows).flatten(1, 2).all(1)) for rows in pairing.queries]
        some = [self._by_columns(_rows(mask.shown, rows).flatten(1, 2).any(1)) for rows in pairing.queries]
        self.numbers = torch.cat([*every, *some, *(_on_diagonal(mask, pairing.queries[i]) for i, _ in self.own)], 1)

    def _by_columns(self, shown: Tensor) -> Tensor:
        """`[b, all positions]` as `[b, blocks]`: how many are True."""
        if shown.shape[1] == 1:
            return torch.cat([shown.int() * columns.size for columns in self.pairing.keys], 1)
        sums = pad(shown.cumsum(1, dtype=torch.int32), (1, 0))
        ends = torch.tensor([[c.at, c.at + c.size] for c in self.pairing.keys], device=shown.device)
        return sums[:, ends[:, 1]] - sums[:, ends[:, 0]]

    def read(self, table: SeenTable, numbers: Sequence[int]) -> SeenTable:
        """What a sample sees, of what it would by positions and other masks."""
        rows, columns = len(self.pairing.queries), len(self.pairing.keys)
        diagonal = {block: numbers[2 * rows * columns + 2 * k :][:2] for k, block in enumerate(self.own)}

        def kind(i: int, j: int) -> Shows:
            before, size = table[i][j], self.pairing.keys[j].size
            every, some = numbers[i * columns + j], numbers[(rows + i) * columns + j]
            if before == "none" or some == 0:
                return "none"
            if every == size:
                return before
            causal, shows_past = diagonal.get((i, j), (0, 0))
            return "own" if (before == "all" and causal) or (before == "own" and shows_past) else "some"

        return tuple(tuple(kind(i, j) for j in range(columns)) for i in range(rows))


def _rows(mask: Tensor, rows: Stretch) -> Tensor:
    return mask if mask.shape[2] == 1 else mask.narrow(2, rows.held, rows.size)


def _on_diagonal(mask: Mask, rows: Stretch) -> Tensor:
    """`[b, 2]`: whether it leaves the past and hides the rest, and whether it leaves the past."""
    shown, left = (x if x.shape[3] == 1 else x.narrow(3, rows.at, rows.size) for x in (_rows(mask.shown, rows), _rows(mask.left, rows)))
    past = torch.ones(rows.size, rows.size, dtype=torch.bool, device=shown.device).tril()
    leaves, hides = (x.flatten(1).all(1) for x in (left | ~past, ~shown | past))
    return torch.stack([leaves & hides, leaves], 1).int()


def is_worth(pairing: Pairing) -> bool:
    """Whether any of the queries may be worth a call."""
    return any(one.size >= LEAST for one in pairing.queries)


def in_blocks(pairing: Pairing) -> Pairing:
    """The same in stretches that a mask is looked at for."""
    return Pairing(short(pairing.queries, MASKED), short(pairing.keys, MASKED))


@lru_cache(maxsize=512)
def apart(pairing: Pairing, table: SeenTable) -> Parted:
    """What a kernel computes in whole calls, and the rest.

    >>> keys = Stretch(0, 0, 64), Stretch(64, 256, 64), Stretch(128, 512, 64), Stretch(192, 1024, 64)
    >>> pairing = Pairing((Stretch(0, 512, 64), Stretch(64, 544, 16)), keys)
    >>> found = apart(pairing, by_position(pairing, Sight(causal=True)))
    >>> list(found.whole)
    [SeenBlock(rows=(0, 64), columns=(0, 128), causal=False), SeenBlock(rows=(0, 64), columns=(128, 64), causal=True)]
    >>> [one.queries for one in found.rest]
    [(Stretch(held=64, at=544, size=16),)]
    """
    whole, rest, others = list[SeenBlock](), list[Pairing](), list[Stretch]()
    for rows, kinds in zip(pairing.queries, table, strict=True):
        blocks, left = _of_row(rows, pairing.keys, kinds)
        whole += blocks
        if blocks and left:
            rest.append(Pairing((rows,), tuple(left)))
        elif left:
            others.append(rows)
    return Parted(tuple(whole), (*rest, *([Pairing(tuple(others), pairing.keys)] if others else ())))


def _of_row(rows: Stretch, keys: Sequence[Stretch], kinds: Sequence[Shows]) -> tuple[list[SeenBlock], list[Stretch]]:
    """The blocks of a stretch of queries, and the keys that are left."""
    left = [one for one, kind in zip(keys, kinds, strict=True) if kind == "some"]
    runs, own = list[list[Stretch]](), list[list[Stretch]]()
    for one, kind in zip(keys, kinds, strict=True):
        if kind == "own":
            own.append([one])
        elif kind == "all" and runs and runs[-1][-1].held + runs[-1][-1].size == one.held:
            runs[-1].append(one)
        elif kind == "all":
            runs.append([one])
    blocks = list[SeenBlock]()
    for run in (*runs, *own):
        count = sum(one.size for one in run)
        if min(rows.size, count) < LEAST:
            left += run
        else:
            blocks.append(SeenBlock((rows.held, rows.size), (run[0].held, count), run in own))
    return blocks, left
