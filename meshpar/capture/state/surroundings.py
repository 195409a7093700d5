"""What functions read beside their arguments: what module globals, closures, classes and defaults of arguments hold, functions included.

Found in their code, without running it: what a name leads to is read where a line of the function, or of a function that it calls by name,
reads it. Code of torch, of Python itself and of this package is not looked into.

    WEIGHT, ACT = 0.5, torch.tanh
    loss_fn = lambda output, batch: ACT(output).mean() * WEIGHT + w     ->    ACT of train.py;  WEIGHT of train.py;  w of loss_fn
"""

from __future__ import annotations

import dis
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from meshpar.capture.state.places import ABSENT, CONTAINERS, PICTURED, PLAIN, Place

Note = Callable[[Place, Any], None]
"""What is told of every value that is read."""

_CLOSED = frozenset({"torch", "meshpar", "numpy", "einops"}) | sys.stdlib_module_names
_UNSEEN = frozenset({"__getattribute__", "getattr_static"})
"""Ways to read an attribute past the class of an object."""
_CACHED = type(lru_cache(lambda: None))
_CLOCKS = frozenset({"time", "datetime", "uuid", "secrets"})
"""Modules whose functions give another value at every call."""


class Surroundings:
    """Walks functions; `note(place, value)` is told what they read, `roots` where places begin, `clocks` what is never the same twice."""

    def __init__(self, note: Note, roots: dict[str, Any]) -> None:
        self._note, self._roots = note, roots
        self._seen: set[tuple[types.CodeType, type | None, int]] = set()
        self.clocks: dict[str, None] = {}
        self.unseen = False
        """Whether attributes are read where nobody can watch it."""

    def walk(self, value: Any, place: Place | None = None, *, kind: type | None = None) -> None:
        """A function, a method, a partial function, or an object that is called. `kind`: the class whose method it is."""
        if isinstance(value, partial):
            self._walk_partial(value, place)
        elif isinstance(value, types.MethodType):
            self.walk(value.__func__, kind=value.__self__ if isinstance(value.__self__, type) else type(value.__self__))
        elif isinstance(value, (staticmethod, classmethod)):
            self.walk(value.__func__, kind=kind)
        elif isinstance(value, property):
            self.walk(value.fget, kind=kind)
        elif isinstance(value, types.FunctionType) and value.__module__ is not None and not is_closed(value.__module__):
            self._walk_function(value, kind)

    def walk_object(self, value: Any) -> None:
        """An object that may be called."""
        if callable(value):
            self._method(type(value), "forward" if isinstance(value, nn.Module) else "__call__")

    def _walk_partial(self, value: partial[Any], place: Place | None) -> None:
        self.walk(value.func, place)
        if place is not None:
            for i, item in enumerate(value.args):
                self._found(place.then("attr", "args").then("item", i), item)
            for name, item in value.keywords.items():
                self._found(place.then("attr", "keywords").then("item", name), item)

    def _walk_function(self, function: types.FunctionType, kind: type | None) -> None:
        key = function.__code__, kind, id(function.__closure__) if function.__closure__ else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self._defaults(function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        for code in codes(function.__code__):
            self.unseen = self.unseen or not _UNSEEN.isdisjoint(code.co_names)
            for where, name, attributes in _chains(code):
                if where == "global" and name in function.__globals__:
                    place = Place(self._root(function), (("item", name),))
                    self._follow(place, function.__globals__[name], attributes)
                elif where == "cell" and name in cells:
                    self._cell(function, name, cells[name], attributes)
                elif where == "store":
                    self._note(Place(self._root(function), (("item", name),)), function.__globals__.get(name, ABSENT))
                elif where == "local" and kind is not None:
                    for attribute in attributes[:1]:
                        self._member(kind, attribute)

    def _root(self, function: types.FunctionType) -> str:
        """The name under which the globals of a function are a root: that of its file, or of its module where two files have one name."""
        table = function.__globals__
        root = os.path.basename(function.__code__.co_filename)
        if self._roots.setdefault(root, table) is not table:
            root = str(function.__module__)
            self._roots[root] = table
        return root

    def _defaults(self, function: types.FunctionType) -> None:
        """Defaults of arguments that can change: a list, an array."""
        found: list[tuple[tuple[str, Any], Any, Any]] = [
            (("attr", "__defaults__"), i, v) for i, v in enumerate(function.__defaults__ or ())
        ]
        found += [(("attr", "__kwdefaults__"), name, value) for name, value in (function.__kwdefaults__ or {}).items()]
        for step, key, value in found:
            if isinstance(value, (*CONTAINERS, *PICTURED, Tensor)):
                self._note(Place(self._named(f"defaults of {_written(function)}", function), (step, ("item", key))), value)

    def _named(self, name: str, root: Any) -> str:
        """The name under which something is a root, the same whenever it is met: `name`, with a number where others have it."""
        names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
        return next(one for one in names if self._roots.setdefault(one, root) is root)

    def _cell(self, function: types.FunctionType, name: str, cell: Any, attributes: list[str]) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty yet
            return
        if name == "__class__":
            return
        root = self._named(f"{name} of {_written(function)}", cell)
        self._follow(Place(root, (("cell", "cell_contents"),)), value, attributes)

    def _member(self, kind: type, name: str) -> None:
        """What code of a class reads of it: a method, or a value that the class holds (those of modules are watched while they run)."""
        self._method(kind, name)
        if name[:2] != "__" and not issubclass(kind, nn.Module) and not is_closed(kind.__module__):
            static = inspect.getattr_static(kind, name, None)
            if static is not None and not hasattr(type(static), "__get__"):
                self._found(Place(self._named(kind.__qualname__, kind), (("attr", name),)), static)

    def _method(self, kind: type, name: str) -> None:
        static = inspect.getattr_static(kind, name, None)
        if _is_cached(static):
            self.walk(static.__wrapped__, kind=kind)
        if isinstance(static, types.FunctionType | staticmethod | classmethod | property):
            if name[:2] != "__" and not is_closed(kind.__module__):
                place = Place(self._named(kind.__qualname__, kind), (("attr", name),))
                self._hold(place.then("attr", "fget") if isinstance(static, property) else place)
            self.walk(static, kind=kind)

    def _hold(self, place: Place) -> None:
        """Note the function that is at a place, as it is read from there."""
        self._note(place, place.value(self._roots))

    def _follow(self, place: Place, value: Any, attributes: list[str]) -> None:
        """Go along the attributes that a line names, as far as modules and classes lead."""
        for name in attributes:
            if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in _CLOCKS:
                self.clocks[f"{value.__name__}.{name}"] = None
                return
            if not isinstance(value, types.ModuleType | type) or is_closed(getattr(value, "__module__", None) or value.__name__):
                break
            place, value = place.then("attr", name), inspect.getattr_static(value, name, None)
        self._found(place, value)

    def _found(self, place: Place, value: Any) -> None:
        if isinstance(value, types.BuiltinFunctionType) and getattr(value, "__module__", None) in _CLOCKS:
            self.clocks[f"{value.__module__}.{value.__name__}"] = None
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | staticmethod | classmethod | partial):
            self._hold(place)
            self.walk(place.value(self._roots) if isinstance(value, classmethod) else value, place)
        elif _is_cached(value):
            self.walk(value.__wrapped__)
        elif isinstance(value, type) and not is_closed(value.__module__):  # what making one of it reads
            for name in ("__new__", "__init__"):
                if any(name in vars(base) for base in value.__mro__ if not is_closed(base.__module__)):
                    self._method(value, name)
        elif isinstance(value, (*PLAIN, *CONTAINERS, *PICTURED, Tensor, nn.Module)):
            self._note(place, value)
        elif not isinstance(value, type | types.ModuleType) and not is_closed(type(value).__module__):
            self.walk_object(value)
            self._note(place, value)


