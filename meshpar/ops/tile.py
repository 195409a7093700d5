"""A tile of attention: where its queries and keys lie in the tensors, how they are taken out, and how results are put back.

one part          samples x heads x queries x keys                    slices, where what is held lies in a row
several parts     (parts samples) x heads x queries x keys            each part has other queries, and keys of its own
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from meshpar.ops.pairings import Sight, Stretch, TilePart, count


@dataclass(frozen=True)
class Tile(ABC):
    """Some samples and heads of parts. Shapes are those of a tile: `b` stands for samples, of each part where there are several."""

    samples: slice
    key_heads: slice
    group: int
    """Query heads of one head of keys and values."""
    parts: Sequence[TilePart]
    device: torch.device

    @property
    def heads(self) -> slice:
        """Those of queries."""
        return slice(self.key_heads.start * self.group, self.key_heads.stop * self.group)

    @property
    def size(self) -> int:
        """How many queries a part has."""
        return self.parts[0][0].size

    def by_key(self, x: Tensor) -> Tensor:
        """`[b, k g, s, ...]` as `[b, k, g s, ...]`."""
        return x.reshape(x.shape[0], -1, self.group * self.size, x.shape[-1])

    def by_query(self, x: Tensor) -> Tensor:
        """And back."""
        return x.view(x.shape[0], -1, self.size, x.shape[-1])

    def add_to_queries(self, x: Tensor, more: Tensor) -> None:
        """Add to those of the tile."""
        self.put(x, self.queries(x) + more)

    @abstractmethod
    def queries(self, x: Tensor) -> Tensor:
        """Those of the tile, of `[b, h, s, ...]`."""

    @abstractmethod
    def put(self, x: Tensor, value: Tensor) -> None:
        """The other way."""

    @abstractmethod
    def keys(self, x: Tensor) -> Tensor:
        """Those of the tile, of `[b, k, t, ...]`."""

    @abstractmethod
    def add_to_keys(self, x: Tensor, more: Tensor) -> None:
        """Add to those of the tile."""

    @abstractmethod
    def of(self, operand: Tensor) -> Tensor:
        """Its part of `[b, h, s, all positions]`, any of which may be 1."""

    @abstractmethod
    def add(self, of_operand: Tensor, grad: Tensor) -> None:
        """Add to the gradient of an operand: summed where one element meets several scores."""

    @abstractmethod
    def show(self, scores: Tensor, sight: Sight) -> Tensor:
        """Scores, in place, without those of what is not seen."""


class OnePart(Tile):
    """Queries of one stretch, with any keys."""

    def queries(self, x: Tensor) -> Tensor:
        return x[self._rows]

    def put(self, x: Tensor, value: Tensor) -> None:
        x[self._rows] = value

    def keys(self, x: Tensor) -> Tensor:
        return x[self._columns]

    def add_to_keys(self, x: Tensor, more: Tensor) -> None:
        x[self._columns] += more

    def of(self, operand: Tensor) -> Tensor:
        return operand[self._part(operand)]

    def add(self, of_operand: Tensor, grad: Tensor) -> None:
        of_operand[self._part(of_operand)] += grad.sum_to_size([min(sizes) for sizes in zip(of_operand.shape, grad.shape, strict=True)])

    def show(self, scores: Tensor, sight: Sight) -> Tensor:
        rows, columns = self.parts[0]
        if all(sight.all(rows, one) for one in columns):
            return scores
        at = self._positions
        keys = torch.arange(at.start, at.stop, device=self.device) if isinstance(at, slice) else at
        queries = torch.arange(rows.at, rows.at + rows.size, device=self.device)
        return scores.masked_fill_(_hidden(queries, keys, sight), -torch.inf)

    def _part(self, operand: Tensor) -> tuple[slice | Tensor, ...]:
        return tuple(slice(0, 1) if n == 1 else part for n, part in zip(operand.shape, (*self._rows, self._positions), strict=True))

    @property
    def _rows(self) -> tuple[slice, ...]:
        row = self.parts[0][0]
        return self.samples, self.heads, slice(row.held, row.held + row.size)

    @cached_property
    def _columns(self) -> tuple[slice | Tensor, ...]:
        return self.samples, self.key_heads, self._in_a_row(0)

    @cached_property
    def _positions(self) -> slice | Tensor:
        return self._in_a_row(1)

    def _in_a_row(self, field: int) -> slice | Tensor:
        """Where the keys are held (0), or their positions (1)."""
        columns = self.parts[0][1]
        if all(one[field] + one.size == after[field] for one, after in pairwise(columns)):
            return slice(columns[0][field], columns[-1][field] + columns[-1].size)
        return _listed(columns, field).to(self.device)


class SeveralParts(Tile):
    """As many queries of each of several stretches, side by side; keys are as many as the part with most has, those beyond are hidden."""

    def queries(self, x: Tensor) -> Tensor:
        return self._folded(x[self.samples, self.heads][:, :, self._held[0]])

    def put(self, x: Tensor, value: Tensor) -> None:
        x[self.samples, self.heads][:, :, self._held[0]] = self._unfolded(value).movedim(0, 2)

    def keys(self, x: Tensor) -> Tensor:
        return self._folded(x[self.samples, self.key_heads][:, :, self._held[1]])

    def add_to_keys(self, x: Tensor, more: Tensor) -> None:
        where = x[self.samples, self.key_heads].movedim(2, 0)
        where.index_put_((self._held[1],), self._unfolded(more).movedim(3, 1), accumulate=True)

    def of(self, operand: Tensor) -> Tensor:
        b, h, s, t = operand.shape
        own = operand[self.samples if b > 1 else slice(None), self.heads if h > 1 else slice(None)]
        if s == t == 1:
            return own if b == 1 else self._folded(own[:, :, None].expand(-1, -1, len(self.parts), -1, -1))
        found = own.permute(2, 3, 0, 1)[self._pairs(s, t)].permute(0, 3, 4, 1, 2)  # [parts, b, h, s, t]
        return found.expand(-1, self._count, -1, -1, -1).flatten(0, 1)

    def add(self, of_operand: Tensor, grad: Tensor) -> None:
        b, h, s, t = of_operand.shape
        own = of_operand[self.samples if b > 1 else slice(None), self.heads if h > 1 else slice(None)]
        each = self._unfolded(grad)  # [parts, b, h, s, t]
        each = each.sum_to_size([n if whole > 1 else 1 for n, whole in zip(each.shape, (2, b, h, s, t), strict=True)])
        own.permute(2, 3, 0, 1).index_put_(self._pairs(s, t), each.permute(0, 3, 4, 1, 2), accumulate=True)

    def show(self, scores: Tensor, sight: Sight) -> Tensor:
        rows, columns = self._at
        hidden = self._beyond[:, None]
        if sight.causal or sight.window is not None:
            hidden = hidden | _hidden(rows, columns, sight)
        return self._unfolded(scores).masked_fill_(hidden[:, None, None], -torch.inf).flatten(0, 1)

    def _pairs(self, s: int, t: int) -> tuple[Tensor, Tensor]:
        """What picks queries and keys out of `[s, t]`, either of which may be 1: to `[parts, s, t]`."""
        none = torch.zeros(1, 1, 1, dtype=torch.long, device=self.device).expand(len(self.parts), 1, 1)
        return self._held[0][:, :, None] if s > 1 else none, self._at[1][:, None] if t > 1 else none

    def _folded(self, x: Tensor) -> Tensor:
        """`[b, h, parts, ...]` as `[parts b, h, ...]`."""
        return x.movedim(2, 0).flatten(0, 1)

    def _unfolded(self, x: Tensor) -> Tensor:
        """`[parts b, ...]` as `[parts, b, ...]`."""
        return x.unflatten(0, (len(self.parts), -1))

    @property
    def _count(self) -> int:
        return self.samples.stop - self.samples.start

    @cached_property
    def _held(self) -> tuple[Tensor, Tensor]:
        """Where queries `[parts, queries]` and keys `[parts, keys]` are held."""
        return self._places(0)

    @cached_property
    def _at(self) -> tuple[Tensor, Tensor]:
        """Their positions."""
        return self._places(1)

    def _places(self, field: int) -> tuple[Tensor, Tensor]:
        rows = torch.stack([_listed([row], field) for row, _ in self.parts])
        columns = torch.stack([self._filled(_listed(columns, field)) for _, columns in self.parts])
        return rows.to(self.device), columns.to(self.device)

    @cached_property
    def _most(self) -> int:
        return max(count(columns) for _, columns in self.parts)

    def _filled(self, places: Tensor) -> Tensor:
        return torch.cat([places, places[:1].expand(self._most - len(places))])

    @cached_property
    def _beyond(self) -> Tensor:
        """`[parts, keys]`: True where a part has no more keys."""
        return torch.stack([pad(torch.zeros(n, dtype=torch.bool), (0, self._most - n), value=True) for n in self._counts]).to(self.device)

    @property
    def _counts(self) -> list[int]:
        return [count(columns) for _, columns in self.parts]


def _listed(stretches: Sequence[Stretch], field: int) -> Tensor:
    return torch.cat([torch.arange(one[field], one[field] + one.size) for one in stretches])


def _hidden(queries: Tensor, keys: Tensor, sight: Sight) -> Tensor:
    """`[..., queries, keys]`: True where the query at a position does not see the key at another."""
    behind = queries[..., None] - keys[..., None, :]
    return behind < 0 if sight.window is None else (behind < 0) | (behind >= sight.window)
