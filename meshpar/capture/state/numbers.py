"""Numbers of Python that may change from step to step: a forward is captured with them as inputs.

A `ReadNumber` stands for an attribute, or for what the forward's arithmetic makes of some. Where it meets a tensor, it becomes an input of
the graph (a tensor of no dim, in float64 or int64, which is cast to what torch would compute in); where Python needs its value (a branch,
a size, `math.exp`), it tells the value of the example, and the program holds only while it stays the same.

    self.step += 1                                      self.step  ->  step + 1               after every step
    if self.step > 2:                                   holds while (step > 2) is False
    loss * (0.1 * self.step)                            mul(loss, number_0),                  number_0 = 0.1 * step
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from meshpar.capture.state.places import Place, same

Formula = tuple[Any, ...]
"""("place", Place), ("value", number) or (function, formula, ...)."""


def compute(formula: Formula, values: Mapping[Place, Any]) -> Any:
    """The value of a formula, as Python computes it."""
    head, *rest = formula
    if head == "place":
        return values[rest[0]]
    if head == "value":
        return rest[0]
    return head(*(compute(part, values) for part in rest))


@dataclass
class Numbers:
    """The numbers of one capture: `values` of the example; `inputs` and `asked` grow while the forward runs."""

    values: Mapping[Place, Any]
    slots: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
    """Spare inputs for floats and for ints."""
    inputs: dict[Formula, Tensor] = field(default_factory=dict)
    used: list[tuple[int, int]] = field(default_factory=list)
    """Which slot each of `inputs` is: (0 for floats or 1 for ints, its place there)."""
    asked: dict[Formula, Any] = field(default_factory=dict)
    """What the forward asked for in Python, and was told."""

    def of(self, place: Place) -> ReadNumber:
        """The number at a place."""
        return ReadNumber(self, ("place", place), self.values[place])

    def told(self, number: ReadNumber) -> Any:
        """The value of a number, which must be the same wherever the program runs."""
        self.asked.setdefault(number.formula, number.value)
        return number.value

    def tensor(self, number: ReadNumber) -> Tensor:
        """A number as an input of the graph. Raises TooMany where there are no more."""
        if number.formula not in self.inputs:
            kind = int(isinstance(number.value, int))
            index = sum(1 for other, _ in self.used if other == kind)
            if index >= len(self.slots[kind]):
                raise TooMany
            self.used.append((kind, index))
            self.inputs[number.formula] = self.slots[kind][index]
        return self.inputs[number.formula]


SLOTS = 16
"""How many numbers of one type a graph may take."""


class TooMany(Exception):
    """More numbers than a graph takes."""


class ReadNumber:
    """A number whose value may change. Arithmetic makes another one; comparisons and conversions tell the value."""

    __slots__ = ("formula", "numbers", "value")

    def __init__(self, numbers: Numbers, formula: Formula, value: Any) -> None:
        self.numbers, self.formula, self.value = numbers, formula, value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance(number, float) is what the forward would have seen
        return type(self.value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _met(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.numbers.told(self), name)

    def __hash__(self) -> int:
        return hash(self.numbers.told(self))

    def __repr__(self) -> str:
        return repr(self.numbers.told(self))

    def __format__(self, spec: str) -> str:
        return format(self.numbers.told(self), spec)

    def __reduce__(self) -> Any:
        return type(self.value), (self.numbers.told(self),)


def _arithmetic(function: Callable[..., Any], *, swapped: bool = False) -> Any:
    def method(self: ReadNumber, other: Any = None) -> Any:
        if other is None:
            return ReadNumber(self.numbers, (function, self.formula), function(self.value))
        if type(other) is not ReadNumber and type(other) not in (int, float, bool):
            return NotImplemented
        theirs = (other.formula, other.value) if type(other) is ReadNumber else (("value", other), other)
        (a, x), (b, y) = (theirs, (self.formula, self.value)) if swapped else ((self.formula, self.value), theirs)
        found = function(x, y)
        made = ReadNumber(self.numbers, (function, a, b), found)
        return made if type(found) in (int, float) else self.numbers.told(made)

    return method


def _told(function: Callable[..., Any]) -> Any:
    def method(self: ReadNumber, *others: Any) -> Any:
        others = tuple(other.numbers.told(other) if type(other) is ReadNumber else other for other in others)
        return function(self.numbers.told(self), *others)

    return method


def _compared(function: Callable[..., Any]) -> Any:
    def method(self: ReadNumber, other: Any) -> Any:
        if type(other) is not ReadNumber and type(other) not in (int, float, bool):
            return NotImplemented if isinstance(other, Tensor) else function(self.numbers.told(self), other)
        theirs = (other.formula, other.value) if type(other) is ReadNumber else (("value", other), other)
        return self.numbers.told(ReadNumber(self.numbers, (function, self.formula, theirs[0]), function(self.value, theirs[1])))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(ReadNumber, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(ReadNumber, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))
for _name in ("neg", "pos", "abs"):
    setattr(ReadNumber, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ReadNumber, f"__{_name}__", _compared(getattr(operator, _name)))
_CONVERSIONS: Mapping[str, Callable[..., Any]] = {
    **{"float": float, "int": int, "index": operator.index, "complex": complex, "round": round},
    **{"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "divmod": divmod},
}
for _name, _function in _CONVERSIONS.items():
    setattr(ReadNumber, f"__{_name}__", _told(_function))
ReadNumber.__bool__ = lambda self: self.numbers.told(ReadNumber(self.numbers, (bool, self.formula), bool(self.value)))  # type: ignore[attr-defined]


def is_number(value: Any) -> bool:
    """Whether a value is a `ReadNumber`, which takes the class of what it stands for."""
    return type(value) is ReadNumber


OF_MATH = (
    "acos",
    "asin",
    "atan",
    "atan2",
    "cos",
    "cosh",
    "erf",
    "exp",
    "expm1",
    "hypot",
    "log",
    "log10",
    "log1p",
    "log2",
    "pow",
    "sin",
) + (
    "sinh",
    "sqrt",
    "tan",
    "tanh",
)
"""Functions of numbers that give a float."""


def on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `math` that makes a number of numbers."""

    def call(*args: Any) -> Any:
        numbers = [arg for arg in args if type(arg) is ReadNumber]
        if not numbers:
            return function(*args)
        formulas = (arg.formula if type(arg) is ReadNumber else ("value", arg) for arg in args)
        return ReadNumber(numbers[0].numbers, (function, *formulas), function(*(a.value if type(a) is ReadNumber else a for a in args)))

    return call


