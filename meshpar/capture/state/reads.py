"""What a forward reads and writes of Python while it is captured: attributes of modules and of the objects they hold.

    with Reads(model, outside).recording() as reads:
        output = model(batch)
    reads.read       {Place: value before}          reads.written       {Place: where in the source}

`nn.Module.__getattribute__` and `__setattr__`, and those of the classes of objects that are met on the way, are watched for that time.
Containers, which cannot be watched, count as read whole. Everything is put back afterwards: a capture changes nothing of the model.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from meshpar.capture import blame
from meshpar.capture.state.numbers import is_number
from meshpar.capture.state.places import ABSENT, CONTAINERS, FUNCTIONS, PLAIN, Place, copied, masked, picture, refilled
from meshpar.errors import CaptureError

INNER = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes that torch's own code keeps in every module: parameters, buffers, submodules, hooks."""
_OWN_METHODS = frozenset(vars(nn.Module)) - {"forward"}
_OF_WEIGHTS = frozenset({"_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights"})
"""Where torch's recurrent modules list their own parameters, anew whenever one is assigned."""
_TABLES = frozenset({"__dict__", "__getstate__"})
"""Attributes that give all others: to `vars`, and to `copy` and `pickle`."""
_HEAP = 1 << 9
"""The flag of classes that Python code made: only those can be watched."""
_MAX_ITEMS = 4096


