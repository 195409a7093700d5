"""What a forward changes past the model: classes, globals, closures, attributes of functions, and what hangs from them.

    with Outside(model, loss_fn).kept() as outside:
        output = model(batch)
        outside.changed(known)                      ["Net.total", "STEP of train.py", "COUNTS of train.py"]

A picture of all that the code of the model can reach is taken before, and compared after: a method is reached if its name stands in code
that is reached, a global too. Nothing is run. Code of torch, of Python itself and of this package is not looked into. Afterwards all is as
it was, but for iterators and generators of random numbers, which cannot be put back.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any

from torch import Tensor, nn

from meshpar.capture.copies import Missing
from meshpar.capture.state.places import ABSENT, PLAIN, picture, same
from meshpar.capture.state.reads import INNER, identity
from meshpar.capture.state.surroundings import codes, is_closed

Known = Callable[[Any, Any], bool]
"""Whether a change of `owner` at `key` (ABSENT: of what a container holds) is accounted for elsewhere."""

_WRAPPED = ("__wrapped__", "__func__", "__self__", "fget", "func", "args", "keywords")
"""Where methods, properties, partial and decorated functions keep what they call, and with what."""
_BY_NAME = frozenset({"getattr", "setattr", "globals", "vars", "__dict__", "attrgetter", "methodcaller"})
"""Where these stand, texts may be names."""
_MAX_ITEMS = 4096
"""Items of one container that are gone through."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """One object as it was: its entries by name, or a copy of a container."""

    label: str
    owner: Any
    before: Any


class Outside:
    """The picture of what is reached from `model` and `loss_fn`."""

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        self._own = {identity(module) for module in model.modules()}
        self._packages = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
        self._seen: set[int] = set()
        self._classes: dict[type, None] = {}
        self._alive: list[Any] = []
        self._names: set[str] = set()
        self._pending: dict[str, list[Callable[[], None]]] = {}
        self._todo: list[tuple[Any, str]] = [(module, type(module).__qualname__) for module in model.modules()]
        self._kept: list[_Kept] = []
        self._containers: list[_Kept] = []
        self._drawn: list[tuple[str, Any, Any]] = []
        self._pictured: list[_Kept] = []
        self._todo.append((loss_fn, "loss_fn"))
        self._name("forward")
        while self._todo:
            self._reach(*self._todo.pop())

    @contextmanager
    def kept(self) -> Iterator[Outside]:
        """Inside, a forward may change what it likes; afterwards all is as it was."""
        try:
            yield self
        finally:
            self._restore()

    def changed(self, known: Known) -> list[tuple[str, Any, Any]]:
        """What is not as it was: how one would call it, what is there now, what was."""
        found = [
            (_called(one, key), now, before)
            for one in self._kept
            for key, now, before in self._moved(one)
            if not known(one.owner, key) and not (before is ABSENT and isinstance(now, types.ModuleType))
        ]
        found += [(one.label, one.owner, one.before) for one in self._containers if _differs(one) and not known(one.owner, ABSENT)]
        found += [(label, value, None) for label, value, before in self._drawn if _position(value) != before]
        found += [(one.label, one.owner, None) for one in self._pictured if not same(one.owner, one.before)]
        return found

    def _moved(self, one: _Kept) -> Iterator[tuple[str, Any, Any]]:
        now = _entries(one.owner)
        for key in (*one.before, *(key for key in now if key not in one.before)):
            value, before = now.get(key, ABSENT), one.before.get(key, ABSENT)
            if value is not before and (type(one.owner) is not dict or key in self._names) and not _equal(value, before):
                yield key, value, before

    def _restore(self) -> None:
        for one in self._kept:
            for key, _, before in list(self._moved(one)):
                _put(one.owner, key, before)
        for one in self._containers:
            if _differs(one):
                _refill(one.owner, one.before)

    # -- what is reached ---------------------------------------------------------------------------------------------------------------

    def _reach(self, value: Any, label: str) -> None:
        key = identity(value)
        if key in self._seen or isinstance(value, (Tensor, Missing, *PLAIN)):
            return
        self._seen.add(key)
        self._alive.append(value)
        if isinstance(value, types.FunctionType):
            self._reach_function(value, label)
        elif isinstance(value, (list, tuple, dict, set, frozenset, deque)):
            self._reach_items(value, label)
        elif isinstance(value, types.ModuleType):
            if not self._closed(value.__name__):
                self._table(vars(value), value.__name__)
        elif isinstance(value, type):
            self._reach_class(value, made=True)
        elif (position := _position(value)) is not None:
            self._drawn.append((label, value, position))
        elif (held := picture(value)) is not None:
            self._pictured.append(_Kept(label, value, held))
        else:
            self._reach_object(value, label)

    def _reach_items(self, value: Any, label: str) -> None:
        if not isinstance(value, (tuple, frozenset)):
            self._containers.append(_Kept(label, value, _items(value)))
        pairs = dict.items(value) if isinstance(value, dict) else enumerate(_items(value))
        for key, item in itertools.islice(pairs, _MAX_ITEMS):
            if not isinstance(item, PLAIN):
                self._todo.append((item, f"{label}[{key!r}]" if isinstance(key, PLAIN) else label))

    def _reach_object(self, value: Any, label: str) -> None:
        for name in _WRAPPED:
            if (part := _plainly(value, name)) is not None:
                self._todo.append((part, label))
        if self._closed(type(value).__module__) and not isinstance(value, (nn.Module, types.SimpleNamespace)):
            return
        self._reach_class(type(value))
        entries = _entries(value)
        if identity(value) not in self._own:
            self._kept.append(_Kept(label, value, entries))
        for name, part in entries.items():
            self._todo.append((part, f"{label}.{name}"))
        if isinstance(value, nn.Module):
            self._todo += [(part, f"{label}.{name}") for name, part in value._modules.items()]
            self._todo += [(hook, f"a hook of {label}") for table in _hooks(value) for hook in table.values()]

    def _reach_class(self, kind: type, *, made: bool = False) -> None:
        for base in kind.__mro__:
            if self._closed(base.__module__):
                continue
            if made:
                self._todo += [(vars(base)[name], base.__qualname__) for name in ("__init__", "__new__") if name in vars(base)]
            if base not in self._classes:
                self._classes[base] = None
                self._open_class(base)

    def _open_class(self, base: type) -> None:
        self._kept.append(_Kept(base.__qualname__, base, _entries(base)))
        for name, part in list(vars(base).items()):
            called = isinstance(part, (types.FunctionType, staticmethod, classmethod, property)) or hasattr(part, "__wrapped__")
            if called and name[:2] != "__":
                self._when(name, partial(self._later, part, f"{base.__qualname__}.{name}"))
            elif name not in ("__init__", "__new__", "__dict__", "__weakref__", "__getattribute__", "__setattr__"):
                self._todo.append((part, f"{base.__qualname__}.{name}"))

    def _reach_function(self, function: types.FunctionType, label: str) -> None:
        if self._closed(function.__module__ or ""):
            self._todo.append((function.__dict__.get("__wrapped__"), label))
            return
        name = function.__qualname__
        self._kept.append(_Kept(name, function, dict(function.__dict__)))
        parts = [*function.__dict__.items(), *(function.__kwdefaults__ or {}).items()]
        self._todo += [(part, f"{key} of {name}") for key, part in parts]
        self._todo += [(part, f"a default of {name}") for part in function.__defaults__ or ()]
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._reach_cell(cell, f"{key} of {name}")
        self._table(function.__globals__, os.path.basename(function.__code__.co_filename))
        for code in codes(function.__code__):
            words = code.co_consts if _BY_NAME.intersection(code.co_names) else ()
            for word in (*code.co_names, *(word for word in words if type(word) is str and word.isidentifier())):
                self._name(word)

    def _reach_cell(self, cell: Any, label: str) -> None:
        if id(cell) in self._seen:
            return
        self._seen.add(id(cell))
        self._kept.append(_Kept(label, cell, _entries(cell)))
        self._todo += [(part, label) for part in _entries(cell).values()]

    def _table(self, table: dict[str, Any], label: str) -> None:
        """The globals of a module: those of them that reached code names."""
        if id(table) in self._seen:
            return
        self._seen.add(id(table))
        self._kept.append(_Kept(label, table, dict(table)))
        for name in list(table):
            if name[:2] != "__":
                self._when(name, partial(self._global, table, name, label))

    def _global(self, table: dict[str, Any], name: str, label: str) -> None:
        self._todo.append((table[name], f"{name} of {label}"))

    def _later(self, value: Any, label: str) -> None:
        self._todo.append((value, label))

    def _when(self, name: str, then: Callable[[], None]) -> None:
        if name in self._names:
            then()
        else:
            self._pending.setdefault(name, []).append(then)

    def _name(self, name: str) -> None:
        self._names.add(name)
        if name in self._pending:
            for then in self._pending.pop(name):
                then()

    def _closed(self, module: str) -> bool:
        """Whether code is not looked into: nor is that of installed packages, but for those that the model is from."""
        package = module.partition(".")[0]
        file = getattr(sys.modules.get(package), "__file__", None) or ""
        return is_closed(module) or ("site-packages" in file and package not in self._packages)


def _called(one: _Kept, key: str) -> str:
    if isinstance(one.owner, types.CellType):
        return one.label
    return f"{key} of {one.label}" if type(one.owner) is dict else f"{one.label}.{key}"


def _entries(owner: Any) -> dict[str, Any]:
    """What an object, a class, a function, a table of globals or a cell holds, by name."""
    if type(owner) is dict:
        return dict(owner)
    if isinstance(owner, types.CellType):
        try:
            return {"cell_contents": owner.cell_contents}
        except ValueError:  # empty yet
            return {}
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if name[:2] != "__" and name[:5] != "_abc_"}
    table = _plainly(owner, "__dict__")
    found = dict(table) if isinstance(table, dict) else {}
    for base in type(owner).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType) and not is_closed(base.__module__):
                found[name] = _plainly(owner, name, ABSENT)
    return {name: value for name, value in found.items() if name not in INNER} if isinstance(owner, nn.Module) else found


def _put(owner: Any, key: str, value: Any) -> None:
    if type(owner) is dict:
        owner.pop(key, None) if value is ABSENT else owner.__setitem__(key, value)
    elif isinstance(owner, type):
        delattr(owner, key) if value is ABSENT else setattr(owner, key, value)
    elif isinstance(owner, types.CellType):
        owner.cell_contents = value
    else:
        object.__delattr__(owner, key) if value is ABSENT else object.__setattr__(owner, key, value)


def _plainly(value: Any, name: str, otherwise: Any = None) -> Any:
    """An attribute, past what the object's own class does when it is asked."""
    try:
        return object.__getattribute__(value, name)
    except (AttributeError, TypeError):
        return otherwise


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    return (table for name, table in module.__dict__.items() if name.endswith("_hooks") and isinstance(table, dict))


