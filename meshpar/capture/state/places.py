"""Places of Python values that a forward reads: where they are, what they hold, and when two of them are the same.

Place("", (("sub", "layers.0"), ("attr", "beta")))            model.layers.0.beta
Place("", (("sub", ""), ("attr", "config"), ("attr", "alpha")))   model.config.alpha
Place("global WEIGHT of train.py", (("item", "WEIGHT"),))     a number of the file that defines loss_fn
"""

from __future__ import annotations

import array
import contextvars
import enum
import struct
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch import nn

PlaceStep = tuple[str, Any]
"""How to go on from an object: ("sub", path of a submodule), ("attr", name), ("item", key or index), ("cell", "cell_contents"),
("call", what is asked)."""


class _Absent:
    def __repr__(self) -> str:
        return "nothing"

    def __deepcopy__(self, memo: object) -> _Absent:
        return self

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""What is at a place where there is nothing."""


class _Any:
    def __repr__(self) -> str:
        return "a number"


ANY = _Any()
"""In place of a number in a container: it may be any."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place of a value: a root and the way from there. The root "" is the model; others are objects that are not copied with it."""

    root: str
    steps: tuple[PlaceStep, ...]

    def then(self, kind: str, key: Any) -> Place:
        """The place one step further."""
        return Place(self.root, (*self.steps, (kind, key)))

    def __str__(self) -> str:
        """As one would type it: "layers.0.beta", "config.alpha", "WEIGHT of train.py"."""
        text = ""
        for kind, key in self.steps:
            if kind == "item" and text:
                text += f"[{key!r}]"
            elif kind != "cell" and key != "":
                text += ("." if text else "") + str(key)
        return f"{text} of {self.root}" if self.root and text else text or self.root

    def owner(self, roots: Mapping[str, Any]) -> Any:
        """The object that holds the value."""
        found = roots[self.root]
        for step in self.steps[:-1]:
            found = _take(found, step)
        return found

    def value(self, roots: Mapping[str, Any]) -> Any:
        """What is there now; ABSENT where the way ends before."""
        try:
            return _take(self.owner(roots), self.steps[-1])
        except (AttributeError, KeyError, IndexError, ValueError, TypeError):
            return ABSENT

    def put(self, roots: Mapping[str, Any], value: Any) -> None:
        """Make `value` what is there."""
        owner, (kind, key) = self.owner(roots), self.steps[-1]
        if kind == "item" and value is ABSENT:
            owner.pop(key, None)
        elif kind == "item":
            owner[key] = value
        elif kind == "cell":
            owner.cell_contents = value
        elif isinstance(getattr(owner, "__dict__", None), dict):
            owner.__dict__.pop(key, None) if value is ABSENT else owner.__dict__.__setitem__(key, value)
        elif isinstance(owner, type):
            kinds: tuple[type, ...] = (*owner.__mro__, *type.mro(type(owner)))
            holder = next((base for base in kinds if key in vars(base)), owner)
            delattr(holder, key) if value is ABSENT else setattr(holder, key, value)
        elif value is ABSENT:
            object.__delattr__(owner, key)
        else:
            object.__setattr__(owner, key, value)  # (frozen or not)


def _take(owner: Any, step: PlaceStep) -> Any:
    kind, key = step
    if kind == "sub":
        return owner.get_submodule(key)
    if kind == "item":
        return owner[key]
    if kind == "call":
        return owner.calls[key]()
    if kind == "cell":
        return owner.cell_contents
    table = getattr(owner, "__dict__", None)
    if isinstance(table, dict) and key in table:
        return table[key]
    if isinstance(owner, nn.Module):  # what is registered there is none of ours
        return _of_class(type(owner), key)
    return getattr(owner, key, ABSENT)


def _of_class(kind: type, name: str) -> Any:
    """A value that a class holds for its instances; methods and properties are none."""
    static = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), ABSENT)
    return ABSENT if isinstance(static, types.FunctionType | classmethod | staticmethod | property) else static


PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    enum.Enum,
    type(ABSENT),
)
"""What never changes: compared by value."""
CONTAINERS = (list, tuple, dict, set, frozenset, OrderedDict, defaultdict, deque, types.SimpleNamespace)
"""What is compared by what it holds."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What an object of one of `PICTURED` held at some moment."""

    kind: type
    content: Any


def _elements(value: Any) -> Any:
    return value.shape, str(value.dtype), repr(value.tolist()) if value.dtype.hasobject else value.tobytes()


def _content(base: Any, value: Any) -> Any:
    """What one of a class that is made from a container holds, past what that class does when it is asked: items, and attributes."""
    return copied(base(base.items(value) if base is dict else base.__iter__(value))), copied(dict(getattr(value, "__dict__", {})))


