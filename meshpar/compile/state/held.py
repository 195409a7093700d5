"""For what a program holds: the state of Python and of torch that it was captured with, looked at before every step.

Numbers that are inputs of a program are read here, and what its forward leaves behind is written here, once per step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from meshpar.capture.fake import keep_registered
from meshpar.capture.state.ambient import TORCH
from meshpar.capture.state.numbers import compute, holds
from meshpar.capture.state.places import Place, copied, described, same
from meshpar.capture.state.taken import State
from meshpar.compile.state.bound import Bound


class Held:
    """One program's state on one model (a copy of a parallel model has its own)."""

    def __init__(self, state: State, model: nn.Module, device: str) -> None:
        self.state = state
        self.roots: Mapping[str, Any] = {**state.roots, "": model, "torch": TORCH}
        self._bound = Bound(state.read, state.tensors, self.roots)
        self._device = device
        self._values: dict[Place, Any] = {}
        self._inputs: tuple[tuple[Any, torch.Tensor], ...] = ()

    def holds(self) -> bool:
        """Whether the program is right for what there is now."""
        if not self._bound.holds():
            return False
        if not self.state.numbers:
            return True
        self._values = {place: place.value(self.roots) for place in self.state.numbers}
        return all(type(self._values[place]) is kind for place, kind in self.state.numbers.items()) and holds(
            self.state.asked, self._values
        )

    def changed(self) -> list[Place]:
        """What is not as it was."""
        now = {place: place.value(self.roots) for place in self.state.numbers}
        other = [place for place, kind in self.state.numbers.items() if type(now[place]) is not kind]
        if not other and not holds(self.state.asked, now):
            other = list(self.state.numbers)
        return self._bound.changed() + other

    def inputs(self) -> list[torch.Tensor]:
        """The numbers that the program takes, as tensors of no dim."""
        found = []
        for i, formula in enumerate(self.state.inputs.values()):
            value = compute(formula, self._values)
            if i >= len(self._inputs) or not same(self._inputs[i][0], value):
                dtype = torch.int64 if isinstance(value, int) else torch.float64
                found.append((value, torch.tensor(value, dtype=dtype, device=self._device)))
            else:
                found.append(self._inputs[i])
        self._inputs = tuple(found)
        return [tensor for _, tensor in found]

    def leave(self) -> None:
        """Write what the forward leaves behind: after a step, once. With a mark that hooks are registered, the hooks."""
        if self.state.writes:
            made = [(place, compute(formula, self._values)) for place, formula in self.state.writes.items()]
            for place, value in made:
                place.put(self.roots, copied(value))
            keep_registered(self.roots[""])

    def numbers(self) -> Mapping[Place, Any]:
        """The numbers of this step, which ranks must have alike."""
        return self._values


def variant(state: State) -> str:
    """A fingerprint of what a program was captured with, the same on every rank that read the same."""
    texts = [f"{place}={described(value)}" for place, value in state.read.items()] + [
        f"{p}: {k.__name__}" for p, k in state.numbers.items()
    ]
    texts += [f"{formula} {described(value)}" for formula, value in state.asked.items()]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]
