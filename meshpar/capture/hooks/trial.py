"""A hook tried on gradients without memory: does it treat every element by itself, whatever the shape, and keep nothing?

Then it may be handed parts. The trial must leave no traces: lists, counters and the like that the hook can reach are put back.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from types import FunctionType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from meshpar._torch import FakeTensor, FakeTensorMode, pytree
from meshpar.errors import CaptureError
from meshpar.graph.facts import Info
from meshpar.ops.hooks import Hook, HookCall, HookWatch, alone, refuse_reading, replaced

_LINEAR = frozenset({"aten::mul", "aten::div", "aten::neg", "aten::clone", "aten::detach", "aten::alias"})
"""Operators that are linear in their first operand, as long as it is the only tensor."""

Shapes = tuple[tuple[int, ...], ...]


def judged(hook: Hook, infos: Sequence[Info], fns: tuple[Callable[..., Any], ...], call: HookCall) -> tuple[bool, bool]:
    """Whether `call` treats every element of its gradients by itself, and whether it is linear too. `fns`: what the user registered.

    Raises CaptureError for one that reads tensors of the forward or of the model, or overwrites what it is handed.
    """
    shapes = tuple(info.shape for info in infos)
    first: list[Any] | None = None
    linear = True
    with untouched(fns), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for variant in _variants(shapes):
            tried = _Trial(hook, call)
            if not tried.ran(variant, infos):
                return False, False
            first, linear = first or tried.log, linear and tried.linear
            if tried.log != first:
                return False, False  # what it does depends on the shape
    return True, linear


def _variants(shapes: Shapes) -> Iterator[Shapes]:
    """The shapes of the gradients, all dims doubled, and one dim after the other halved."""
    yield shapes
    yield tuple(tuple(2 * n for n in shape) for shape in shapes)
    for dim in range(max(map(len, shapes), default=0)):
        yield tuple(tuple(-(-n // 2) if d == dim else n for d, n in enumerate(shape)) for shape in shapes)


class _Trial(HookWatch):
    """One call on gradients of some shape."""

    def __init__(self, hook: Hook, call: HookCall) -> None:
        super().__init__(hook, (), parts=False)
        self.call = call
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.log: list[Any] = []
        self.alone = self.linear = True

    def ran(self, shapes: Shapes, infos: Sequence[Info]) -> bool:
        """Whether it ran to its end, changed something, kept nothing, and treated every element by itself."""
        with self.mode:
            grads = tuple(torch.empty(shape, dtype=info.dtype) for shape, info in zip(shapes, infos, strict=True))
        self.memory = {grad.untyped_storage()._cdata for grad in grads}
        try:
            with torch.no_grad(), self.mode, self:
                returned = self.call(grads)
        except CaptureError:
            raise
        except Exception:  # it asks for values, or wants another shape: it needs the whole
            return False
        results = [one for one in returned or () if one is not None]
        if not results:
            return False
        replaced(self.hook.told, grads, returned)
        watched = [ref(one) for one in (*grads, *results)]
        del grads, returned, results
        return self.alone and not any(one() is not None for one in watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.log.append((func, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]))
        self.alone &= alone(func) and len({tuple(one.shape) for one in tensors if one.dim()}) <= 1
        self.linear &= func._schema.name in _LINEAR and len(tensors) == 1 and isinstance(leaves[0], Tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _look(self, tensor: Tensor) -> None:
        if isinstance(tensor, FakeTensor):
            if tensor.fake_mode is not self.mode:
                refuse_reading(self.hook, "a tensor of the forward or of the model")
            return
        super()._look(tensor)
        self.alone &= tensor.dim() == 0


# ---- no traces -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def untouched(fn: Any) -> Iterator[None]:
    """Inside, `fn` may be called; afterwards the containers, counters and attributes that it can reach are what they were."""
    restore = [*_restorers(fn, set(), 3)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _restorers(value: Any, seen: set[int], depth: int) -> Iterator[Callable[[], Any]]:
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, partial):
        yield from _restorers((value.func, *value.args, *value.keywords.values()), seen, depth)
    elif isinstance(value, FunctionType):
        yield from _of_function(value, seen, depth)
    elif isinstance(value, tuple):
        for one in value:
            yield from _restorers(one, seen, depth)
    elif isinstance(value, (list, deque, set)):
        yield partial(_refill, value, [*value])
    elif isinstance(value, dict):
        yield partial(_refill, value, dict(value))
    elif (own := getattr(value, "__self__", None)) is not None and not isinstance(own, ModuleType):
        yield from _restorers((own, getattr(value, "__func__", None)), seen, depth)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (type, ModuleType, Tensor)):
        yield partial(_refill, value.__dict__, dict(value.__dict__))
        yield from _restorers((*value.__dict__.values(), vars(type(value)).get("__call__")), seen, depth - 1)


def _of_function(fn: FunctionType, seen: set[int], depth: int) -> Iterator[Callable[[], Any]]:
    for cell in fn.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # empty
            continue
        yield partial(setattr, cell, "cell_contents", inside)
        yield from _restorers(inside, seen, depth - 1)
    yield from _restorers(fn.__defaults__ or (), seen, depth)
    for name in fn.__code__.co_names:
        if name in fn.__globals__ and not isinstance(fn.__globals__[name], (ModuleType, type)):
            yield partial(fn.__globals__.__setitem__, name, fn.__globals__[name])
            yield from _restorers(fn.__globals__[name], seen, depth - 1)


def _refill(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(before)