def _items(container: Any) -> Any:
    """What a container holds, past what a class of the user's own does when it is asked."""
    if isinstance(container, dict):
        return dict(dict.items(container))
    return set(container) if isinstance(container, set | frozenset) else list(_base(container).__iter__(container))


def _refill(container: Any, before: Any) -> None:
    base = _base(container)
    base.clear(container)
    if isinstance(container, dict):
        for key, value in before.items():
            base.__setitem__(container, key, value)
    else:
        (base.update if isinstance(container, set) else base.extend)(container, before)


def _base(container: Any) -> Any:
    return next(kind for kind in (OrderedDict, dict, list, tuple, set, frozenset, deque) if isinstance(container, kind))


def _differs(one: _Kept) -> bool:
    """Whether a container holds other things than it did."""
    now = _items(one.owner)
    if isinstance(now, set):
        return {id(item) for item in now} != {id(item) for item in one.before} and now != one.before
    if len(now) != len(one.before):
        return True
    if isinstance(now, dict):
        return not all(a is b for a, b in zip(now, one.before, strict=True)) or not _alike(now.values(), one.before.values())
    return not _alike(now, one.before)


def _alike(now: Any, before: Any) -> bool:
    return all(a is b or _equal(a, b) for a, b in zip(now, before, strict=True))


def _equal(a: Any, b: Any) -> bool:
    """Whether two values cannot be told apart: the same object, or plain values, or lists, tuples and dicts of them, that are equal."""
    if a is b or type(a) is not type(b):
        return a is b
    if type(a) is dict:
        return len(a) == len(b) and all(key in b and _equal(value, b[key]) for key, value in a.items())
    if type(a) in (list, tuple):
        return len(a) == len(b) and _alike(a, b)
    return (isinstance(a, PLAIN) or type(a) is types.MethodType) and same(a, b)


def _position(value: Any) -> Any:
    """How far an iterator or a generator of random numbers has come; None for what is neither."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return "ended" if frame is None else (frame.f_lasti, {k: repr(v) for k, v in frame.f_locals.items() if isinstance(v, PLAIN)})
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState):
        return repr(value.bit_generator.state if isinstance(value, numpy.random.Generator) else value.get_state(legacy=False))
    if hasattr(type(value), "__next__") and is_closed(type(value).__module__) | (type(value).__module__ == "builtins"):
        return type(value).__name__, repr(value), length_hint(value, -1)
    return None
