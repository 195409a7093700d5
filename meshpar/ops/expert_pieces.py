"""Experts beside the exchange of their rows, in pieces: a rank computes with its own rows while those of others travel.

    y = return_rows(steps(send_rows(x)))          y = through_experts(steps, x, offsets, ...)

        network                         rows of others ......  results of others ......
        rank      first half of own rows     rows of others         other half of own rows

Rows of others come in `GROUPS` groups of this rank's experts (one, if it has one expert): the second travels beside the first one's
products. Backward goes the same way in the other direction, for autograd runs what was called last first:

    network                             gradients of results ..   gradients of rows ..
    rank      other half of own rows         rows of others            first half of own rows

As many bytes are sent, by messages between two ranks. Products have fewer rows at a time, and the gradient of a matrix is a product of
rows in the order of pieces: rounding differs from that of all rows at once. (Pieces that hide an exchange: Hwang et al., Tutel, arXiv
2206.03382.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import functional
from meshpar.ops import expert_steps
from meshpar.ops.again import CheapStep
from meshpar.ops.collectives import refuse_second_derivative
from meshpar.ops.expert_all_to_all import check_even, return_rows, send_rows, sends_by_itself, without_expert
from meshpar.ops.primitives import Parcel, begin, call, start_messages

GROUPS = 2
"""Of a rank's experts, whose rows of other ranks come together."""
Wait = Callable[[], None]


def through_experts(
    steps: tuple[CheapStep, ...], x: Tensor, offsets: Tensor, *operands: Tensor, group: str, size: int, rank: int
) -> Tensor:
    """What experts make of rows, on the ranks that hold them, and back: `x` [n, h] sorted by expert, `offsets` [E] -> [n, o].

    `steps`: as of `expert_steps.run`, of the rows, their ends and the `operands`. Arguments and errors are those of `send_rows`.
    """
    where: Any = {"group": group, "size": size, "rank": rank}
    if not sends_by_itself(x, **where):
        rows, ends, *route = send_rows(x, offsets, **where)
        return return_rows(expert_steps.run(steps, [rows, ends, *operands]), *route, **where)
    flight = _OnTheWay(x, offsets, (group, size, rank))
    pieces = expert_steps.Pieces(steps)
    head, tail, *others = _SetOut.apply(x, flight)

    def computed(rows: Tensor, ends: Tensor, *, last: bool = False) -> Tensor:
        return pieces.run([rows, ends, *operands], last=last)

    results = [computed(head, flight.own_ends[0], last=True)]  # in backward
    left = [_WentOut.apply(computed(_CameIn.apply(rows, flight, g), flight.ends(g)), flight, g) for g, rows in enumerate(others)]
    results.append(computed(tail, flight.own_ends[1]))
    found: Tensor = _CameHome.apply(flight, *results, *left)
    return found


