"""Attention in tiles: scores of a few queries and keys at a time, in float32 or wider, and no longer than they are used.

                      keys 0 to 3    4 to 7    8 to 11
    queries 4 to 7    all            some      none          a tile of which nothing is seen is passed over, only "some" needs a mask

Queries and keys may be of many short stretches of positions (`Meeting`). A tile has queries of one, and keys of as many as make it as large
as any other, so that there are no more tiles for it; whether any are seen is asked of each pair of stretches.

Of each query are kept what it got so far, the largest score and the sum of exp(score), from which backward makes the weights of a tile
again. (The formulas are those of FlashAttention, arXiv 2205.14135.) Everything here is local to one rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SIDE = 256
"""The most queries and the most keys of a tile."""
SCORES = 2**20
"""The most scores of a tile: so many heads and samples, but one at least."""

ScoreStep = tuple[Any, ...]
"""What is done to scores z; i is the place of an operand `[b, h, s, all positions]`, any dim of which may be 1.

    ("times", x)      z x                                       ("seen", i)          z where it is true, else -inf
    ("tanh",)         tanh z                                    ("keep", i, x)       z where it is true, else x
    ("plus", i)       z + operand i                             ("fill", i, x)       x where it is true, else z
    ("by", i)         z operand i                               x: a number, or the place of an operand of one element
    ("sink", i)       one score more, operand i `[b, h, s, 1]`, whose weight is nobody's: the last step, if there is one
"""


@dataclass(frozen=True)
class Scoring:
    """What a query sees of keys, and how strongly: products times `scale`, then the steps, then what is not seen is left out."""

    causal: bool = False
    """Whether the query at position i sees the keys up to i alone."""
    window: int | None = None
    """Of those, how many of the last."""
    scale: float = 1.0
    steps: tuple[ScoreStep, ...] = ()

    def sees_none(self, at: int, rows: int, first: int, columns: int) -> bool:
        """Whether none of the queries from position `at` sees any of the keys from `first`."""
        late = (self.causal or self.window is not None) and first > at + rows - 1
        return late or (self.window is not None and first + columns - 1 <= at - self.window)

    def hidden(self, rows: Stretch, columns: Sequence[Stretch], places: slice | Tensor, device: torch.device) -> Tensor | None:
        """`[rows, columns]`: True where the query does not see the key; None where all see all. `places`: the keys' positions."""
        if all(self._sees_all(rows, one) for one in columns):
            return None
        keys = torch.arange(places.start, places.stop, device=device) if isinstance(places, slice) else places
        behind = torch.arange(rows.at, rows.at + rows.size, device=device)[:, None] - keys
        hidden = behind < 0
        return hidden if self.window is None else hidden | (behind >= self.window)

    def _sees_all(self, rows: Stretch, columns: Stretch) -> bool:
        past = columns.at + columns.size - 1 <= rows.at or not (self.causal or self.window is not None)
        return past and (self.window is None or columns.at > rows.at + rows.size - 1 - self.window)

    def sink_of(self, operands: Sequence[Tensor]) -> Tensor | None:
        """The score of each query whose weight is nobody's."""
        return operands[self.steps[-1][1]] if self.steps and self.steps[-1][0] == "sink" else None

    @property
    def written(self) -> str:
        """As the operators below take it."""
        return json.dumps([self.causal, self.window, self.scale, self.steps])

    @staticmethod
    def read(written: str) -> Scoring:
        """The other way."""
        causal, window, scale, steps = json.loads(written)
        return Scoring(causal, window, scale, tuple(tuple(step) for step in steps))


def hiding(steps: Sequence[ScoreStep]) -> Iterator[tuple[str, int]]:
    """The steps that may hide for good, and their operands: "seen" what is false, "plus" what is minus infinity.

    No later step may make anything else of minus infinity.
    """
    for at, (kind, *of) in enumerate(steps):
        if kind in ("seen", "plus") and all(_stays_hidden(step) for step in steps[at + 1 :]):
            yield kind, of[0]


class Stretch(NamedTuple):
    """Positions in a row, held in a row."""

    held: int
    """Where the first is held."""
    at: int
    """Its position."""
    size: int


