"""The shapes that a call really gives: it is run on tensors without memory, once for each kind of call.

(What treats equal shapes element by element gives that shape, and is not run.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from meshpar._torch import without_modes
from meshpar.graph.operators import operator_of
from meshpar.proof.static.actions import literal
from meshpar.proof.static.moves import Shape

OperandLike = tuple[Shape, torch.dtype]


class LocalShapes:
    """Shapes of results by call, remembered."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Shape | None, ...] | str] = {}

    def __call__(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Mapping[fx.Node, OperandLike]
    ) -> tuple[Shape | None, ...] | str:
        """The shapes of the results for operands that look like this; where it does not run, why."""
        key = (target, _keyed(args, operands), _keyed(tuple(sorted(kwargs.items())), operands))
        if key not in self._known:
            like = {shape for shape, _ in operands.values()}
            by_element = len(like) == 1 and operator_of(target).kind == "elementwise"
            self._known[key] = (like.pop(),) if by_element else _run(target, args, kwargs, operands)
        return self._known[key]


def _keyed(value: Any, operands: Mapping[fx.Node, OperandLike]) -> Any:
    if isinstance(value, fx.Node):
        return operands[value]
    if isinstance(value, (list, tuple)):
        return tuple(_keyed(v, operands) for v in value)
    return type(value), literal(value)


def _run(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Mapping[fx.Node, OperandLike]
) -> tuple[Shape | None, ...] | str:
    def example(node: fx.Node) -> torch.Tensor:
        shape, dtype = operands[node]
        return torch.empty(shape, dtype=dtype, device="meta")

    with without_modes(), torch.no_grad(), nullcontext() if operands else torch.device("meta"):
        given, named = fx.map_arg((tuple(args), dict(kwargs)), example)
        if "device" in named:
            named = {**named, "device": "meta"}
        try:
            found = target(*given, **named)
        except Exception as error:  # whatever an operator raises for operands that do not fit
            return str(error).partition("\n")[0]
    results = found if isinstance(found, (list, tuple)) else (found,)
    return tuple(tuple(r.shape) if isinstance(r, torch.Tensor) else None for r in results)
