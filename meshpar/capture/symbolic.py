"""A forward on sizes that are symbols: its numbers as formulas of the sizes of a batch, and what it asked of them.

    formulas = follow(model, (), batch, ...)
    formulas.numbers((6, 23))        every number that it computes with for 6 samples of 23 positions; None where it would do something else

The forward runs once, on tensors without memory (torch's `ShapeEnv`). Where Python branches on a size, that is a condition; where it wants
a plain number (`range`, `math.sqrt`), the condition is that this size stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import (
    SizeSymbols,
    TorchDispatchMode,
    as_if_exporting,
    at_sizes,
    checkpoints_only_call,
    enable_python_dispatcher,
    expression,
    pytree,
)
from meshpar.capture import decompositions, fake
from meshpar.capture.batch import ReadBatch
from meshpar.capture.experts import seam as experts
from meshpar.capture.recorder import ForwardRecorder
from meshpar.capture.state import taken as state
from meshpar.capture.state.places import described
from meshpar.capture.witness import AsksNothing, OnDevice, Unseen
from meshpar.graph.captured import Captured

BatchSizes = tuple[tuple[int, ...], ...]
"""The shape of every tensor of a batch."""


@dataclass(frozen=True)
class Formulas:
    """What a forward computes with, and under which conditions, as expressions of sympy in `symbols`."""

    symbols: tuple[Any, ...]
    computed: tuple[Any, ...]
    asked: tuple[Any, ...]

    def numbers(self, sizes: Sequence[int]) -> list[int | float | None] | None:
        """The value of each of `computed` at these sizes (None of one that has none); None where a condition does not hold."""
        if min(sizes, default=2) < 2 or not all(at_sizes(self.asked, self.symbols, sizes)):
            return None
        return [*at_sizes(self.computed, self.symbols, sizes)]


def sizes_of(batch: ReadBatch) -> BatchSizes:
    """The shape of every tensor of a batch as it is captured."""
    return tuple(shape or tuple(tensor.shape) for tensor, shape in zip(batch.tensors, batch.shapes, strict=True))


def follow(
    model: nn.Module,
    batch: ReadBatch,
    symbol_of: Sequence[Sequence[int | None]],
    hints: Sequence[int],
    like: Captured,
    *,
    device: torch.device,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    dtype: torch.dtype | None,
    ask: state.Ask,
    **_: Any,
) -> Formulas:
    """The formulas of the forward of `model`. `symbol_of`: which symbol each size of each tensor of `batch` is, None for a plain number.

    `hints`: what the symbols are in this batch; `like`: the capture of another one. Raises Unseen where the forward does not run on
    symbols, or returns or leaves behind what depends on them.
    """
    symbols, numbers = SizeSymbols(hints), _SeenNumbers()
    shapes = [
        tuple(n if at is None else symbols.sizes[at] for n, at in zip(shape, which, strict=True))
        for shape, which in zip(sizes_of(batch), symbol_of, strict=True)
    ]
    inputs = [
        fake.fake_of(tensor, device, symbols.mode, shape=shape, dtype=dtype)  # type: ignore[arg-type]
        for tensor, shape in zip(batch.tensors, shapes, strict=True)
    ]

    def stand_in(tensor: Tensor) -> Tensor:
        return fake.fake_of(tensor, device, symbols.mode, dtype=dtype if isinstance(tensor, nn.Parameter) else None)

    try:
        with (
            state.without_autocast(),
            fake.replaced(model, stand_in),
            experts.seam(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            as_if_exporting(),
            decompositions.Written(),
            checkpoints_only_call(),
            enable_python_dispatcher(),
            OnDevice(device),
            symbols.mode,
            numbers,
        ):
            recording = state.Recording(ask)
            recorder = ForwardRecorder(model, batch, loss_fn, recording)
            recorder.functions = AsksNothing()  # type: ignore[assignment]
            recorder(*inputs)
    except Exception as error:  # whatever it is: the forward is watched for every shape instead, and its capture tells what is wrong
        raise Unseen(f"it does not run on sizes that are symbols: {str(error).strip().partition(chr(10))[0][:200]}") from error
    assert recording.found is not None
    returned = pytree.tree_leaves(list(recorder.outcome.leaves))
    if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in returned):
        raise Unseen("a number that the forward returns depends on sizes")
    if _left(recording.found) != _left(like.state):
        raise Unseen("what the forward leaves behind depends on sizes")
    asked, known = symbols.asked(), set(symbols.symbols)
    if any(one.free_symbols - known for one in (*asked, *numbers.found)):
        raise Unseen("a size depends on values")
    return Formulas(tuple(symbols.symbols), tuple(dict.fromkeys((*symbols.symbols, *numbers.found))), tuple(asked))


def _left(found: state.State) -> dict[str, str]:
    """What a forward leaves behind, by place. (What depends on a symbol is no plain value, and not there.)"""
    return {str(place): described(formula) for place, formula in found.writes.items()}


class _SeenNumbers(TorchDispatchMode):
    """Every number that is computed of symbols, as it is given to an operator, or is a size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            for number in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
                if isinstance(number, torch.SymInt | torch.SymFloat) and (found := expression(number)).free_symbols:
                    self.found[found] = None
        return result