@dataclass(frozen=True, slots=True)
class Meeting:
    """Queries and keys that meet: a part of the table of all pairs. What is held in several stretches may be of any positions."""

    queries: tuple[Stretch, ...]
    keys: tuple[Stretch, ...]

    @property
    def numbers(self) -> list[int]:
        """As the operators below take it, one meeting after the other."""
        return [len(self.queries), len(self.keys), *(n for stretch in (*self.queries, *self.keys) for n in stretch)]

    @staticmethod
    def read(numbers: Sequence[int]) -> list[Meeting]:
        """The other way."""
        found, at = list[Meeting](), 0
        while at < len(numbers):
            queries, keys = numbers[at : at + 2]
            flat = numbers[at + 2 : at + 2 + 3 * (queries + keys)]
            stretches = [Stretch(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
            found.append(Meeting(tuple(stretches[:queries]), tuple(stretches[queries:])))
            at += 2 + len(flat)
        return found


def held(ranges: Sequence[tuple[int, int]]) -> tuple[Stretch, ...]:
    """Ranges of positions that are held one after the other.

    >>> held([(0, 2), (6, 8)])
    (Stretch(held=0, at=0, size=2), Stretch(held=2, at=6, size=2))
    """
    found, start = list[Stretch](), 0
    for low, high in ranges:
        found.append(Stretch(start, low, high - low))
        start += high - low
    return tuple(found)


def short(stretches: Sequence[Stretch], side: int | None = None) -> tuple[Stretch, ...]:
    """The same in stretches of at most `side`, that of a tile.

    >>> short([Stretch(0, 8, 3)], 2)
    (Stretch(held=0, at=8, size=2), Stretch(held=2, at=10, size=1))
    """
    side = SIDE if side is None else side
    return tuple(Stretch(x + i, at + i, min(side, size - i)) for x, at, size in stretches for i in range(0, size, side))


def area(meetings: Sequence[int], scoring: Scoring) -> int:
    """Pairs of queries and keys in the tiles that are not passed over, of meetings that are written one after the other."""
    every = (_blocks(one, scoring.causal, scoring.window, SIDE) for one in Meeting.read(meetings))
    return sum(row.size * one.columns[j].size for one in every for row, seen in zip(one.rows, one.seen, strict=True) for j in seen)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    meetings: Sequence[Meeting],
    scoring: Scoring,
    out: Tensor,
    norm: Tensor,
) -> None:
    """Add what queries get from these keys, in place, to what they got from others.

    `query`: `[b, h, s, e]`, `key`: `[b, k, t, e]`, `value`: `[b, k, t, f]`, h a multiple of k. `operands`: of the steps. `out`:
    `[b, h, s, f]`, zeros to begin with, and `norm`: `[b, h, s, 2]`, the largest score so far, and the logarithm of the sum of
    exp(score - largest): -inf to begin with. (Of scores near -1e38, as masks make them, the sum of the two would forget the second.)
    """
    for tile in _tiles(query, key, operands, meetings, scoring):
        scores = _shown(tile, _stepped(tile, query, key, operands, scoring)[-1], scoring)
        own, most = norm[tile.queries], scores.amax(-1)
        weights = scores.sub_(_finite(most)[..., None]).exp_()
        top = torch.maximum(own[..., 0], most)
        before, more = (x - _finite(top) for x in (own[..., 0], most))
        total = torch.logaddexp(before + own[..., 1], more + weights.sum(-1).log_())
        found = tile.by_query(tile.by_key(weights) @ wide(value[tile.keys]))
        kept, new = (before + own[..., 1] - _finite(total)).exp_(), (more - _finite(total)).exp_()
        out[tile.queries].mul_(kept[..., None]).addcmul_(found, new[..., None])
        own.copy_(torch.stack([top, total], -1))


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    meetings: Sequence[Meeting],
    scoring: Scoring,
    grad: Tensor,
    norm: Tensor,
    delta: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_operands: Sequence[Tensor],
) -> None:
    """Add the gradients, in place. `norm`: of all keys; `delta` `[b, h, s]`: the sums of result times `grad`. `of_operands`: of one
    dim for an operand that needs none."""
    for tile in _tiles(query, key, operands, meetings, scoring):
        values = _stepped(tile, query, key, operands, scoring)
        top, total = (_finite(x)[..., None] for x in norm[tile.queries].unbind(-1))
        last = values[-1].clone() if scoring.steps else values[-1]
        weights = _shown(tile, last, scoring).sub_(top).sub_(total).exp_()
        g, k, v = tile.by_key(wide(grad[tile.queries])), wide(key[tile.keys]), wide(value[tile.keys])
        of_value[tile.keys] += tile.by_key(weights).transpose(-1, -2) @ g
        of_scores = tile.by_query(g @ v.transpose(-1, -2)).sub_(delta[tile.queries][..., None]).mul_(weights)
        for at in range(len(scoring.steps) - 1, -1, -1):
            of_scores = _back(tile, scoring.steps[at], of_scores, values[at : at + 2], operands, of_operands)
        of_products = tile.by_key(of_scores) * scoring.scale
        of_query[tile.queries] += tile.by_query(of_products @ k)
        of_key[tile.keys] += of_products.transpose(-1, -2) @ tile.by_key(wide(query[tile.queries]))


