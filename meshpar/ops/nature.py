"""What is known of an operator's own backward: on which values of the gradient it may be run.

| its gradient                           | may enter as                    | example                                    |
|----------------------------------------|---------------------------------|--------------------------------------------|
| linear                                 | whole, a part, a pending sum    | straight-through, scaling, reversal        |
| not, but element by element            | whole, or a part of each dim    | clipping each element                      |
| neither                                | whole                           | clipping by the norm                       |
| a constant, for some operands (shared) | those operands stay the same on every rank  | a loss that is added: backward returns (g, 1) |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Nature:
    """What was proved of a backward, on drawn values. Nothing proved: whole values only."""

    linear: bool = False
    """Whether the gradients of the operands that are not `shared` are linear in the gradient: then those of pending sums add up."""
    elementwise: bool = False
    """Whether forward and backward treat every element by itself, however many there are. Operands of one element are the same for all."""
    shared: tuple[int, ...] = ()
    """The operands whose gradient does not depend on the gradient that comes in: terms that backward adds to the loss."""
    adding: tuple[int, ...] = ()
    """Those of them whose gradient is more than zero."""
    alone: tuple[int, ...] = ()
    """The dims whose indices are independent of each other: what a part of them gives is that part of the whole."""
    apart: tuple[int, ...] = ()
    """The dims of which this is so in forward, whatever backward does."""
    ran: bool = True
    """Whether it could be run on drawn values at all."""


UNPROVED = Nature(ran=False)