PICTURED: dict[type, Callable[[Any], Any]] = {
    numpy.ndarray: _elements,
    array.array: lambda value: (value.typecode, value.tobytes()),
    bytearray: bytes,
    contextvars.ContextVar: lambda value: copied(value.get(ABSENT)),
    threading.local: lambda value: copied(vars(value)),
    torch.optim.Optimizer: lambda value: [{k: copied(x) for k, x in group.items() if k != "params"} for group in value.param_groups],
    torch.optim.lr_scheduler.LRScheduler: lambda value: {k: copied(x) for k, x in vars(value).items() if isinstance(x, (*PLAIN, list))},
    **{base: partial(_content, base) for base in (dict, list, tuple, set, frozenset, deque)},
}
"""Objects that hold values where no attribute shows them -> how to read these. The last are for classes made from containers."""


def picture(value: Any) -> Picture | None:
    """What a value holds now, if it is such an object."""
    if isinstance(value, Picture):
        return value
    if type(value) in CONTAINERS or isinstance(value, PLAIN):
        return None
    kind = next((kind for kind in PICTURED if isinstance(value, kind)), None)
    return None if kind is None else Picture(type(value), PICTURED[kind](value))


FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def same(a: Any, b: Any) -> bool:
    """Whether two values are one to a forward: of one type and equal; 1, 1.0 and True are three values, 0.0 and -0.0 are two, nan is one.

    >>> same(1, True), same(0.0, -0.0), same(float("nan"), float("nan")), same([1, {"a": 2}], [1, {"a": 2}])
    (False, False, True, True)

    `b` may hold ANY.
    """
    if b is ANY:
        return True
    if isinstance(b, Picture):
        now = picture(a)
        return now is not None and now.kind is b.kind and same(now.content, b.content)
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if type(a) in CONTAINERS:
        return _same_items(a, b)
    if isinstance(a, PLAIN):
        return bool(a == b)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__
    if isinstance(a, partial):
        return a.func is b.func and same(a.args, b.args) and same(a.keywords, b.keywords)
    return not isinstance(a, (*FUNCTIONS, torch.Tensor))  # an object is what its attributes are, which are compared one by one


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, types.SimpleNamespace):
        return _same_items(vars(a), vars(b))
    if len(a) != len(b):
        return False
    if isinstance(a, set | frozenset):
        return bool(a == b) and sorted(map(_named, a)) == sorted(map(_named, b))
    if isinstance(a, dict):
        return all(same(x, y) for x, y in zip(a, b, strict=True)) and all(same(a[key], b[key]) for key in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def _named(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def described(value: Any) -> str:
    """A text that is the same exactly where values are, on every rank; for objects, only their type."""
    if (held := picture(value)) is not None:
        return f"{held.kind.__qualname__} {described(held.content)}"
    if isinstance(value, float):
        return f"float {value.hex()}"
    if type(value) in CONTAINERS:
        if isinstance(value, types.SimpleNamespace):
            value = vars(value)
        if isinstance(value, dict):
            return f"dict {[(described(k), described(v)) for k, v in value.items()]}"
        items = [described(item) for item in value]
        return f"{type(value).__name__} {sorted(items) if isinstance(value, set | frozenset) else items}"
    if isinstance(value, PLAIN):
        return _named(value)
    if isinstance(value, FUNCTIONS):
        return f"{type(value).__name__} {getattr(value, '__qualname__', '')}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def copied(value: Any) -> Any:
    """What a value holds now, kept apart: containers are copied, of some objects a picture is taken, all else is as it is."""
    if type(value) not in CONTAINERS:
        return picture(value) or value
    if isinstance(value, types.SimpleNamespace):
        return types.SimpleNamespace(**{key: copied(item) for key, item in vars(value).items()})
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {key: copied(item) for key, item in value.items()})
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if isinstance(value, deque):
        return deque((copied(item) for item in value), value.maxlen)
    return type(value)(copied(item) for item in value)


def masked(value: Any, hides: Callable[[Any], bool]) -> Any:
    """A container (that nobody else has) with ANY for the items that `hides` says."""
    items = vars(value) if isinstance(value, types.SimpleNamespace) else value
    if isinstance(items, dict | list | deque):
        for key, item in list(items.items() if isinstance(items, dict) else enumerate(items)):
            items[key] = ANY if hides(item) else masked(item, hides)
        return value
    if type(value) is tuple:
        return tuple(ANY if hides(item) else masked(item, hides) for item in value)
    return value


def refilled(container: Any, before: Any) -> None:
    """Give a container the items back that it had."""
    if isinstance(container, types.SimpleNamespace):
        vars(container).clear()
        vars(container).update(vars(before))
    elif isinstance(container, dict | set):
        container.clear()
        container.update(before)
    elif isinstance(container, list | deque):
        container.clear()
        container.extend(before)