def is_closed(module: str) -> bool:
    """Whether the code of a module is not looked into."""
    return module.partition(".")[0] in _CLOSED


def _is_cached(value: Any) -> bool:
    """Whether it is a function that remembers its results (functools.cache)."""
    return isinstance(value, _CACHED) and isinstance(value.__wrapped__, types.FunctionType)


def _written(function: types.FunctionType) -> str:
    """A function's name and where it is written."""
    return f"{function.__qualname__} ({os.path.basename(function.__code__.co_filename)}:{function.__code__.co_firstlineno})"


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


@lru_cache(maxsize=8192)  # (code never changes, and to read it takes longer than all else here)
def _chains(code: types.CodeType) -> tuple[tuple[str, str, list[str]], ...]:
    """Every name that is loaded, from where, and the attributes that follow it: `settings.loss.weight` -> ("global", "settings", [...])."""
    return tuple(_read_chains(code))


def _read_chains(code: types.CodeType) -> Iterator[tuple[str, str, list[str]]]:
    current: tuple[str, str, list[str]] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and current is not None:
            current[2].append(str(step.argval))
            continue
        if current is not None:
            yield current
            current = None
        where = _LOADS.get(step.opname)
        if where == "store":
            yield where, str(step.argval), []
        elif where is not None:
            current = where, str(step.argval), []
    if current is not None:
        yield current


_LOADS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_DEREF": "cell",
    "LOAD_CLASSDEREF": "cell",
    "LOAD_FAST": "local",
    "LOAD_FAST_CHECK": "local",
    "STORE_GLOBAL": "store",
}
