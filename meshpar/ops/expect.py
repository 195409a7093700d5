"""A value that the program was built on: `expect(value, [0], told)` does nothing while it stays what it was, and raises when it changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from meshpar.errors import BatchError


@torch.library.custom_op("meshpar::expect", mutates_args=())
def expect(value: Tensor, expected: Sequence[int], told: str) -> Tensor:
    """True, if the elements of `value` (booleans or integers) are `expected`. `told`: " at" the line that asked for them.

    Raises BatchError otherwise: the graph holds only what the forward does for `expected`.
    """
    found = [int(n) for n in value.flatten().tolist()]
    if found != list(expected):
        raise BatchError(
            f"The forward asks for a value{told}: {_shown(value, expected)} for the example that the program was made from, "
            f"{_shown(value, found)} for this batch.\n"
            "  Only the way of the example was kept. Check the batch; if it is right, make the program with an example like it, or let the "
            "model use torch.where instead of asking."
        )
    return value.new_ones((), dtype=torch.bool)


@expect.register_fake
def _(value: Tensor, expected: Sequence[int], told: str) -> Tensor:
    return value.new_empty((), dtype=torch.bool)


EXPECT = torch.ops.meshpar.expect.default
"""The operator in a graph. Nobody uses its result; passes must keep it all the same."""
has_side_effect(EXPECT)


def _shown(value: Tensor, numbers: Sequence[int]) -> str:
    plain = [bool(n) for n in numbers] if value.dtype == torch.bool else list(numbers)
    return str(plain[0] if value.dim() == 0 and plain else plain[:8])
