"""Attention in tiles: scores of a few queries and keys at a time, in float32 or wider, and no longer than they are used.

                      keys 0 to 3    4 to 7    8 to 11
    queries 4 to 7    all            some      none          a tile of which nothing is seen is passed over, only "some" needs a mask

Queries and keys may be of many short stretches of positions: what is one tile then, `ops/pairings.py` says.

Of each query are kept what it got so far, the largest score and the sum of exp(score), from which backward makes the weights of a tile
again. (The formulas are those of FlashAttention, arXiv 2205.14135.) Everything here is local to one rank. What is plain attention is left
to a kernel of torch's own: `ops/blockwise.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar.ops.pairings import Pairing, ShortStretches, Sight, Stretch, blocks, count, tiling
from meshpar.ops.tile import OnePart, SeveralParts, Tile

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


class Masked(NamedTuple):
    """Products that are scaled, and of which some are hidden."""

    scale: float
    operands: tuple[tuple[int, str], ...]
    """Those that hide, and by being what: see `hiding`."""


@dataclass(frozen=True)
class Scoring:
    """What a query sees of keys, and how strongly: products times `scale`, then the steps, then what is not seen is left out."""

    causal: bool = False
    """Whether the query at position i sees the keys up to i alone."""
    window: int | None = None
    """Of those, how many of the last."""
    scale: float = 1.0
    steps: tuple[ScoreStep, ...] = ()

    @property
    def sight(self) -> Sight:
        """What is seen by positions."""
        return Sight(self.causal, self.window)

    def sink_of(self, operands: Sequence[Tensor]) -> Tensor | None:
        """The score of each query whose weight is nobody's."""
        return operands[self.steps[-1][1]] if self.steps and self.steps[-1][0] == "sink" else None

    @property
    def masked(self) -> Masked | None:
        """How it scores, if products are only scaled and hidden; a sink may follow."""
        rest = self.steps[:-1] if self.steps and self.steps[-1][0] == "sink" else self.steps
        factors, operands = [step[1] for step in rest if step[0] == "times"], tuple(hiding(rest))
        if len(factors) + len(operands) < len(rest):
            return None
        return Masked(prod((self.scale, *factors)), operands)

    @property
    def written(self) -> str:
        """As the operators of `ops/blockwise.py` take it."""
        return json.dumps([self.causal, self.window, self.scale, self.steps])

    @staticmethod
    def read(written: str) -> Scoring:
        """The other way."""
        causal, window, scale, steps = json.loads(written)
        return Scoring(causal, window, scale, tuple(tuple(step) for step in steps))


def hiding(steps: Sequence[ScoreStep]) -> Iterator[tuple[int, str]]:
    """The operands of steps that hide for good, and by what they do: being "false", "true", or minus infinity ("-inf").

    No later step may make anything else of minus infinity.
    """
    for at, (kind, *of) in enumerate(steps):
        by = "false" if kind == "seen" else "-inf" if kind == "plus" else {"keep": "false", "fill": "true"}.get(kind, "")
        if by and _stays_hidden(steps[at]) and all(_stays_hidden(step) for step in steps[at + 1 :]):
            yield of[0], by


def shown_by(mask: Tensor, by: str) -> Tensor:
    """Where an operand that hides by being so does not."""
    return mask if by == "false" else ~mask if by == "true" else mask != -torch.inf


def _stays_hidden(step: ScoreStep) -> bool:
    """Whether minus infinity stays what it is."""
    kind, *of = step
    return kind in ("seen", "plus", "sink") or (kind in ("keep", "fill") and of[1] == -torch.inf) or (kind == "times" and of[0] > 0)


def area(pairings: Sequence[int], scoring: Scoring) -> int:
    """Pairs of queries and keys in the tiles that are not passed over, of pairings that are written one after the other."""
    every = (blocks(one, scoring.sight) for one in Pairing.read(pairings))
    return sum(row.size * one.columns[j].size for one in every for row, seen in zip(one.rows, one.seen, strict=True) for j in seen)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    pairings: Sequence[Pairing],
    scoring: Scoring,
    out: Tensor,
    norm: Tensor,
) -> None:
    """Add what queries get from these keys, in place, to what they got from others.

    `query`: `[b, h, s, e]`, `key`: `[b, k, t, e]`, `value`: `[b, k, t, f]`, h a multiple of k. `operands`: of the steps. `out`:
    `[b, h, s, f]`, zeros to begin with, and `norm`: `[b, h, s, 2]`, the largest score so far, and the logarithm of the sum of
    exp(score - largest): -inf to begin with. (Of scores near -1e38, as masks make them, the sum of the two would forget the second.)
    """
    for tile in _tiles(query, key, operands, pairings, scoring):
        scores = tile.show(_stepped(tile, query, key, operands, scoring)[-1], scoring.sight)
        most = scores.amax(-1)
        weights = scores.sub_(_finite(most)[..., None]).exp_()
        total = weights.sum(-1).log_()
        found = tile.by_query(tile.by_key(weights) @ wide(tile.keys(value)))
        joined = join(tile.queries(out), tile.queries(norm), found, most, total)
        tile.put(out, joined[0])
        tile.put(norm, joined[1])


