"""Numbers of parameters on ranks that hold different ones: where a user would take a part of the model for all of it.

On a pipeline, and where each rank of `ep` has whole experts, a loop over `pm.parameters()` sees the parameters of this rank alone: a norm,
a maximum, "are all gradients finite" come out different on every rank, and ranks that act on them drift apart. So what is computed from
such parameters remembers which, and a number is refused: outside of an optimizer's step always, inside it (where norms of single parameters
are what LARS, LAMB or Adafactor need) as soon as it is made of several parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from meshpar.errors import ConfigError
from meshpar.runtime.parameters.specs import ParameterSpec

_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""The code around the `step` of every torch optimizer, also of those that users write."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Which parameters a tensor was computed from, and the layout of the parameter if it is one."""

    names: frozenset[str]
    spec: ParameterSpec | None
    apart: bool
    """Whether other ranks hold parameters that this one has not."""

    def laid_out(self, like: Origin) -> Origin:
        """The same, laid out as something else is."""
        return self if self.spec is like.spec else replace(self, spec=like.spec)

    def __str__(self) -> str:
        first, *rest = sorted(self.names) or ["a parameter"]
        return f"{first} and {len(rest)} more" if rest else first

    def __deepcopy__(self, memo: object) -> Origin:
        return self


def joined(origins: Sequence[Origin]) -> Origin:
    """Where something computed from several tensors comes from."""
    first = origins[0]
    if all(origin is first or origin.names == first.names for origin in origins):
        return first
    names = frozenset[str]().union(*(origin.names for origin in origins))
    return Origin(names, first.spec, any(origin.apart for origin in origins))


def inside_step() -> bool:
    """Whether this code is called by the `step` of an optimizer."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def refuse_number(operator: str, origin: Origin) -> NoReturn:
    """Raise ConfigError for a number of this rank's parameters."""
    raise ConfigError(
        f"{operator} of {origin}: this rank holds the parameters and gradients of its own stages (and experts) alone, so a number made of "
        f"them is not the model's, and differs from rank to rank. Call mp.clip_grad_norm_(pm.parameters(), max_norm) to clip, "
        f"mp.grad_norm(pm.parameters()) for the norm (norm_type=math.inf: the largest; it is finite if all gradients are), mp.GradScaler "
        f"for fp16. For one parameter: mp.full_grad(p) and mp.full_tensor(p) are plain tensors. Inside the step of a torch.optim.Optimizer "
        f"norms of single parameters are allowed."
    )


def refuse_scaler(origin: Origin) -> NoReturn:
    """Raise ConfigError for torch's GradScaler."""
    raise ConfigError(
        f"torch's GradScaler divides the gradient of {origin} by a scale that pm.train_step did not multiply it by, and each rank would "
        f"decide alone whether to skip a step. Use scaler = mp.GradScaler(), which has the same methods: "
        f"scaler.scale(pm).train_step(**batch), scaler.unscale_(optimizer), scaler.step(optimizer), scaler.update()."
    )


class NumberApart(float):
    """A number of one parameter: reckoning with that of another one, which other ranks may hold, is refused."""

    origin: Origin

    def __new__(cls, value: float, origin: Origin) -> NumberApart:
        number = super().__new__(cls, value)
        number.origin = origin
        return number


def _watched(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def method(self: NumberApart, *others: Any) -> Any:
        for other in others:
            if isinstance(other, NumberApart) and other.origin.names != self.origin.names:
                refuse_number(name.strip("_"), joined([self.origin, other.origin]))
        result = plain(self, *others)
        return NumberApart(result, self.origin) if type(result) is float else result

    return method


for _name in "add radd sub rsub mul rmul truediv rtruediv pow rpow neg abs lt le gt ge eq ne".split():
    setattr(NumberApart, f"__{_name}__", _watched(f"__{_name}__"))
NumberApart.__hash__ = float.__hash__  # type: ignore[method-assign]
