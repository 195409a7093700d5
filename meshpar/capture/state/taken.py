"""State of Python around one capture: what the forward read (the program holds for that), what it writes, and which numbers are inputs.

A program is captured with the values that attributes, globals and torch's own settings have at that time. Since a forward is a function of
its batch, its tensors and what it read, the program is right wherever that is the same again; `State` says what it was.
"""

from __future__ import annotations

import builtins
import io
import logging
import math
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import FakeTensor
from meshpar.capture import blame
from meshpar.capture.copies import Missing
from meshpar.capture.state.ambient import TORCH, keyed, place_of
from meshpar.capture.state.numbers import OF_MATH, SLOTS, Formula, Meeting, Numbers, TooMany, is_number, on_numbers
from meshpar.capture.state.outside import Outside
from meshpar.capture.state.places import ABSENT, CONTAINERS, FUNCTIONS, PLAIN, Place, copied, same
from meshpar.capture.state.reads import Reads, attributes, of_classes
from meshpar.capture.state.surroundings import Surroundings
from meshpar.capture.values import branches
from meshpar.errors import CaptureError


@dataclass(frozen=True)
class Ask:
    """What a capture is to do about state. `original`: the model that was copied; `numbers`: places whose numbers become inputs."""

    original: weakref.ref[nn.Module] | None = None
    numbers: tuple[Place, ...] = ()
    roots: Mapping[str, Any] = field(default_factory=dict)
    """Where the places of numbers begin that are not in the model."""
    gradients: bool = True
    """What `torch.is_grad_enabled()` says to the forward outside of its own sections."""
    ambient: Mapping[Place, Any] = field(default_factory=keyed)
    """Torch's own settings."""


@dataclass(frozen=True)
class State:
    """What of Python a program was made with. Places with the root "" are in the model, the others in `roots`."""

    read: Mapping[Place, Any] = field(default_factory=dict)
    tensors: Mapping[Place, tuple[Tensor, int]] = field(default_factory=dict)
    """Plain tensors that the graph holds the values of, and their versions."""
    roots: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[Place, type] = field(default_factory=dict)
    """The places of numbers that may change, and the type that each must have."""
    inputs: Mapping[str, Formula] = field(default_factory=dict)
    """Placeholder -> the number that it takes."""
    asked: Mapping[Formula, Any] = field(default_factory=dict)
    writes: Mapping[Place, Formula] = field(default_factory=dict)
    """What the forward leaves behind, computed from the numbers before it."""
    lost: Mapping[Place, str] = field(default_factory=dict)
    """Attributes that the forward puts tensors into -> where: nobody finds them there after a step."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


@dataclass
class Recording:
    """The state of one capture while it is under way."""

    ask: Ask
    found: State | None = None
    names: tuple[str, ...] = ()
    """For every slot that is used: the placeholder's name; the others are dropped."""
    used: tuple[tuple[int, int], ...] = ()

    def slots(self) -> tuple[Any, ...]:
        """The values of spare inputs of the graph: floats, then ints."""
        if not self.ask.numbers:
            return ()
        return tuple(torch.zeros((), dtype=kind) for kind in (torch.float64, torch.int64) for _ in range(SLOTS))

    def slot_names(self) -> tuple[str, ...]:
        """The names of the spare inputs."""
        return tuple(f"spare_{i}" for i in range(len(self.slots())))

    def placeholders(self) -> dict[str, str]:
        """Spare input -> the name under which it stays."""
        return {f"spare_{kind * SLOTS + index}": name for (kind, index), name in zip(self.used, self.names, strict=True)}

    @contextmanager
    def around(self, model: nn.Module, loss_fn: Any, slots: tuple[Tensor, ...]) -> Iterator[None]:
        """Inside, the forward runs. Raises CaptureError for state that no program can keep."""
        original = self.ask.original() if self.ask.original is not None else None
        outside = {id(m.__dict__): (path, original) for path, m in original.named_modules()} if original is not None else {}
        walked: list[tuple[Any, Place]] = []
        reads = Reads(model, outside, function=lambda value, place: walked.append((value, place)))
        surroundings = Surroundings(reads.note, reads.roots)
        reads.roots["torch"] = TORCH
        reads.read |= self.ask.ambient
        reads.roots |= {name: root for name, root in self.ask.roots.items() if name}
        numbers = Numbers({}, (slots[:SLOTS], slots[SLOTS:]))
        numbers.values = {place: place.value(reads.roots) for place in self.ask.numbers}
        said: dict[str, None] = {}
        drawn = _Draws()
        with ExitStack() as stack:
            stack.enter_context(_saying(said))
            stack.enter_context(_asking_for_gradients(reads, self.ask.gradients))
            if numbers.values:
                stack.enter_context(_numbered(numbers, reads.roots))
                stack.enter_context(Meeting())
            _walk(surroundings, reads, model, loss_fn)
            outside_of_it = stack.enter_context(Outside(model, loss_fn).kept())
            stack.enter_context(reads.recording())
            yield
            with reads.paused():
                while walked:
                    value, place = walked.pop()
                    surroundings.walk(value, place)
                drawn.check()
                reads.look_for_writes()
                writes, lost = _writes(reads)
                _check_refilled(reads)
                _check_iterators(reads)
                _check_live(reads, outside_of_it)
        said |= {f"reads the clock ({name}): it is what it was at capture": None for name in surroundings.clocks}
        self.names = tuple(f"number_{i}" for i in range(len(numbers.inputs)))
        self.used = tuple(numbers.used)
        read = {p: v for p, v in reads.read.items() if p not in numbers.values and not isinstance(v, FakeTensor)}
        self.found = State(
            read=read,
            tensors={place: (tensor, token_of(tensor)) for place, tensor in reads.tensors.items() if not isinstance(tensor, FakeTensor)},
            roots={name: root for name, root in reads.roots.items() if name and any(place.root == name for place in reads.read)},
            numbers={place: type(value) for place, value in numbers.values.items()},
            inputs=dict(zip(self.names, numbers.inputs, strict=True)),
            asked=dict(numbers.asked),
            writes=writes,
            lost=lost,
            notes=(*said, *(f"puts a tensor into {place}{where}: nobody finds it there after a step" for place, where in lost.items())),
        )
        if surroundings.unseen:
            self.found = _with_all_of(self.found, model, ("",))