class Reads:
    """One recording. `outside`: id of the attributes of every module that must not take part -> its path (the model that was copied)."""

    def __init__(self, model: nn.Module, outside: Mapping[int, tuple[str, nn.Module]], *, function: Callable[[Any, Place], None]) -> None:
        self.roots: dict[str, Any] = {"": model}
        """Where places begin."""
        self.read: dict[Place, Any] = {}
        """What was there before the forward; containers as they were."""
        self.written: dict[Place, str] = {}
        self._items: dict[Place, tuple[Any, Any]] = {}
        """Every container, and one of its kind with the items that it had."""
        self.tensors: dict[Place, Tensor] = {}
        self._before: dict[Place, Any] = {}
        self._outside, self._function = outside, function
        self._known: dict[int, Place] = {}
        self._kept: list[Any] = []
        self._tables: list[tuple[Any, Place, dict[str, Any]]] = []
        """Every object that is watched, its place, and its attributes as they were when it was met."""
        self._parts: list[tuple[dict[str, Any], dict[str, Any], Place]] = []
        """The modules of every module, as they are and as they were."""
        self._classes: dict[type, None] = {}
        self._seen: set[tuple[int, str]] = set()
        self._entire: set[int] = set()
        """What was read as a whole: also what is not there."""
        self._on = False
        self._stack = ExitStack()
        for path, module in model.named_modules():
            self._know(module, Place("", (("sub", path),)))

    def _know(self, obj: Any, place: Place) -> None:
        if self._known.setdefault(identity(obj), place) is place:
            self._tables.append((obj, place, dict(_table(obj))))
            if isinstance(obj, nn.Module):
                self._parts.append((obj._modules, dict(obj._modules), place))

    @contextmanager
    def recording(self) -> Iterator[Reads]:
        """Inside, what is read and written is noted; afterwards every place holds what it did."""
        with self._stack:
            self._watch(nn.Module)
            self._watch_environment()
            self._tables = [(obj, place, dict(_table(obj))) for obj, place, _ in self._tables]
            self._parts = [(now, dict(now), place) for now, _, place in self._parts]
            self._on = True
            try:
                yield self
            finally:
                self._on = False
                self.restore()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        on, self._on = self._on, False
        try:
            yield
        finally:
            self._on = on

    def restore(self) -> None:
        """Put back what was there."""
        for place, before in self._before.items():
            place.put(self.roots, before)
        for container, items in self._items.values():
            if not _same_items(container, items):
                refilled(container, items)

    # -- what is met ---------------------------------------------------------------------------------------------------------------------

    def note(self, place: Place, value: Any) -> None:
        """A value that the forward may read, and what can be read of it."""
        if place in self.read or place in self.written:
            return
        if isinstance(value, nn.Module):
            self._note_module(place, value)
        elif isinstance(value, Tensor):
            self.read[place] = self.tensors[place] = value
        elif type(value) in CONTAINERS:
            self._note_items(place, value)
        elif isinstance(value, PLAIN):
            self.read[place] = value
        elif (held := picture(value)) is not None:
            self.read[place] = held
        elif isinstance(value, (*FUNCTIONS, partial)):
            self.read[place] = value
            self._function(value, place)
        elif not isinstance(value, types.ModuleType):
            self.read[place] = value
            self.meet(value, place)

    def _note_module(self, place: Place, module: nn.Module) -> None:
        """A module in a plain list, or in a closure: it is known by that place."""
        if id(module.__dict__) in self._known or id(module.__dict__) in self._outside:
            return
        for path, part in module.named_modules():
            self._know(part, Place(place.root, (*place.steps, ("sub", path))))
        self._kept.append(module)

    def _note_items(self, place: Place, value: Any) -> None:
        self.read[place] = masked(copied(value), is_number)
        if not isinstance(value, tuple | frozenset):
            self._items[place] = value, copy.copy(value)
        items: Any = vars(value).items() if isinstance(value, types.SimpleNamespace) else ()
        kind = "attr" if items else "item"
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        for number, (key, item) in enumerate(tuple(items)):
            if number < _MAX_ITEMS and not isinstance(item, PLAIN):
                self.note(place.then(kind, key), item)

    def meet(self, value: Any, place: Place) -> None:
        """An object: from now on, what is read of it is noted."""
        key = identity(value)
        if key in self._known or type(value).__module__.partition(".")[0] in ("torch", "meshpar", "builtins"):
            return
        self._know(value, place)
        self._kept.append(value)
        self._watch(type(value))

    def knows(self, owner: Any, key: Any) -> bool:
        """Whether a change was noted here: of the attribute `key` of an object, or (ABSENT) of what a container holds."""
        if key is ABSENT:
            return any(now is owner for now, _ in self.refilled().values())
        place = self._known.get(identity(owner))
        return place is not None and place.then("attr", key) in self.written

    def refilled(self) -> dict[Place, tuple[Any, Any]]:
        """The containers whose items the forward changed, and what was in them."""
        return {place: (now, before) for place, (now, before) in self._items.items() if not _same_items(now, before)}

    # -- watching ------------------------------------------------------------------------------------------------------------------------

    def _watch(self, kind: type) -> None:
        if any(base in self._classes for base in kind.__mro__ if "__getattribute__" not in vars(kind)) or kind in self._classes:
            return
        if not kind.__flags__ & _HEAP:
            return
        self._classes[kind] = None
        self._replace(kind, "__getattribute__", self._reading(kind.__getattribute__))
        self._replace(kind, "__setattr__", self._writing(kind.__setattr__))

    def _replace(self, kind: type, name: str, function: Any) -> None:
        own = vars(kind).get(name, ABSENT)
        try:
            setattr(kind, name, function)
        except TypeError:  # a class that does not let itself be changed: what it holds counts by its type
            return
        self._stack.callback(partial(delattr, kind, name) if own is ABSENT else partial(setattr, kind, name, own))

    def _reading(self, original: Any) -> Any:
        def __getattribute__(obj: Any, name: str) -> Any:
            if not self._on or name[:2] == "__":
                if self._on and name in _TABLES and blame.asked_by_user():
                    self._saw_all(obj)
                return original(obj, name)
            try:
                value = original(obj, name)
            except AttributeError:
                self._saw(obj, name, ABSENT)
                raise
            self._saw(obj, name, value)
            return value

        return __getattribute__

    def _saw_all(self, obj: Any) -> None:
        """The table of all attributes, for whatever is read there: all of them are."""
        with self.paused():
            items = list(_table(obj).items()) if identity(obj) in self._known else []
        self._entire.add(identity(obj))
        for name, value in items:
            self._saw(obj, name, value)

    def _saw(self, obj: Any, name: str, value: Any) -> None:
        key = identity(obj)
        place = self._known.get(key)
        if place is None:
            if key in self._outside:
                self._saw_outside(obj, name, value)
            return
        if (key, name) in self._seen:
            return
        self._seen.add((key, name))
        with self.paused():
            self._saw_new(obj, name, value, place)

    def _saw_new(self, obj: Any, name: str, value: Any, place: Place) -> None:
        table = _table(obj)
        if isinstance(obj, nn.Module):
            if name in INNER or any(name in table[kind] for kind in ("_parameters", "_buffers", "_modules")):
                return
            if isinstance(obj, nn.RNNBase) and name in _OF_WEIGHTS:
                return
            if name == "forward" and getattr(table.get("forward"), "__module__", "").startswith("meshpar"):
                return
        if name in table or value is ABSENT:
            self.note(place.then("attr", name), value if name in table else ABSENT)
            return
        static = next((vars(kind)[name] for kind in type(obj).__mro__ if name in vars(kind)), ABSENT)
        if isinstance(obj, nn.Module) and name in _OWN_METHODS:
            return
        if isinstance(static, types.FunctionType | classmethod | staticmethod):
            self.note(place.then("attr", name), ABSENT) if isinstance(obj, nn.Module) else None
        elif not isinstance(static, property) and (static is ABSENT or isinstance(value, (*PLAIN, *CONTAINERS, Tensor))):
            self.note(place.then("attr", name), value)

    def _saw_outside(self, obj: nn.Module, name: str, value: Any) -> None:
        """The model that was handed to parallelize: what does not change is read there, no tensor is."""
        path, root = self._outside[identity(obj)]
        table = obj.__dict__
        place = Place("the model given to parallelize", (("sub", path), ("attr", name)))
        tensor = name in ("_parameters", "_buffers") or name in table["_parameters"] or name in table["_buffers"]
        mine = Place("", place.steps)
        if tensor or isinstance(value, Tensor) or mine in self.written:
            raise CaptureError(
                f"{mine} of the model itself is read{blame.here()}, past the copy that runs in parallel: it would be what "
                f"it is in the model given to parallelize, and get no gradient.\n"
                "  Return what is needed from forward, and let loss_fn(output, batch) use nothing but its arguments."
            )
        if name in INNER or isinstance(value, nn.Module) or name not in table:
            return
        self.roots[place.root] = root
        with self.paused():
            self.note(place, value)

    def _writing(self, original: Any) -> Any:
        def __setattr__(obj: Any, name: str, value: Any) -> None:
            if self._on and name[:2] != "__" and (place := self._known.get(identity(obj))) is not None:
                with self.paused():
                    _refuse_parts(obj, name, value, place)
                    self._wrote(obj, name, place)
            original(obj, name, value)

        return __setattr__

    def _wrote(self, obj: Any, name: str, place: Place) -> None:
        table = _table(obj)
        if _of_torch(obj, name) or any(name in table.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules")):
            return
        at = place.then("attr", name)
        if at not in self._before:
            slot = any(isinstance(vars(base).get(name), types.MemberDescriptorType) for base in type(obj).__mro__)
            self._before[at] = getattr(obj, name, ABSENT) if slot else table.get(name, ABSENT)
            self.written[at] = blame.here()

    def look_for_writes(self) -> None:
        """Note what was written past `__setattr__`: to `self.__dict__`, through `vars`, by `object.__setattr__`.

        Raises CaptureError for modules that were added or taken out.
        """
        changed = [
            (place, name) for now, before, place in self._parts for name in {**before, **now} if now.get(name) is not before.get(name)
        ]
        for place, name in changed:
            raise CaptureError(_PARTS.format(what="changes the module", place=place.then("attr", name), where=""))
        for obj, place, before in self._tables:
            now = _table(obj)
            for name in [*before, *(name for name in now if name not in before)]:
                at = place.then("attr", name)
                if now.get(name, ABSENT) is before.get(name, ABSENT) or _of_torch(obj, name):
                    continue
                if identity(obj) in self._entire:
                    self.read.setdefault(at, before.get(name, ABSENT))
                if at not in self.written:
                    self._before[at], self.written[at] = before.get(name, ABSENT), " past __setattr__"

    def _watch_environment(self) -> None:
        kind: Any = type(os.environ)
        original = kind.__getitem__

        def __getitem__(environment: Any, name: str) -> str:
            if self._on and environment is os.environ and blame.asked_by_user():
                self.roots["os.environ"] = os.environ
                with self.paused():
                    self.note(Place("os.environ", (("item", name),)), os.environ.get(name, ABSENT))
            found: str = original(environment, name)
            return found

        self._replace(kind, "__getitem__", __getitem__)


def attributes(model: nn.Module, below: Iterable[str] = ("",)) -> dict[Place, Any]:
    """Every attribute of every module, and of the objects they hold, as far as those are Python's. `below`: of which parts of the model."""
    found: dict[Place, Any] = {}
    seen: set[int] = set()
    for start in below:
        for path, module in model.get_submodule(start).named_modules(None, start):
            place = Place("", (("sub", path),))
            for name, value in module.__dict__.items():
                if name not in INNER and not isinstance(value, nn.Module):
                    _gather(place.then("attr", name), value, found, seen, 3)
    return found


def of_classes(model: nn.Module, below: Iterable[str]) -> dict[Place, Any]:
    """The plain values that modules have from their classes, and not of their own."""
    found: dict[Place, Any] = {}
    for start in below:
        for path, module in model.get_submodule(start).named_modules(None, start):
            own = (base for base in type(module).__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins"))
            for name in {name for base in own for name, value in vars(base).items() if isinstance(value, (*PLAIN, *CONTAINERS))}:
                if name[:2] != "__" and name not in module.__dict__:
                    place = Place("", (("sub", path), ("attr", name)))
                    found[place] = place.value({"": model})
    return found


def _gather(place: Place, value: Any, found: dict[Place, Any], seen: set[int], depth: int) -> None:
    found[place] = value
    table = getattr(value, "__dict__", None)
    if isinstance(value, (*PLAIN, *FUNCTIONS, nn.Module, Tensor)) or not isinstance(table, dict):
        return
    if depth and id(value) not in seen and type(value).__module__.partition(".")[0] not in ("torch", "builtins"):
        seen.add(id(value))
        for name, part in table.items():
            _gather(place.then("attr", name), part, found, seen, depth - 1)


_PARTS = (
    "The forward {what} {place}{where}: a program holds for the modules and parameters that the model has.\n"
    "  If that happens in the first call alone, run the model once on a batch like this one before parallelize; else make it a part of the "
    "model from the start, and choose between parts in forward."
)


def _refuse_parts(obj: Any, name: str, value: Any, place: Place) -> None:
    """Raise CaptureError where a forward puts another module or parameter into the model: the next step would run without it."""
    table = _table(obj)
    if not isinstance(obj, nn.Module) or "_modules" not in table:
        return
    before = table["_modules"].get(name, table["_parameters"].get(name, ABSENT))
    if (isinstance(value, (nn.Module, nn.Parameter)) or (before is not ABSENT and before is not None)) and value is not before:
        raise CaptureError(_PARTS.format(what=f"puts a {type(value).__name__} into", place=place.then("attr", name), where=blame.here()))


def _of_torch(obj: Any, name: str) -> bool:
    """Whether an attribute is the bookkeeping of torch's own modules."""
    return isinstance(obj, nn.Module) and (name in INNER or (isinstance(obj, nn.RNNBase) and name in _OF_WEIGHTS))


def _same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects in the same places."""
    if isinstance(a, types.SimpleNamespace):
        a, b = vars(a), vars(b)
    if isinstance(a, set):
        return {id(item) for item in a} == {id(item) for item in b}
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(x is y for x, y in zip(a, b, strict=True)) and all(x is y for x, y in zip(a.values(), b.values(), strict=True))
    return all(x is y for x, y in zip(a, b, strict=True))


def _table(obj: Any) -> Any:
    found = getattr(obj, "__dict__", None)
    return found if isinstance(found, dict) else {}


def identity(obj: Any) -> int:
    """What tells objects apart: a module's attributes, which the stand-ins that torch traces share with it."""
    if isinstance(obj, nn.Module):
        return id(object.__getattribute__(obj, "__dict__"))
    return id(obj)