class _OnTheWay:
    """Where the rows of one exchange are, here and on the way."""

    def __init__(self, x: Tensor, offsets: Tensor, axis: tuple[str, int, int]) -> None:
        self.axis, self.n = axis, x.shape[0]
        self.apart = x.device.type == "cpu"
        """Whether messages between two ranks are sent by themselves; else those of all ranks together."""
        _, size, rank = axis
        check_even(offsets.shape[0], size)
        self.local = offsets.shape[0] // size
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        received = call(functional.all_to_all_single.default, counts, [self.local] * size, [self.local] * size, axis[0])
        sent, came = torch.stack([counts, received]).tolist()
        if sum(sent) != self.n:
            raise without_expert(sum(sent), self.n, offsets.shape[0])
        self.came = came
        """Rows that come from each rank for each of this rank's experts."""
        starts = [0]
        for count in sent:
            starts.append(starts[-1] + count)
        self.places = [slice(start, stop) for start, stop in pairwise(starts)]
        """Where the rows of every expert are here."""
        count = min(GROUPS, self.local)
        self.groups = [range(self.local * g // count, self.local * (g + 1) // count) for g in range(count)]
        low, high = starts[rank * self.local], starts[(rank + 1) * self.local]
        half = (high - low) // 2
        self.own = (slice(low, low + half), slice(low + half, high))
        """The first and the last of this rank's own rows."""
        own = offsets[rank * self.local : (rank + 1) * self.local] - low
        self.own_ends = (own.clamp(max=half), (own - half).clamp(min=0))
        self.result: Tensor | None = None
        self.gradient: Tensor | None = None
        """What is returned here, and the gradient of `x`, as far as they have arrived."""
        self.waits: list[Wait] = []
        self.flying: dict[int, tuple[Tensor, Wait]] = {}
        """By group: rows that come, or their gradients, and what waits for them."""

    @cached_property
    def _others(self) -> list[int]:
        _, size, rank = self.axis
        return [peer for peer in range(size) if peer != rank]

    def ends(self, g: int) -> Tensor:
        """Where the rows of every expert end, of those that others send for a group."""
        ends, total = [], 0
        for expert in range(self.local):
            total += sum(self.came[peer * self.local + expert] for peer in self._others) if expert in self.groups[g] else 0
            ends.append(total)
        return self.own_ends[0].new_tensor(ends)

    def to_experts(self, x: Tensor, g: int, turn: int) -> None:
        """Send the rows of a group's experts, and of those of other ranks, on their way. `turn`: of messages of the same kind, which."""
        here = x.new_empty(int(self.ends(g)[-1]), *x.shape[1:])
        self.flying[g] = here, self._start(self._at_owners(x, g, turn), self._at_experts(here, g, turn))

    def to_owners(self, y: Tensor, g: int, there: Tensor, turn: int) -> None:
        """The other way: `y`, a row for each that came for a group."""
        self.waits.append(self._start(self._at_experts(y, g, turn), self._at_owners(there, g, turn)))

    def arrived(self, g: int) -> Tensor:
        """The rows of a group's experts, when they are here."""
        rows, wait = self.flying.pop(g)
        wait()
        return rows

    def land(self) -> None:
        """Wait for all that was sent to owners."""
        waits, self.waits = self.waits, []
        for wait in waits:
            wait()

    def _at_owners(self, x: Tensor, g: int, turn: int) -> list[Parcel]:
        """The stretches of other ranks' experts, with where they go to or come from."""
        return [
            (x[self.places[peer * self.local + expert]], peer, turn * self.local + expert)
            for peer in self._others
            for expert in self.groups[g]
        ]

    def _at_experts(self, rows: Tensor, g: int, turn: int) -> list[Parcel]:
        found, start = [], 0
        for expert in self.groups[g]:
            for peer in self._others:
                stop = start + self.came[peer * self.local + expert]
                found.append((rows[start:stop], peer, turn * self.local + expert))
                start = stop
        return found

    def _start(self, gone: list[Parcel], come: list[Parcel]) -> Wait:
        group = self.axis[0]
        if self.apart:
            return start_messages(_full(gone), _full(come), group)
        gone, come = (sorted(parcels, key=lambda parcel: parcel[1:]) for parcels in (gone, come))
        of_rank = [[sum(x.shape[0] for x, peer, _ in parcels if peer == at) for at in range(self.axis[1])] for parcels in (gone, come)]
        arrive = begin(functional.all_to_all_single.default, torch.cat([x for x, _, _ in gone]), of_rank[1], of_rank[0], group)

        def wait() -> None:
            for (there, _, _), rows in zip(come, arrive().split([x.shape[0] for x, _, _ in come]), strict=True):
                there.copy_(rows)

        return wait


def _full(parcels: Sequence[Parcel]) -> list[Parcel]:
    return [parcel for parcel in parcels if parcel[0].shape[0]]


class _SetOut(torch.autograd.Function):
    """Rows on their way: the two halves of a rank's own, and memory for those of each group that come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _OnTheWay) -> tuple[Tensor, ...]:
        ctx.flight = flight
        x = x.detach().contiguous()
        for g in range(len(flight.groups)):
            flight.to_experts(x, g, 0)
        own = x[flight.own[0].start : flight.own[1].stop].clone()  # (of `x` itself nothing is kept)
        half = flight.own[0].stop - flight.own[0].start
        return own[:half], own[half:], *(flight.flying[g][0].detach() for g in range(len(flight.groups)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        flight = ctx.flight
        flight.land()
        gradient, flight.gradient = flight.gradient, None
        for own, grad in zip(flight.own, grads, strict=False):
            gradient[own].copy_(grad)
        return gradient, None


class _CameIn(torch.autograd.Function):
    """The rows of a group, when they are here; their gradients leave."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _OnTheWay, g: int) -> Tensor:
        ctx.flight, ctx.g = flight, g
        return flight.arrived(g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flight, grad = ctx.flight, grad.contiguous()
        if flight.gradient is None:
            flight.gradient = grad.new_empty(flight.n, *grad.shape[1:])
        flight.to_owners(grad, ctx.g, flight.gradient, 3)
        return grad, None, None


class _WentOut(torch.autograd.Function):
    """The results of a group leave; their gradients, when they are here."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: _OnTheWay, g: int) -> Tensor:
        ctx.flight, ctx.g = flight, g
        y = y.detach().contiguous()
        if flight.result is None:
            flight.result = y.new_empty(flight.n, *y.shape[1:])
        flight.to_owners(y, g, flight.result, 1)
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.arrived(ctx.g), None, None


class _CameHome(torch.autograd.Function):
    """All results, when they are here; the gradients of those of other ranks' experts leave."""

    @staticmethod
    def forward(ctx: Any, flight: _OnTheWay, first: Tensor, last: Tensor, *left: Tensor) -> Tensor:
        ctx.flight = flight
        result, flight.result = flight.result, None
        assert result is not None
        for own, y in zip(flight.own, (first, last), strict=True):
            result[own].copy_(y)
        flight.land()
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flight, grad = ctx.flight, grad.contiguous()
        for g in reversed(range(len(flight.groups))):
            flight.to_experts(grad, g, 2)
        return None, *(grad[own] for own in flight.own), *(grad.new_zeros(0) for _ in flight.groups)