def settled(found: State, model: nn.Module, experts: Iterable[str] = ()) -> State:
    """The same after the capture: what only the capture had changed (how experts run, tensors without memory) is as it was before.

    What `experts` and the modules below them hold counts as read, since others ran in their place.
    """
    found = _with_all_of(found, model, experts)
    roots = {"": model, "torch": TORCH, **found.roots}
    now = {p: p.value(roots) for p in found.read if p.root != "torch"}
    moved = {place: copied(value) for place, value in now.items() if not same(value, found.read[place])}
    return replace(found, read={**found.read, **moved})


def _with_all_of(found: State, model: nn.Module, experts: Iterable[str]) -> State:
    every = {**of_classes(model, experts), **attributes(model, experts)}
    held = {p: copied(value) for p, value in every.items() if p not in found.numbers and p not in found.writes}
    tensors = {place: (value, token_of(value)) for place, value in held.items() if isinstance(value, Tensor)}
    return replace(found, read={**held, **found.read}, tensors={**tensors, **found.tensors})


def version_of(tensor: Tensor) -> int:
    """A number that changes when a tensor is overwritten."""
    return 0 if tensor.is_inference() else tensor._version


def token_of(tensor: Tensor) -> int:
    """A number that changes when a tensor is overwritten, or begins to want a gradient."""
    return 2 * version_of(tensor) + tensor.requires_grad


def _walk(surroundings: Surroundings, reads: Reads, model: nn.Module, loss_fn: Any) -> None:
    for path, module in model.named_modules():
        surroundings.walk_object(module)
        surroundings.walk(getattr(module.__dict__.get("forward"), "__wrapped__", None))
        for table in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in getattr(module, table).items():
                _walk_hook(surroundings, reads, Place("", (("sub", path), ("attr", table), ("item", key))), hook)
    if loss_fn is None:
        return
    reads.roots["loss_fn"] = types.SimpleNamespace(loss_fn=loss_fn)
    place = Place("loss_fn", (("attr", "loss_fn"),))
    if isinstance(loss_fn, types.MethodType):
        surroundings.walk(loss_fn)
        loss_fn, place = loss_fn.__self__, place.then("attr", "__self__")
    if isinstance(loss_fn, types.FunctionType | types.BuiltinFunctionType | type) or hasattr(loss_fn, "func"):
        surroundings.walk(loss_fn, place)
    else:
        surroundings.walk_object(loss_fn)
        reads.note(place, loss_fn)


def _walk_hook(surroundings: Surroundings, reads: Reads, place: Place, hook: Any) -> None:
    """A forward hook: what its code reads, and what it is called on."""
    if isinstance(hook, types.MethodType):
        surroundings.walk(hook)
        hook, place = hook.__self__, place.then("attr", "__self__")
    if isinstance(hook, types.FunctionType):
        surroundings.walk(hook)
    elif not isinstance(hook, nn.Module):
        surroundings.walk_object(hook)
        reads.note(place, hook)


