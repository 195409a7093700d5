"""A copy of a model that is complete: closures read the copy, and what no copy can have is refused by name when the forward reads it.

`copy.deepcopy` alone is wrong, or raises, on models that run perfectly well:

    self.act = lambda x: x * self.scale        the lambda of the copy would go on reading the scale of the original
    self.last = self.proj(x)                   a tensor of an earlier forward: "only leaves support the deepcopy protocol"
    self.lock = threading.Lock()               "cannot pickle '_thread.lock' object"
    weight_norm(nn.Linear(8, 8))               its old form keeps the weight, computed from g and v, as an attribute

So `copied` looks at all that a model holds first, says what each such object becomes, and lets deepcopy do the rest.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from meshpar._torch import without_modes
from meshpar.errors import CaptureError, raise_all

_SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))
"""What a copy may have in common with its original: it computes nothing."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, CodeType, BuiltinFunctionType)


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`; `memo` says what objects, by their `id`, become.

    Functions that read the model through their closure, defaults or globals read the copy. A tensor computed from others that require a
    gradient, and an object that cannot be copied, have a stand-in: a forward that reads it before writing it raises CaptureError with the
    module, the attribute, and what to do. (A copy of such a tensor would be a constant: the gradient would be lost without a word.)
    """
    refuse_unreadable(model)
    made = dict(memo or {})
    found = list(held(model))
    inside = {id(value) for _, value in found if isinstance(value, nn.Module)} | {
        id(t) for t in (*model.parameters(), *model.buffers()) if t is not None
    }
    functions = [value for _, value in found if isinstance(value, FunctionType) and _reads(value, inside, set())]
    for function in functions:
        made.setdefault(id(function), _unbound(function))
    for path, value in found:
        if isinstance(value, torch.Tensor) and not value.is_leaf and id(value) not in made:
            made[id(value)] = Derived.of(value, _DERIVED.format(where=_where(path, model)))
        elif isinstance(value, _SHARED):
            made[id(value)] = value
    try:
        new = copy.deepcopy(model, attempt := dict(made))
    except Exception:  # something in it cannot be copied: which, is found by trying everything it holds
        for path, value in reversed(found):
            if id(value) not in made and value is not model:
                _try(path, value, model, made)
        new = _shell(model, attempt := dict(made))
    for function in functions:
        _bind(function, attempt, inside)
    assert isinstance(new, nn.Module)
    return new


def refuse_unreadable(model: nn.Module) -> None:
    """Raise CaptureError for modules that cannot be read."""
    complaints = [
        f"{name or 'the model'} is a module of TorchScript, whose code cannot be read: use the nn.Module that it was made from."
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        complaints.append(
            f"{', '.join(lazy[:5])} {'have' if len(lazy) > 1 else 'has'} no shape yet: call the model once on a batch before."
        )
    raise_all(CaptureError, f"{type(model).__name__}:", complaints)


def memories(model: nn.Module) -> dict[int, str]:
    """Where in memory the parameters of a model lie -> their names."""
    found = {}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel():
            found[parameter.data_ptr()] = name
    return found


def refuse_originals(constants: Mapping[str, torch.Tensor], originals: Mapping[int, str]) -> None:
    """Raise CaptureError if a graph of the copy holds parameters of the original: whoever reads them past the copy would read constants."""
    read = [originals[c.data_ptr()] for c in constants.values() if type(c.data) is torch.Tensor and c.data_ptr() in originals]
    if read:
        raise CaptureError(
            f"the forward reads {', '.join(read)} past the module it is called on, through a global variable for instance: for a copy of "
            f"the model these would be constants, without a gradient.\n  Read them from self, or hand the module in."
        )


# ---- what a model holds ----------------------------------------------------------------------------------------------------------------


def held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every object that can be reached from a model's attributes, once, with the path to it; holders before what they hold."""
    seen: set[int] = set()
    todo: deque[tuple[str, Any]] = deque([("", model)])
    while todo:
        path, value = todo.popleft()
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        yield path, value
        todo.extend((path if not name else f"{path}.{name}".lstrip("."), part) for name, part in _parts(value))


_TABLES = ("_parameters", "_buffers", "_modules")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif isinstance(value, partial):
        yield from (("", part) for part in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, FunctionType):
        yield from (("", part) for part in _captured(value))
    elif not isinstance(value, torch.Tensor | ModuleType) and hasattr(value, "__dict__"):
        for name, part in list(vars(value).items()):
            yield ("" if isinstance(value, nn.Module) and name in _TABLES else name), part


def _captured(function: FunctionType) -> Iterator[Any]:
    """What a function holds: its closure, its defaults, and the attributes set on it (the function it wraps)."""
    for cell in function.__closure__ or ():
        if _is_full(cell):
            yield cell.cell_contents
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values())


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (reading is the question)
    except ValueError:
        return False
    return True


def _where(path: str, model: nn.Module) -> str:
    """ "proj.weight, an attribute of proj (Linear)" """
    module, owner = "", model
    for name, candidate in model.named_modules():
        if name and (path + ".").startswith(name + ".") and len(name) > len(module):
            module, owner = name, candidate
    attribute = path[len(module) :].lstrip(".") if module else path
    return f"{attribute!r}, an attribute of {module or 'the model'} ({type(owner).__name__})"


# ---- functions that read the model -----------------------------------------------------------------------------------------------------


def _reads(function: FunctionType, inside: set[int], seen: set[int]) -> bool:
    """Whether a function has anything of the model in its closure, its defaults, or the globals that its code names."""
    todo: list[Any] = [*_captured(function), *_globals(function, inside).values()]
    while todo:
        value = todo.pop()
        if id(value) in inside:
            return True
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        todo.extend(part for _, part in _parts(value))
    return False


def _globals(function: FunctionType, inside: set[int]) -> dict[str, Any]:
    """The global variables that a function names and that are parts of the model."""
    known = function.__globals__
    return {name: known[name] for name in _names(function.__code__) if name in known and id(known[name]) in inside}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _unbound(function: FunctionType) -> FunctionType:
    """The same code with a closure, defaults and globals of its own, to be filled by `_bind`."""
    closure = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return new


def _bind(function: FunctionType, memo: dict[int, Any], inside: set[int]) -> None:
    """Let the copy of a function read the copies of what the function reads."""
    where = f"{function.__qualname__} ({function.__code__.co_filename}:{function.__code__.co_firstlineno})"
    named = _globals(function, inside)
    if named:
        raise CaptureError(
            f"{where} reads {', '.join(named)} of the model as a global variable: a copy of the model would go on reading the original's.\n"
            f"  Hand it in: as an argument, a default (`lambda x, m=model: ...`), or an attribute of the module."
        )
    new: FunctionType = memo[id(function)]
    try:
        for before, after in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
            if _is_full(before):
                after.cell_contents = copy.deepcopy(before.cell_contents, memo)
        new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        new.__dict__.update(copy.deepcopy(vars(function), memo))
    except Exception as error:
        raise CaptureError(
            f"{where} reads the model through something that cannot be copied: {error}. It would go on reading the original.\n"
            f"  Let it read the module alone, or what it is called with."
        ) from error


# ---- what cannot be copied -------------------------------------------------------------------------------------------------------------


def _try(path: str, value: Any, model: nn.Module, made: dict[int, Any]) -> None:
    """Say what an object becomes, if it cannot be copied as it is. Called for what it holds first."""
    try:
        copy.deepcopy(value, dict(made))
    except Exception as error:
        if isinstance(value, nn.Module):
            _shell(value, made)
        else:
            made[id(value)] = Missing(_MISSING.format(where=_where(path, model), kind=type(value).__name__, error=error))


def _shell(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A module of the same class with copies of its attributes, whatever its own `__deepcopy__` says."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in module.__dict__.items()})
    return new


_DERIVED = (
    "{where}, is a tensor that was computed from parameters before, and the forward reads it without computing it again. A copy of it "
    "would be a constant: what it was computed from would lose its gradient.\n"
    "  Compute it in forward, or keep it detached: x.detach()."
)
_MISSING = (
    "{where}, is a {kind}, which cannot be copied ({error}), and the forward reads it.\n"
    "  Give its class a __deepcopy__, or keep it outside of the model."
)


class Derived(torch.Tensor):
    """In place of a tensor that was computed from parameters: it has a shape and a dtype, and says so when it is used."""

    told: str

    @staticmethod
    def of(tensor: torch.Tensor, told: str) -> Derived:
        """The stand-in for `tensor`."""
        return _derived(tuple(tensor.shape), tensor.dtype, told)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what it looks like; refuse everything else."""
        if func in _LOOKS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise CaptureError(next(a.told for a in _flat((args, kwargs or {})) if isinstance(a, Derived)))

    def __deepcopy__(self, memo: Any) -> Derived:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _derived, (tuple(self.shape), self.dtype, self.told)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Derived({self.told!r})"


def _derived(shape: tuple[int, ...], dtype: torch.dtype, told: str) -> Derived:
    with without_modes(), torch.no_grad():
        new = torch.zeros((), dtype=dtype).expand(shape).as_subclass(Derived)
    new.told = told
    return new


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_TENSOR: Any = torch.Tensor
_LOOKS = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_meta", "requires_grad", "grad")),
    _TENSOR._version.__get__,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("is_leaf", "grad_fn", "is_sparse", "is_quantized", "is_nested", "is_cuda", "is_cpu")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_inference", "element_size")
    ),
    *(getattr(torch.Tensor, name) for name in ("untyped_storage", "data_ptr", "storage_offset", "is_contiguous", "__len__", "__hash__")),
}


class Missing:
    """In place of what cannot be copied: it says so when it is used."""

    def __init__(self, told: str) -> None:
        object.__setattr__(self, "_told", told)

    def __deepcopy__(self, memo: Any) -> Missing:
        return self

    def __reduce__(self) -> Any:
        return Missing, (object.__getattribute__(self, "_told"),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise CaptureError(object.__getattribute__(self, "_told"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # whoever only asks what it can do
        self._refuse()

    __setattr__ = __call__ = __iter__ = __next__ = __enter__ = __getitem__ = __len__ = __bool__ = __exit__ = _refuse