def nothing_yet(query: Tensor, width: int, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`out` and `norm` of queries before they meet a key; with a `sink` they have met one score, and got nothing for it."""
    like = wide(query.new_empty(()))
    norm = like.new_full((*query.shape[:-1], 2), -torch.inf)
    if sink is not None:
        norm[..., 0], norm[..., 1] = wide(sink)[..., 0], 0.0
    return like.new_zeros(*query.shape[:-1], width), norm


def add_of_sink(sink: Tensor, of_sink: Tensor, norm: Tensor, delta: Tensor) -> None:
    """Add to the gradient of a sink, if that is wanted: what its weight takes from the results."""
    if of_sink.shape == sink.shape:
        weight = (wide(sink)[..., 0] - norm[..., 0] - norm[..., 1]).exp()
        of_sink -= (weight * delta)[..., None].sum_to_size(of_sink.shape)


def sums_of(operands: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Zeros for the gradients of operands, of one dim where none is needed."""
    return [wide(x.new_zeros(x.shape)) if need else x.new_zeros(1) for x, need in zip(operands, needed, strict=True)]


def wide(x: Tensor) -> Tensor:
    """In float32, if it is not in float64."""
    return x if x.dtype == torch.float64 else x.float()


def told(query: Tensor, scale: float | None, steps: Sequence[ScoreStep], *, causal: bool, window: int | None) -> Scoring:
    """How attention scores, in the words of its arguments."""
    return Scoring(causal, window, query.shape[-1] ** -0.5 if scale is None else scale, tuple(tuple(step) for step in steps))


def of_four_dims(added: Sequence[Tensor]) -> list[Tensor]:
    """Operands of steps, with dims of 1 before their own."""
    return [x[(None,) * (4 - x.dim())] for x in added]


def _finite(x: Tensor) -> Tensor:
    """0 where a query has seen nothing."""
    return x.masked_fill(x == -torch.inf, 0.0)


@dataclass(frozen=True)
class _Tile:
    samples: slice
    key_heads: slice
    group: int
    """Query heads of one head of keys and values."""
    rows: Stretch
    columns: tuple[Stretch, ...]
    held: slice | Tensor
    """Where the keys are."""
    at: slice | Tensor
    """At what positions."""

    @property
    def heads(self) -> slice:
        return slice(self.key_heads.start * self.group, self.key_heads.stop * self.group)

    @property
    def queries(self) -> tuple[slice, ...]:
        """Where they are in `[b, h, s, ...]`."""
        return self.samples, self.heads, slice(self.rows.held, self.rows.held + self.rows.size)

    @property
    def keys(self) -> tuple[slice | Tensor, ...]:
        """Where they are in `[b, k, t, ...]`."""
        return self.samples, self.key_heads, self.held

    def by_key(self, x: Tensor) -> Tensor:
        """`[b, k g, s, ...]` as `[b, k, g s, ...]`."""
        return x.reshape(x.shape[0], -1, self.group * self.rows.size, x.shape[-1])

    def by_query(self, x: Tensor) -> Tensor:
        """And back."""
        return x.view(x.shape[0], -1, self.rows.size, x.shape[-1])

    def of(self, operand: Tensor) -> Tensor:
        """Its part of `[b, h, s, all positions]`, any of which may be 1."""
        return operand[self._part(operand)]

    def add_to(self, of_operand: Tensor, operand: Tensor, grad: Tensor) -> None:
        """Add to the gradient of an operand, if that is wanted: summed where one element meets several scores."""
        if of_operand.shape == operand.shape:
            part = self._part(of_operand)
            of_operand[part] += grad.sum_to_size([min(sizes) for sizes in zip(of_operand.shape, grad.shape, strict=True)])

    def _part(self, operand: Tensor) -> tuple[slice | Tensor, ...]:
        return tuple(slice(0, 1) if n == 1 else part for n, part in zip(operand.shape, (*self.queries, self.at), strict=True))


def _tiles(query: Tensor, key: Tensor, operands: Sequence[Tensor], meetings: Sequence[Meeting], scoring: Scoring) -> Iterator[_Tile]:
    (b, h), k = query.shape[:2], key.shape[1]
    for meeting in meetings:
        blocks = _blocks(meeting, scoring.causal, scoring.window, SIDE)
        places = _Places(blocks.columns, query.device)
        for rows, seen in zip(blocks.rows, _seen(meeting, blocks, operands, scoring), strict=True):
            for several in _together(rows, blocks.columns, seen):
                columns = tuple(blocks.columns[j] for j in several)
                one = rows.size * sum(part.size for part in columns) * (h // k)
                heads = min(k, max(1, SCORES // one))
                samples = min(b, max(1, SCORES // (one * heads)))
                where = rows, columns, places.of(several, 0), places.of(several, 1)
                for low, first in product(range(0, b, samples), range(0, k, heads)):
                    yield _Tile(slice(low, min(low + samples, b)), slice(first, min(first + heads, k)), h // k, *where)


class _Blocks(NamedTuple):
    """Stretches of at most SIDE queries and of at most SIDE keys, and which of those each of these sees, as far as positions tell."""

    rows: tuple[Stretch, ...]
    columns: tuple[Stretch, ...]
    seen: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=512)
def _blocks(meeting: Meeting, causal: bool, window: int | None, side: int) -> _Blocks:
    rows, columns = short(meeting.queries, side), short(meeting.keys, side)
    scoring = Scoring(causal, window)
    seen = (tuple(j for j, c in enumerate(columns) if not scoring.sees_none(r.at, r.size, c.at, c.size)) for r in rows)
    return _Blocks(rows, columns, tuple(seen))


def _together(rows: Stretch, columns: Sequence[Stretch], seen: Sequence[int]) -> Iterator[list[int]]:
    """Blocks of keys that are one tile with these queries: as many as make it as large as any."""
    most, found, size = min(4 * SIDE, SIDE * SIDE // rows.size), list[int](), 0
    for j in seen:
        if found and size + columns[j].size > most:
            yield found
            found, size = [], 0
        found.append(j)
        size += columns[j].size
    if found:
        yield found


@dataclass
class _Places:
    """Where blocks of keys are held, and their positions, as what picks them out."""

    columns: Sequence[Stretch]
    device: torch.device

    def of(self, several: Sequence[int], field: int) -> slice | Tensor:
        """Of some of the blocks: where they are held (0), or their positions (1)."""
        starts, sizes = [self.columns[j][field] for j in several], [self.columns[j].size for j in several]
        if all(start + size == after for start, size, after in zip(starts, sizes, starts[1:], strict=False)):
            return slice(starts[0], starts[-1] + sizes[-1])
        offsets, every = self._every
        return torch.cat([every[field][offsets[j] : offsets[j] + size] for j, size in zip(several, sizes, strict=True)])

    @cached_property
    def _every(self) -> tuple[list[int], tuple[Tensor, ...]]:
        """Where each block begins in two rows of numbers: where all keys of all blocks are held, and their positions."""
        offsets = [0, *accumulate(one.size for one in self.columns)]
        rows = (torch.cat([torch.arange(one[field], one[field] + one.size) for one in self.columns]) for field in (0, 1))
        return offsets, tuple(row.to(self.device) for row in rows)


def _seen(meeting: Meeting, blocks: _Blocks, operands: Sequence[Tensor], scoring: Scoring) -> Sequence[Sequence[int]]:
    """Of each block of queries, those of keys of which any is seen: by positions, and by masks of booleans or with minus infinity.

    One look at all of them, so that an accelerator is waited for once.
    """
    found: Tensor | None = None
    for kind, place in hiding(scoring.steps):
        mask, hides = operands[place], None if kind == "seen" else -torch.inf
        if hides is not None and not (mask.is_floating_point() and mask.shape[2] != 1 and mask.shape[3] != 1):
            continue
        rows = [Stretch(0, 0, 1)] if mask.shape[2] == 1 else blocks.rows
        if wide := mask.shape[3] != 1:
            keys = [mask.narrow(3, at, size) for _, at, size in meeting.keys]
            mask = keys[0] if len(keys) == 1 else torch.cat(keys, 3)
        parts = (mask.narrow(2, row.held, row.size) for row in rows)
        some = torch.stack([(x if hides is None else x != hides).flatten(0, 2).any(0) for x in parts])
        if wide:
            bounds = torch.tensor([0, *accumulate(one.size for one in blocks.columns)], device=mask.device)
            some = pad(some.cumsum(1, dtype=torch.int32), (1, 0))[:, bounds].diff(dim=1) > 0
        found = some if found is None else found & some
    if found is None:
        return blocks.seen
    shown = found.expand(len(blocks.rows), len(blocks.columns)).tolist()
    return [[j for j in seen if row[j]] for seen, row in zip(blocks.seen, shown, strict=True)]


def _stays_hidden(step: ScoreStep) -> bool:
    return step[0] in ("seen", "plus", "sink") or (step[0] == "times" and step[1] > 0)


def _shown(tile: _Tile, scores: Tensor, scoring: Scoring) -> Tensor:
    """Scores, in place, without those of what is not seen."""
    hidden = scoring.hidden(tile.rows, tile.columns, tile.at, scores.device)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _stepped(tile: _Tile, query: Tensor, key: Tensor, operands: Sequence[Tensor], scoring: Scoring) -> list[Tensor]:
    """Scaled products `[b, h, rows, columns]`, and what each step makes of them."""
    scaled = tile.by_key(wide(query[tile.queries])) * scoring.scale
    found = [tile.by_query(scaled @ wide(key[tile.keys]).transpose(-1, -2))]
    for step in scoring.steps:
        found.append(_stepping(tile, step, found[-1], operands))
    return found


def _stepping(tile: _Tile, step: ScoreStep, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
    match step:
        case ("times", x):
            return z * x
        case ("tanh",):
            return z.tanh()
        case ("sink", _):
            return z
        case ("plus", i):
            return z + tile.of(operands[i]).to(z.dtype)
        case ("by", i):
            return z * tile.of(operands[i]).to(z.dtype)
        case ("seen", i):
            return z.masked_fill(~tile.of(operands[i]), -torch.inf)
        case ("keep", i, x):
            return torch.where(tile.of(operands[i]), z, tile.of(operands[x]).to(z.dtype) if isinstance(x, int) else x)
        case ("fill", i, x):
            return torch.where(tile.of(operands[i]), tile.of(operands[x]).to(z.dtype) if isinstance(x, int) else x, z)
    raise ValueError(f"{step}: no step of scores")


def _back(
    tile: _Tile, step: ScoreStep, grad: Tensor, values: Sequence[Tensor], operands: Sequence[Tensor], of_operands: Sequence[Tensor]
) -> Tensor:
    """The gradient of what a step was given; adds that of its operand. `values`: what it was given, and what it gave."""
    before, after = values
    match step:
        case ("times", x):
            return grad * x
        case ("tanh",):
            return grad * (1 - after.square())
        case ("sink", _):
            return grad
        case ("plus", i):
            tile.add_to(of_operands[i], operands[i], grad)
            return grad
        case ("by", i):
            tile.add_to(of_operands[i], operands[i], grad * before)
            return grad * tile.of(operands[i]).to(grad.dtype)
        case ("seen" | "keep", i, *_):
            return grad.masked_fill(~tile.of(operands[i]), 0.0)
        case ("fill", i, _):
            return grad.masked_fill(tile.of(operands[i]), 0.0)
    raise ValueError(f"{step}: no step of scores")


# ---- the same as operators: one call each for whoever counts, or has no memory -----------------------------------------------------------


@torch.library.custom_op("meshpar::attend_", mutates_args=("out", "norm"))
def attend_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    meetings: Sequence[int],
    scoring: str,
    out: Tensor,
    norm: Tensor,
) -> None:
    """`attend`, of meetings that are written one after the other."""
    attend(query, key, value, operands, Meeting.read(meetings), Scoring.read(scoring), out, norm)


@torch.library.custom_op("meshpar::attend_backward_", mutates_args=("of_query", "of_key", "of_value", "of_operands"))
def attend_backward_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    meetings: Sequence[int],
    scoring: str,
    grad: Tensor,
    norm: Tensor,
    delta: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_operands: Sequence[Tensor],
) -> None:
    """`attend_backward`, likewise."""
    gradients = of_query, of_key, of_value, of_operands
    attend_backward(query, key, value, operands, Meeting.read(meetings), Scoring.read(scoring), grad, norm, delta, *gradients)


@attend_.register_fake
@attend_backward_.register_fake
def _(*operands: object) -> None:
    return None