@contextmanager
def _numbered(numbers: Numbers, roots: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the places of numbers hold numbers that are inputs, and functions of `math` compute with them."""
    functions = {name: getattr(math, name) for name in OF_MATH}
    for name, function in functions.items():
        setattr(math, name, on_numbers(function))
    for place in numbers.values:
        place.put(roots, numbers.of(place))
    try:
        yield
    except TooMany as error:
        raise CaptureError(f"The forward computes with more than {SLOTS} changing numbers of one type.") from error
    finally:
        for place, value in numbers.values.items():
            place.put(roots, value)
        for name, function in functions.items():
            setattr(math, name, function)


# ---- what is left behind ---------------------------------------------------------------------------------------------------------------


def _writes(reads: Reads) -> tuple[dict[Place, Formula], dict[Place, str]]:
    """What is written after every step, and the tensors that are not. Raises CaptureError for tensors that the next forward would read."""
    writes, lost, refused = dict[Place, Formula](), dict[Place, str](), list[str]()
    for place, where in reads.written.items():
        value = place.value(reads.roots)
        if is_number(value):
            writes[place] = value.formula
        elif _is_plain(value):
            writes[place] = ("value", copied(value))
        elif _is_of_its_class(place, value, reads.roots):
            place.put(reads.roots, ABSENT)
        elif isinstance(value, (*FUNCTIONS, nn.Module)):
            refused.append(f"{place}{where}: it is assigned a {type(value).__name__} in forward. Do so in __init__.")
        elif place in reads.read and _is_put_back(value, reads.read[place]):
            continue
        elif place in reads.read and (not _is_remade(value) or _goes_on(value, reads.read[place])):
            refused.append(
                f"{place}{where}: forward reads it and puts {_kind(value)} there, for its next call. Register it with register_buffer if "
                f"its shape stays; else return it, and pass it in the batch."
            )
        elif not _is_remade(value):
            lost[place] = where
    if refused:
        raise CaptureError("\n  ".join(["The forward keeps state in attributes that a graph does not carry over:", *refused]))
    return writes, lost


def _is_of_its_class(place: Place, value: Any, roots: Mapping[str, Any]) -> bool:
    """Whether an attribute is the method that the object has without it: a wrapper was there for a while, and is taken off again."""
    owner, name = place.owner(roots), place.steps[-1][1]
    return isinstance(value, types.MethodType) and value.__self__ is owner and getattr(type(owner), name, None) is value.__func__


def _is_plain(value: Any) -> bool:
    if type(value) in CONTAINERS:
        items = vars(value).values() if isinstance(value, types.SimpleNamespace) else value
        return all(map(_is_plain, items)) and (not isinstance(value, dict) or all(map(_is_plain, value.values())))
    return not is_number(value) and isinstance(value, PLAIN)


def _is_put_back(value: Any, before: Any) -> bool:
    """Whether the tensors that were there are there again: a tensor of the dtype asked for is its own `.to(dtype)`."""
    if isinstance(value, Tensor):
        return value is before
    if type(value) not in (list, tuple, dict) or type(value) is not type(before) or len(value) != len(before):
        return _is_plain(value) and same(value, before)
    if isinstance(value, dict):
        return list(value) == list(before) and all(_is_put_back(value[key], before[key]) for key in value)
    return all(map(_is_put_back, value, before))


def _is_remade(value: Any) -> bool:
    """Whether tensors are made of nothing but numbers: the next forward makes the same again."""
    if isinstance(value, Tensor):
        return branches.settled(value)
    if type(value) in CONTAINERS and not isinstance(value, types.SimpleNamespace):
        return all(_is_remade(item) for item in (value.values() if isinstance(value, dict) else value))
    return _is_plain(value)


def _goes_on(value: Any, before: Any) -> bool:
    """Whether something of it is computed from what was there: a count, another with every forward."""
    here, there = _tensors(value), _tensors(before)
    return any(branches.made_of(new, old) for new in here for old in there)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) not in CONTAINERS or isinstance(value, types.SimpleNamespace):
        return []
    return [tensor for item in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(item)]


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__} with tensors or objects"


def _check_refilled(reads: Reads) -> None:
    """A dict may get entries that every forward makes again; all else that is put into containers would be lost, or there twice."""
    refused = []
    for place, (now, before) in reads.refilled().items():
        if place not in reads.written and not (isinstance(now, dict) and _only_remakes(now, before)):
            refused.append(f"{place}, a {type(now).__name__}: forward changes what is in it.")
    if refused:
        raise CaptureError(
            "\n  ".join(["The forward keeps state in containers, which a graph does not carry over:", *refused])
            + "\n  Return what is to be collected from forward, or keep it in a buffer of a fixed shape."
        )


def _check_live(reads: Reads, around: Outside) -> None:
    """Globals, closures, classes and attributes of functions that the forward itself changes."""
    refused = [
        f"{name}: it changes while forward runs."
        for name, now, before in around.changed(reads.knows)
        if not (before in (None, ABSENT) and _is_cached(now)) and not (isinstance(now, dict) and _only_remakes(now, before))
    ]
    for place, before in reads.read.items():
        if place.root in ("", "torch") or place in reads.written:
            continue
        now = place.value(reads.roots)
        if not is_number(now) and not same(now, before):
            refused.append(f"{place}: it changes while forward runs.")
    if refused:
        raise CaptureError(
            "\n  ".join(["The forward changes state outside of the model, which a graph does not carry over:", *refused])
            + "\n  Keep it in an attribute or a buffer of the model, or change it in the training loop."
        )


def _check_iterators(reads: Reads) -> None:
    # (what stands for one without a copy says so itself, when it is used)
    found = [place for place, value in reads.read.items() if hasattr(type(value), "__next__") and not isinstance(value, Missing)]
    if found:
        raise CaptureError(
            f"The forward reads {', '.join(map(str, found))}, an iterator: a graph would have what it gave at capture for ever.\n"
            "  Draw from it in the training loop, and pass what it gives in the batch."
        )


def _only_remakes(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    kept = all(now.get(key) is value for key, value in before.items())
    return kept and all(_is_cached(value) for key, value in now.items() if key not in before)


def _is_cached(value: Any) -> bool:
    """Tensors that the next forward makes again, and nothing that may count."""
    if type(value) in (list, tuple, dict):
        return bool(value) and all(map(_is_cached, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and branches.settled(value)


class _Draws:
    """The states of the generators of Python and NumPy, before and after."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy")
        state = None if numpy is None else numpy.random.get_state()
        return random.getstate(), None if state is None else (state[0], state[1].tobytes(), *state[2:])

    def check(self) -> None:
        """Raise CaptureError where the forward drew from them, and put them back."""
        now = self._now()
        names = [name for name, a, b in zip(("random", "numpy.random"), self._before, now, strict=True) if a != b]
        if names[:1] == ["random"]:
            random.setstate(self._before[0])
        if names:
            raise CaptureError(
                f"The forward draws from {' and '.join(names)}: a graph would have what came at capture for ever.\n"
                "  Draw with torch (torch.rand), or in the training loop, and pass what was drawn in the batch."
            )