def join(out: Tensor, norm: Tensor, found: Tensor, most: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`out` and `norm` of queries that have met more keys. `found` `[b, h, s, f]`: sums of values times exp(score - `most`) there, `total`
    `[b, h, s]`: the logarithm of the sum of these weights."""
    top = torch.maximum(norm[..., 0], most)
    before, more = norm[..., 0] - _finite(top), most - _finite(top)
    every = torch.logaddexp(before + norm[..., 1], more + total)
    kept, new = (before + norm[..., 1] - _finite(every)).exp_(), (more - _finite(every)).exp_()
    return torch.addcmul(out * kept[..., None], found, new[..., None]), torch.stack([top, every], -1)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    pairings: Sequence[Pairing],
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
    for tile in _tiles(query, key, operands, pairings, scoring):
        values = _stepped(tile, query, key, operands, scoring)
        top, total = (_finite(x)[..., None] for x in tile.queries(norm).unbind(-1))
        last = values[-1].clone() if scoring.steps else values[-1]
        weights = tile.show(last, scoring.sight).sub_(top).sub_(total).exp_()
        g, k, v = tile.by_key(wide(tile.queries(grad))), wide(tile.keys(key)), wide(tile.keys(value))
        tile.add_to_keys(of_value, tile.by_key(weights).transpose(-1, -2) @ g)
        of_scores = tile.by_query(g @ v.transpose(-1, -2)).sub_(tile.queries(delta)[..., None]).mul_(weights)
        for at in range(len(scoring.steps) - 1, -1, -1):
            of_scores = _back(tile, scoring.steps[at], of_scores, values[at : at + 2], operands, of_operands)
        of_products = tile.by_key(of_scores) * scoring.scale
        tile.add_to_queries(of_query, tile.by_query(of_products @ k))
        tile.add_to_keys(of_key, of_products.transpose(-1, -2) @ tile.by_key(wide(tile.queries(query))))


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


def _tiles(query: Tensor, key: Tensor, operands: Sequence[Tensor], pairings: Sequence[Pairing], scoring: Scoring) -> Iterator[Tile]:
    (b, h), k = query.shape[:2], key.shape[1]
    for pairing in pairings:
        found = blocks(pairing, scoring.sight)
        for parts in tiling(found, _seen(pairing, found, operands, scoring)):
            one = len(parts) * parts[0][0].size * max(count(columns) for _, columns in parts) * (h // k)
            heads = min(k, max(1, SCORES // one))
            samples = min(b, max(1, SCORES // (one * heads)))
            kind = OnePart if len(parts) == 1 else SeveralParts
            for low, first in product(range(0, b, samples), range(0, k, heads)):
                yield kind(slice(low, min(low + samples, b)), slice(first, min(first + heads, k)), h // k, parts, query.device)


def _seen(pairing: Pairing, found: ShortStretches, operands: Sequence[Tensor], scoring: Scoring) -> Sequence[Sequence[int]]:
    """Of each block of queries, those of keys of which any is seen: by positions, and by masks, of booleans or with minus infinity.

    One look at all of them, so that an accelerator is waited for once.
    """
    every: Tensor | None = None
    for place, by in hiding(scoring.steps):
        mask = operands[place]
        if by == "-inf" and not (mask.is_floating_point() and mask.shape[2] != 1 and mask.shape[3] != 1):
            continue
        rows = [Stretch(0, 0, 1)] if mask.shape[2] == 1 else found.rows
        if wide := mask.shape[3] != 1:
            keys = [mask.narrow(3, at, size) for _, at, size in pairing.keys]
            mask = keys[0] if len(keys) == 1 else torch.cat(keys, 3)
        parts = (mask.narrow(2, row.held, row.size) for row in rows)
        some = torch.stack([shown_by(x, by).flatten(0, 2).any(0) for x in parts])
        if wide:
            bounds = torch.tensor([0, *accumulate(one.size for one in found.columns)], device=mask.device)
            some = pad(some.cumsum(1, dtype=torch.int32), (1, 0))[:, bounds].diff(dim=1) > 0
        every = some if every is None else every & some
    if every is None:
        return found.seen
    shown = every.expand(len(found.rows), len(found.columns)).tolist()
    return [[j for j in seen if row[j]] for seen, row in zip(found.seen, shown, strict=True)]


def _stepped(tile: Tile, query: Tensor, key: Tensor, operands: Sequence[Tensor], scoring: Scoring) -> list[Tensor]:
    """Scaled products `[b, h, rows, columns]`, and what each step makes of them."""
    scaled = tile.by_key(wide(tile.queries(query))) * scoring.scale
    found = [tile.by_query(scaled @ wide(tile.keys(key)).transpose(-1, -2))]
    for step in scoring.steps:
        found.append(_stepping(tile, step, found[-1], operands))
    return found


def _stepping(tile: Tile, step: ScoreStep, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
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
    tile: Tile, step: ScoreStep, grad: Tensor, values: Sequence[Tensor], operands: Sequence[Tensor], of_operands: Sequence[Tensor]
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
            _add(tile, of_operands[i], operands[i], grad)
            return grad
        case ("by", i):
            _add(tile, of_operands[i], operands[i], grad * before)
            return grad * tile.of(operands[i]).to(grad.dtype)
        case ("seen" | "keep", i, *_):
            return grad.masked_fill(~tile.of(operands[i]), 0.0)
        case ("fill", i, _):
            return grad.masked_fill(tile.of(operands[i]), 0.0)
    raise ValueError(f"{step}: no step of scores")


def _add(tile: Tile, of_operand: Tensor, operand: Tensor, grad: Tensor) -> None:
    """Add to the gradient of an operand, if that is wanted."""
    if of_operand.shape == operand.shape:
        tile.add(of_operand, grad)
