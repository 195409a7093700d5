"""How many rows every expert gets: noted where rows are dispatched, read when somebody asks.

A `Tally` belongs to one microbatch and travels as an argument, so that a block that is computed again in backward notes the same once more
and nothing is counted twice. What is noted are the ends of the experts' rows, which are there anyway: it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshpar.ops import experts


@dataclass
class Tally:
    """Of one microbatch: name of an experts module -> where each expert's rows end, [E], and the axes on which its rows are cut."""

    ends: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class TallySlot:
    """The place of one module in a tally."""

    tally: Tally
    name: str
    axes: tuple[str, ...]


def slot(tally: Tally, name: str, axes: tuple[str, ...]) -> TallySlot:
    """The place of `name` in `tally`. `axes`: those whose ranks dispatch rows of their own."""
    return TallySlot(tally, name, axes)


def dispatch(h: Tensor, index: Tensor, num_experts: int, at: TallySlot, dropping: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`meshpar.ops.experts.dispatch`, noting the load of every expert."""
    x, ends, perm = experts.dispatch(h, index, num_experts, dropping)
    note(at, ends)
    return x, ends, perm


def note(at: TallySlot, ends: Tensor) -> None:
    """Keep where each expert's rows end, [E]."""
    at.tally.ends[at.name], at.tally.axes[at.name] = ends, at.axes


def rows(ends: Tensor) -> Tensor:
    """The number of each expert's rows, [E] (int64)."""
    return torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