# ---- what only happens at capture ------------------------------------------------------------------------------------------------------


@contextmanager
def _saying(said: dict[str, None]) -> Iterator[None]:
    """Inside, what the user's code prints, logs or opens is noted: no step does it again."""

    def noting(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if blame.asked_by_user() and blame.is_own():
                said[f"{what}{blame.here()}: this happens at capture, and in no step"] = None
            return original(*args, **kwargs)

        return call

    kept = builtins.print, builtins.open, logging.Logger.handle
    builtins.print, builtins.open = noting(kept[0], "prints"), noting(kept[1], "opens a file")
    io.open = builtins.open  # (which pathlib calls)
    logging.Logger.handle = noting(kept[2], "logs")  # type: ignore[method-assign]
    try:
        yield
    finally:
        builtins.print, builtins.open, logging.Logger.handle = kept  # type: ignore[method-assign]
        io.open = kept[1]


@contextmanager
def _asking_for_gradients(reads: Reads, enabled: bool) -> Iterator[None]:
    """Inside, `torch.is_grad_enabled()` says what it will say in the step, and that it was asked is noted."""
    original = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        if not blame.asked_by_user():
            return original()
        reads.read.setdefault(place_of("grad mode"), enabled)
        return original() and enabled

    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = original


def say(notes: tuple[str, ...], model: nn.Module) -> None:
    """Warn of what only happens at capture."""
    if notes:
        warnings.warn("\n  ".join([f"The forward of {type(model).__name__}", *notes]), stacklevel=2)


@contextmanager
def autocast(ask: Ask) -> Iterator[None]:
    """The sections of autocast around a step, as a part of its forward."""
    with ExitStack() as stack:
        for device, dtype in ask.ambient[place_of("autocast")]:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """What runs inside is not cast: graphs hold their casts."""
    with ExitStack() as stack:
        for device, _ in keyed()[place_of("autocast")]:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
