"""What can be said of a backward, by running it on drawn values: is it linear in the gradient, does it treat elements by themselves?

    b(0) = 0,  b(g + h) = b(g) + b(h),  b(s g) = s b(g) for small and large s        linear: pending sums of gradients may enter
    b(0) = b(g) = b(h) for an operand                                                shared: a term that is added to the loss
    y[i], b(g[i]; x[i]) = y(x)[i], b(g; x)[i] for any part i of a dim                the dim's indices are alone

Sizes are the true ones where the operands are small. Where they are large, equal sizes are replaced by equal smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from meshpar.ops.nature import UNPROVED, Nature
from meshpar.ops.own_backward import HAND_IN, ExampleCall, Unfit

SMALL, BEARABLE = 1 << 15, 1 << 20
"""Up to so many elements in all, operands are drawn at their true sizes; up to so many where smaller sizes do not run."""
SCALES = (-1.0, 0.5, 1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e12)
TOLERANCE = 1e-5
"""Of the largest element: above the rounding of sums in float32, below that of narrower types, which are not linear."""


class Both(Protocol):
    """An operator's two directions, on values."""

    @property
    def tensors(self) -> tuple[ExampleCall, ...]:
        """What its operands look like."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results."""

    def backward(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the operands that need one."""


def nature_of(both: Both) -> Nature:
    """What every draw agrees on. Raises Unfit for an operator that gives other values each time."""
    trials = list(_trials(both))
    if not trials:
        return UNPROVED
    linear, shared = True, frozenset(range(len(both.tensors)))
    alone = apart = frozenset(range(8))
    elementwise, adding = True, frozenset[int]()
    for trial in trials:
        shared &= trial.shared()
        adding |= trial.adding()
    for trial in trials:
        linear = linear and trial.is_linear(shared)
        own = trial.alone(shared)
        alone &= own
        apart &= trial.apart()
        elementwise = elementwise and trial.is_elementwise(shared, own)
    return Nature(linear, elementwise, tuple(sorted(shared)), tuple(sorted(adding & shared)), tuple(sorted(alone)), tuple(sorted(apart)))


def draws(tensors: Sequence[ExampleCall], *, dtype: torch.dtype | None = torch.double) -> Iterator[list[Tensor]]:
    """Operands to try: of size one, large, positive, and with zeros. `dtype`: of floating ones (None: their own)."""
    generator = torch.Generator().manual_seed(0)
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x,
        lambda x: x * 20,
        lambda x: x.abs() + 0.1,
        lambda x: x * (torch.rand(x.shape, generator=generator) < 0.7),
    )
    for number, change in enumerate(changes):
        yield [_drawn(example, generator, change, dtype, number) for example in tensors]


def _drawn(
    example: ExampleCall, generator: torch.Generator, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None, number: int
) -> Tensor:
    if example.dtype == torch.bool:
        return torch.rand(example.shape, generator=generator) < 0.7
    if not example.dtype.is_floating_point:
        high = 2 if number else 1  # indices must exist
        return torch.randint(high, example.shape, generator=generator).to(example.dtype)
    return change(torch.randn(example.shape, dtype=torch.double, generator=generator)).to(dtype or example.dtype)


def sizes(tensors: Sequence[ExampleCall]) -> Iterator[tuple[ExampleCall, ...]]:
    """The operands at sizes to try, the best first: smaller ones where the true ones are large."""
    count = sum(prod(example.shape) for example in tensors)
    if count > SMALL:
        distinct = sorted({n for example in tensors for n in example.shape if n > 6})
        smaller = {n: min(n, 8 + 4 * k) for k, n in enumerate(distinct)}
        yield tuple(
            ExampleCall(tuple(smaller.get(n, n) for n in example.shape), example.dtype, torch.device("cpu"), example.needs_grad)
            for example in tensors
        )
    if count <= BEARABLE:
        yield tuple(ExampleCall(example.shape, example.dtype, torch.device("cpu"), example.needs_grad) for example in tensors)


def _trials(both: Both) -> Iterator[_Draw]:
    """One trial for each draw, of the first kind that runs."""
    for examples in sizes(both.tensors):
        for dtype in (torch.double, None):
            found = [trial for values in draws(examples, dtype=dtype) if (trial := _trial(both, values)) is not None]
            if found:
                yield from found
                return


def _trial(both: Both, operands: list[Tensor]) -> _Draw | None:
    try:
        results = both.forward(*operands)
        trial = _Draw(both, operands, results, torch.Generator().manual_seed(1))
        once_more = both.forward(*operands)
        first, again = (list(trial.backward(trial.gradient).values()) for _ in range(2))
    except Unfit:
        raise
    except Exception:  # whatever it is, there is nothing to learn from this draw
        return None
    pairs = zip((*results, *first), (*once_more, *again), strict=True)
    if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs):
        raise Unfit("it gives other values each time: it draws random numbers, or keeps a state", HAND_IN)
    if not all(bool(torch.isfinite(value).all()) for value in (*results, *first)):
        return None
    return trial


@dataclass
class _Draw:
    """One draw of operands, and the backward there."""

    both: Both
    operands: list[Tensor]
    results: tuple[Tensor, ...]
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.gradient, self.other = self._gradient(), self._gradient()
        self.needing = [i for i, example in enumerate(self.both.tensors) if example.needs_grad]

    def _gradient(self) -> list[Tensor]:
        return [
            torch.randn(r.shape, dtype=torch.double, generator=self.generator).to(r.dtype) if r.is_floating_point() else torch.zeros_like(r)
            for r in self.results
        ]

    def backward(self, gradient: Sequence[Tensor], operands: Sequence[Tensor] | None = None) -> dict[int, Tensor]:
        found = self.both.backward(gradient, self.operands if operands is None else operands)
        return dict(zip(self.needing, found, strict=True))

    # -- in the gradient -------------------------------------------------------------------------------------------------------------------

    def shared(self) -> frozenset[int]:
        """The operands whose gradient is the same whatever comes in; those without a gradient too."""
        zero = [torch.zeros_like(g) for g in self.gradient]
        try:
            seen = [self.backward(g) for g in (zero, self.gradient, self.other, _times(self.gradient, 1e6))]
        except Exception:
            return frozenset()
        same = {i for i in self.needing if all(torch.equal(one[i], seen[0][i]) for one in seen)}
        return frozenset(same | (set(range(len(self.operands))) - set(self.needing)))

    def adding(self) -> frozenset[int]:
        """The operands that have a gradient where none comes in."""
        try:
            at_zero = self.backward(_times(self.gradient, 0.0))
        except Exception:
            return frozenset()
        return frozenset(i for i, gradient in at_zero.items() if bool(gradient.any()))

    def is_linear(self, shared: frozenset[int]) -> bool:
        """Whether the gradients of the other operands add up, and grow with the one that comes in."""
        mine = [i for i in self.needing if i not in shared]
        g, h = self.gradient, self.other
        try:
            at_g, at_h = self.backward(g), self.backward(h)
            if any(bool(self.backward(_times(g, 0.0))[i].any()) for i in mine):
                return False
            if not _all_close(self.backward(_plus(g, h)), {i: at_g[i] + at_h[i] for i in mine}):
                return False
            some = [torch.rand(one.shape, generator=self.generator) < 0.5 for one in g]
            left = [torch.where(where, one, torch.zeros_like(one)) for where, one in zip(some, g, strict=True)]
            at_left, at_right = self.backward(left), self.backward(_plus(g, _times(left, -1.0)))
            if not _all_close(at_g, {i: at_left[i] + at_right[i] for i in mine}):
                return False
            return all(_all_close(self.backward(_times(g, s)), {i: at_g[i] * s for i in mine}) for s in SCALES)
        except Exception:  # a gradient that it does not take
            return False

    # -- in the elements -------------------------------------------------------------------------------------------------------------------

    def alone(self, shared: frozenset[int]) -> frozenset[int]:
        """The dims of the results of which any part gives that part of the results and gradients, and of all others a share."""
        return frozenset(d for d in self.apart() if self._is_alone(d, shared))

    def apart(self) -> frozenset[int]:
        """The dims of the results of which any part gives that part of the results."""
        dims = range(self.results[0].dim()) if self.results else ()
        return frozenset(d for d in dims if self._is_apart(d))

    def is_elementwise(self, shared: frozenset[int], alone: frozenset[int]) -> bool:
        """Whether every dim is alone; what has another shape is one element and the same for all."""
        shape = self.results[0].shape if self.results else torch.Size()
        full = all(tuple(r.shape) == tuple(shape) for r in self.results)
        fits = all(x.shape == shape or (x.numel() == 1 and i in shared) for i, x in enumerate(self.operands))
        return full and fits and bool(shape) and alone == frozenset(range(len(shape)))

    def _parts(self, dim: int) -> tuple[_Pick, ...]:
        n = self.results[0].shape[dim]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3 + dim))
        return tuple(_Pick(dim, n, part) for part in (order[: (n + 1) // 2], order[(n + 1) // 2 :]) if n > 1)

    def _is_apart(self, dim: int) -> bool:
        for pick in self._parts(dim):
            try:
                results = self.both.forward(*map(pick, self.operands))
            except Exception:  # it wants the sizes that it was given
                return False
            if not all(pick.takes(r) for r in self.results) or not _all_same(results, [pick(r) for r in self.results]):
                return False
        return True

    def _is_alone(self, dim: int, shared: frozenset[int]) -> bool:
        whole, sums = self.backward(self.gradient), dict[int, Tensor]()
        for pick in self._parts(dim):
            try:
                found = self.backward([pick(g) for g in self.gradient], [pick(x) for x in self.operands])
            except Exception:  # as above
                return False
            for i, gradient in found.items():
                if pick.takes(self.operands[i]) or i in shared:
                    if not _same(gradient, pick(whole[i]) if pick.takes(self.operands[i]) else whole[i]):
                        return False
                else:
                    sums[i] = sums[i] + gradient if i in sums else gradient
        return _all_close(sums, {i: whole[i] for i in sums})


@dataclass(frozen=True)
class _Pick:
    """A part of what has `n` elements along `dim`."""

    dim: int
    n: int
    part: Tensor

    def takes(self, x: Tensor) -> bool:
        return x.dim() > self.dim and x.shape[self.dim] == self.n

    def __call__(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.part) if self.takes(x) else x


def _times(gradient: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [g * factor if g.is_floating_point() else g for g in gradient]


def _plus(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _all_close(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> bool:
    return all(_same(found[i], value) for i, value in wanted.items())


def _all_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(_same(a, b) for a, b in zip(found, wanted, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree within the tolerance of their largest element; numbers that are none agree with none."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not a.numel():
        return True
    difference = float((a - b).abs().max())
    return difference <= TOLERANCE * float(b.abs().max())
