"""Attention in tiles: scores of a few queries and keys at a time, in float32 or wider, and no longer than they are used.

                      keys 0 to 3    4 to 7    8 to 11
    queries 4 to 7    all            some      none          a tile of which nothing is seen is passed over, only "some" needs a mask

Of each query are kept what it got so far, and the logarithm of the sum of exp(score) so far, from which backward makes the weights of a
tile again. (The formulas are those of FlashAttention, arXiv 2205.14135.) Everything here is local to one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 256
"""The most queries and the most keys of a tile."""
SCORES = 2**20
"""The most scores of a tile: so many heads and samples, but one at least."""


@dataclass(frozen=True)
class Sees:
    """What a query sees of keys, and how strongly."""

    causal: bool = False
    """Whether the query at position i sees the keys up to i alone."""
    window: int | None = None
    """Of those, how many of the last."""
    scale: float = 1.0
    softcap: float | None = None
    """c where scores are c tanh(score / c), before anything is added to them."""

    def none(self, at: int, rows: int, first: int, columns: int) -> bool:
        """Whether none of the queries from position `at` sees any of the keys from `first`."""
        late = (self.causal or self.window is not None) and first > at + rows - 1
        return late or (self.window is not None and first + columns - 1 <= at - self.window)

    def hidden(self, at: int, rows: int, first: int, columns: int, device: torch.device) -> Tensor | None:
        """`[rows, columns]`: True where the query does not see the key; None where all see all."""
        past = first + columns - 1 <= at or not (self.causal or self.window is not None)
        if past and (self.window is None or first > at + rows - 1 - self.window):
            return None
        behind = torch.arange(at, at + rows, device=device)[:, None] - torch.arange(first, first + columns, device=device)
        hidden = behind < 0
        return hidden if self.window is None else hidden | (behind >= self.window)


class Rectangle(NamedTuple):
    """Queries and keys that meet: a part of the table of all pairs, as stretches of what is held and of positions."""

    query: int
    """Where the first query is held."""
    key: int
    rows: int
    """How many queries."""
    columns: int
    at: int
    """The position of the first query."""
    first: int
    """The position of the first key."""


def area(rectangles: Sequence[int], causal: bool, window: int | None) -> int:
    """Pairs of queries and keys in the tiles that are not passed over, of rectangles that are written one after the other."""
    sees = Sees(causal, window)
    return sum(rows.size * columns.size for one in _rectangles(rectangles) for rows, columns in _pieces(one, sees))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rectangles: Sequence[Rectangle], sees: Sees, out: Tensor, lse: Tensor
) -> None:
    """Add what queries get from these keys, in place, to what they got from others.

    `query`: `[b, h, s, e]`, `key`: `[b, k, t, e]`, `value`: `[b, k, t, f]`, h a multiple of k. `mask`: `[b, h, s, all positions]`, any of
    which may be 1: False where a key is not seen, or numbers that are added to the scores. `out`: `[b, h, s, f]` and `lse`: `[b, h, s]`,
    zeros and -inf to begin with.
    """
    for tile in _tiles(query, key, rectangles, sees):
        scores = _scores(tile, query, key, mask, sees)
        most = scores.amax(-1)
        most = most.masked_fill_(most == -torch.inf, 0.0)
        weights = scores.sub_(most[..., None]).exp_()
        before = lse[tile.queries]
        total = torch.logaddexp(before, weights.sum(-1).log_() + most)
        safe = total.masked_fill(total == -torch.inf, 0.0)  # a query that has seen nothing yet
        found = tile.by_query(tile.by_key(weights) @ wide(value[tile.keys]))
        got = out[tile.queries]
        got.mul_((before - safe).exp_()[..., None]).addcmul_(found, (most - safe).exp_()[..., None])
        before.copy_(total)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rectangles: Sequence[Rectangle],
    sees: Sees,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_mask: Tensor | None,
) -> None:
    """Add the gradients, in place. `lse`: of all keys; `delta` `[b, h, s]`: the sums of result times `grad`."""
    for tile in _tiles(query, key, rectangles, sees):
        scores = _scores(tile, query, key, mask, sees)
        own = lse[tile.queries]
        weights = scores.sub_(own.masked_fill(own == -torch.inf, 0.0)[..., None]).exp_()
        g, k, v = tile.by_key(wide(grad[tile.queries])), wide(key[tile.keys]), wide(value[tile.keys])
        of_value[tile.keys] += tile.by_key(weights).transpose(-1, -2) @ g
        of_scores = tile.by_query(g @ v.transpose(-1, -2)).sub_(delta[tile.queries][..., None]).mul_(weights)
        if of_mask is not None:
            _add_to_mask(tile, of_scores, of_mask)
        if sees.softcap is not None:
            of_scores.mul_(1 - (_products(tile, query, key, sees) / sees.softcap).tanh_().square_())
        of_products = tile.by_key(of_scores).mul_(sees.scale)
        of_query[tile.queries] += tile.by_query(of_products @ k)
        of_key[tile.keys] += of_products.transpose(-1, -2) @ tile.by_key(wide(query[tile.queries]))


def nothing_yet(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of queries before they meet a key."""
    like = wide(query.new_empty(()))
    return like.new_zeros(*query.shape[:-1], width), like.new_full(query.shape[:-1], -torch.inf)