class Meeting(TorchFunctionMode):
    """Where numbers meet torch: arithmetic with tensors takes them as inputs, all else is told their values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _met(func, args, kwargs or {})


def _met(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not any(_holds(arg) for arg in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    if len(args) == 2 and not kwargs:
        tensor, number = args if isinstance(args[0], Tensor) else reversed(args)
        if isinstance(tensor, Tensor) and type(number) is ReadNumber:
            if func in _SUBTRACTED_FROM:
                return _with_tensor(torch.sub, (number, tensor), tensor, number)
            if func in _DIVIDING:  # as torch does it
                inverse = tensor.reciprocal()
                return _with_tensor(torch.mul, (inverse, number), inverse, number)
            if func in _EXACT:
                return _with_tensor(func, args, tensor, number)
    return func(*(_plain(arg) for arg in args), **{name: _plain(arg) for name, arg in kwargs.items()})


def _with_tensor(func: Any, args: tuple[Any, ...], tensor: Tensor, number: ReadNumber) -> Tensor:
    """`func` of a tensor and a number, in the types in which torch computes it with a number of Python."""
    given = number.numbers.tensor(number)
    dtype = torch.result_type(tensor, number.value)
    if dtype not in _ROUNDED:
        given = given.to(dtype)
    elif tensor.dtype == dtype and tensor.dim() == 0:  # two tensors of no dim would give a float64
        row = tensor.reshape(1)
        made = func(*(given if part is number else row for part in args)).reshape(())
        return tensor.copy_(made) if func in _IN_PLACE else made
    return func(*(given if part is number else tensor for part in args))


_ROUNDED = (torch.float16, torch.bfloat16)
"""Types in which torch rounds a number later than its operands: it is left in float64."""


def _holds(value: Any) -> bool:
    return type(value) is ReadNumber or (type(value) in (tuple, list) and any(_holds(item) for item in value))


def _plain(value: Any) -> Any:
    if type(value) is ReadNumber:
        return value.numbers.told(value)
    return type(value)(_plain(item) for item in value) if type(value) in (tuple, list) else value


_OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "add": ("add", "add_", "__add__", "__radd__", "__iadd__"),
    "sub": ("sub", "sub_", "subtract", "__sub__", "__isub__"),
    "mul": ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"),
    "div": ("div", "div_", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__", "__idiv__"),
}
_SUBTRACTED_FROM = frozenset({Tensor.__rsub__, torch.rsub})
_DIVIDING = frozenset({Tensor.__rdiv__, Tensor.__rtruediv__})


def _exact() -> dict[Any, Any]:
    """Functions of two operands that compute with a tensor of no dim what they compute with a number -> the one not in place."""
    found: dict[Any, Any] = {}
    for plain, names in _OPERATIONS.items():
        for name in names:
            for holder in (torch, Tensor):
                if hasattr(holder, name):
                    found[getattr(holder, name)] = getattr(torch, plain)
    return found


_EXACT = _exact()
_IN_PLACE = frozenset(
    f for f in _EXACT if (n := getattr(f, "__name__", "")).endswith("_") and (not n.startswith("__") or n.startswith("__i"))
)


def holds(asked: Mapping[Formula, Any], values: Mapping[Place, Any]) -> bool:
    """Whether the forward would be told the same of these values."""
    try:
        return all(same(compute(formula, values), told) for formula, told in asked.items())
    except (ArithmeticError, ValueError, TypeError):  # Python could not compute it: another program has to say so
        return False
