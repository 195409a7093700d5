"""Experts whose matrices are cut, beside the gathering of tokens and the summing of results, in pieces.

    x_r = s_to_r(x, 0, ...)                            y = on_gathered_tokens(steps, x, index, weights, None, ...)
    rows, ends, perm = dispatch(x_r, index, ...)
    z = combine(steps(rows, ends), perm, weights)
    y = p_to_s(z, 0, ...)

        network                          tokens of others .......  results for others .....
        rank      first half of own tokens     tokens of others         other half of own tokens

Every rank computes with its part of every matrix for the tokens of all, so a rank's own come first, those of another when they are here,
and what it makes of them leaves at once. Which experts a token has must be known: all ranks have chosen from the same numbers (a choice
that each makes of products of other shapes might differ in the last bit). Backward goes the same way in the other direction, for autograd
runs what was called last first: gradients of results come, those of tokens leave.

As many bytes are sent as by the collectives, each part to one rank. Products have fewer rows at a time, a result is a sum over ranks from
the own one on, and the gradient of a matrix a product of rows in the order of pieces: rounding differs from that of all tokens at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshpar.ops import collectives, expert_steps, experts, load
from meshpar.ops.again import CheapStep
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.expert_all_to_all import sends_by_itself
from meshpar.ops.layouts import Segments
from meshpar.ops.primitives import Finish, start_shift


def on_gathered_tokens(
    steps: tuple[CheapStep, ...],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    at: load.TallySlot | None,
    *operands: Tensor,
    num_experts: int,
    dropping: bool,
    repeat: int,
    segments: Segments,
    group: str,
    size: int,
    rank: int,
) -> Tensor:
    """What experts make of the tokens of all ranks, summed: `x` [n, h], a rank's own -> [n, o].

    `index`, `weights` [n * size, k]: of every token, its experts and what their results count, the same on all ranks. Tokens are cut as by
    `s_to_r(x, 0, repeat, segments)`, into equal parts of one segment. `steps`: as of `expert_steps.run`, of the rows as `dispatch` sorts
    them, their ends and the `operands`. `at`: where the numbers of rows are noted.
    """
    axis: Any = (group, size, rank)
    route, where = (num_experts, dropping), dict[str, Any](zip(("group", "size", "rank"), axis, strict=True))
    if not sends_by_itself(x, **where):
        layout = 0, repeat, segments
        whole = collectives.s_to_r(x, *layout, **where)
        found = load.dispatch(whole, index, num_experts, at, dropping) if at is not None else experts.dispatch(whole, index, *route)
        rows, ends, perm = found
        z = experts.combine(expert_steps.run(steps, [rows, ends, *operands]), perm, weights)
        return collectives.p_to_s(z, *layout, **where)
    flight, pieces, seen = _TokensOnTheWay(axis), expert_steps.Pieces(steps), list[Tensor]()

    def computed(tokens: Tensor, index: Tensor, weights: Tensor, *, last: bool = False) -> Tensor:
        rows, ends, perm = experts.dispatch(tokens, index, *route)
        seen.append(ends)
        return experts.combine(pieces.run([rows, ends, *operands], last=last), perm, weights)

    of_rank = list(zip(_by_rank(index, repeat, size), _by_rank(weights, repeat, size), strict=True))
    half = x.shape[0] // 2
    first, other = zip(*(t.split([half, x.shape[0] - half]) for t in (x, *of_rank[rank])), strict=True)
    coming = _TokensSetOut.apply(x, flight)
    own = [computed(*first, last=True)]  # in backward
    left = [
        _ResultsWentOut.apply(computed(_TokensCameIn.apply(part, flight, by), *of_rank[(rank - by) % size]), flight, by)
        for by, part in enumerate(coming, 1)
    ]
    own.append(computed(*other))
    if at is not None:
        load.note(at, torch.stack(seen).sum(0, dtype=seen[0].dtype))
    found_here: Tensor = _ResultsCameHome.apply(flight, *own, *left)
    return found_here


def _by_rank(of_tokens: Tensor, repeat: int, size: int) -> list[Tensor]:
    """What belongs to the tokens of each rank, of what belongs to all: [n * size, k] -> [n, k] each."""
    return [one.flatten(0, 1) for one in of_tokens.unflatten(0, (repeat, size, -1)).unbind(1)]


class _TokensOnTheWay:
    """What travels: by rank ("the one so many before this one"), what comes, and in any order what comes home."""

    def __init__(self, axis: tuple[str, int, int]) -> None:
        self.axis = axis
        self.coming: dict[int, Finish] = {}
        self.home: list[Finish] = []

    def to_all(self, x: Tensor, *, backward: bool = False) -> None:
        """Send `x` to every rank, and theirs here: in the order in which they are asked for."""
        everyone = range(1, self.axis[1])
        for by in reversed(everyone) if backward else everyone:
            self.coming[by] = start_shift(x, by, self.axis)

    def to_owner(self, x: Tensor, by: int) -> None:
        """Send what was computed for the rank `by` before this one there."""
        self.home.append(start_shift(x, -by, self.axis))

    def all_home(self, own: Tensor) -> Tensor:
        """What was computed for this rank, `own` and elsewhere, summed in place."""
        home, self.home = self.home, []
        for arrive in home:
            own.add_(arrive())
        return own


class _TokensSetOut(torch.autograd.Function):
    """Tokens on their way to all ranks. Gives a mark for those that come from each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _TokensOnTheWay) -> tuple[Tensor, ...]:
        ctx.flight, ctx.like = flight, x.shape
        flight.to_all(x.detach())
        return tuple(x.new_empty(0) for _ in range(1, flight.axis[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        return ctx.flight.all_home(grads[0].new_zeros(ctx.like)), None


class _TokensCameIn(torch.autograd.Function):
    """The tokens of another rank, when they are here; their gradients leave."""

    @staticmethod
    def forward(ctx: Any, mark: Tensor, flight: _TokensOnTheWay, by: int) -> Tensor:
        ctx.flight, ctx.by = flight, by
        return flight.coming.pop(by)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.to_owner(grad, ctx.by)
        return grad.new_zeros(0), None, None


class _ResultsWentOut(torch.autograd.Function):
    """Results for another rank leave; their gradients, when they are here."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: _TokensOnTheWay, by: int) -> Tensor:
        ctx.flight, ctx.by = flight, by
        flight.to_owner(y.detach(), by)
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, mark: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.coming.pop(ctx.by)(), None, None


class _ResultsCameHome(torch.autograd.Function):
    """Results for the own tokens, of all ranks, when they are here; their gradients leave."""

    @staticmethod
    def forward(ctx: Any, flight: _TokensOnTheWay, first: Tensor, other: Tensor, *left: Tensor) -> Tensor:
        ctx.flight, ctx.parts = flight, [first.shape[0], other.shape[0]]
        return flight.all_home(torch.cat([first, other]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad = grad.contiguous()
        ctx.flight.to_all(grad, backward=True)
        return None, *grad.split(ctx.parts), *(grad.new_zeros(0) for _ in range(1, ctx.flight.axis[1]))