def wide(x: Tensor) -> Tensor:
    """In float32, if it is not in float64."""
    return x if x.dtype == torch.float64 else x.float()


class _Range(NamedTuple):
    held: int
    at: int
    size: int


@dataclass(frozen=True)
class _Tile:
    samples: slice
    key_heads: slice
    group: int
    """Query heads of one head of keys and values."""
    rows: _Range
    columns: _Range

    @property
    def heads(self) -> slice:
        return slice(self.key_heads.start * self.group, self.key_heads.stop * self.group)

    @property
    def queries(self) -> tuple[slice, ...]:
        """Where they are in `[b, h, s, ...]`."""
        return self.samples, self.heads, slice(self.rows.held, self.rows.held + self.rows.size)

    @property
    def keys(self) -> tuple[slice, ...]:
        """Where they are in `[b, k, t, ...]`."""
        return self.samples, self.key_heads, slice(self.columns.held, self.columns.held + self.columns.size)

    def by_key(self, x: Tensor) -> Tensor:
        """`[b, k g, s, ...]` as `[b, k, g s, ...]`."""
        return x.reshape(x.shape[0], -1, self.group * self.rows.size, x.shape[-1])

    def by_query(self, x: Tensor) -> Tensor:
        """And back."""
        return x.view(x.shape[0], -1, self.rows.size, x.shape[-1])

    def in_mask(self, mask: Tensor) -> tuple[slice, ...]:
        """Where it is in `[b, h, s, all positions]`, any of which may be 1."""
        columns = slice(self.columns.at, self.columns.at + self.columns.size)
        return tuple(slice(0, 1) if n == 1 else part for n, part in zip(mask.shape, (*self.queries, columns), strict=True))


def _tiles(query: Tensor, key: Tensor, rectangles: Sequence[Rectangle], sees: Sees) -> Iterator[_Tile]:
    (b, h), k = query.shape[:2], key.shape[1]
    for rectangle in rectangles:
        for rows, columns in _pieces(rectangle, sees):
            one = rows.size * columns.size * (h // k)
            heads = min(k, max(1, SCORES // one))
            samples = min(b, max(1, SCORES // (one * heads)))
            for low, first in product(range(0, b, samples), range(0, k, heads)):
                yield _Tile(slice(low, min(low + samples, b)), slice(first, min(first + heads, k)), h // k, rows, columns)


def _pieces(rectangle: Rectangle, sees: Sees) -> Iterator[tuple[_Range, _Range]]:
    """Stretches of queries and of keys, but for those that do not see each other."""
    for row, column in product(range(0, rectangle.rows, SIDE), range(0, rectangle.columns, SIDE)):
        rows = _Range(rectangle.query + row, rectangle.at + row, min(SIDE, rectangle.rows - row))
        columns = _Range(rectangle.key + column, rectangle.first + column, min(SIDE, rectangle.columns - column))
        if not sees.none(rows.at, rows.size, columns.at, columns.size):
            yield rows, columns


def _products(tile: _Tile, query: Tensor, key: Tensor, sees: Sees) -> Tensor:
    """Queries times keys, `[b, h, rows, columns]`."""
    scaled = tile.by_key(wide(query[tile.queries])) * sees.scale
    return tile.by_query(scaled @ wide(key[tile.keys]).transpose(-1, -2))


def _scores(tile: _Tile, query: Tensor, key: Tensor, mask: Tensor | None, sees: Sees) -> Tensor:
    scores = _products(tile, query, key, sees)
    if sees.softcap is not None:
        scores.div_(sees.softcap).tanh_().mul_(sees.softcap)
    if mask is not None:
        added = mask[tile.in_mask(mask)]
        scores = scores.masked_fill_(~added, -torch.inf) if mask.dtype == torch.bool else scores.add_(added)
    hidden = sees.hidden(tile.rows.at, tile.rows.size, tile.columns.at, tile.columns.size, query.device)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _add_to_mask(tile: _Tile, of_scores: Tensor, of_mask: Tensor) -> None:
    """The gradient of what is added to scores: summed where it is added to several."""
    place = of_mask[tile.in_mask(of_mask)]
    place += of_scores.sum_to_size(place.shape)


# ---- the same as operators: one call each for whoever counts, or has no memory -----------------------------------------------------------


@torch.library.custom_op("meshpar::attend_", mutates_args=("out", "lse"))
def attend_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rectangles: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`attend`, of rectangles that are written one after the other."""
    attend(query, key, value, mask, _rectangles(rectangles), Sees(causal, window, scale, softcap), out, lse)


@torch.library.custom_op("meshpar::attend_backward_", mutates_args=("of_query", "of_key", "of_value", "of_mask"))
def attend_backward_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rectangles: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_mask: Tensor | None,
) -> None:
    """`attend_backward`, likewise."""
    sees = Sees(causal, window, scale, softcap)
    attend_backward(query, key, value, mask, _rectangles(rectangles), sees, grad, lse, delta, of_query, of_key, of_value, of_mask)


@attend_.register_fake
@attend_backward_.register_fake
def _(*operands: object) -> None:
    return None


def _rectangles(numbers: Sequence[int]) -> list[Rectangle]:
    count = len(Rectangle._fields)
    return [Rectangle(*numbers[i : i + count]) for i in range(0, len(numbers), count)]
