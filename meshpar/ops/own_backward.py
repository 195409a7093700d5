"""An `autograd.Function` with a backward of its own as one operator: a graph keeps it as a node, and its backward with it.

    y = Clipped.apply(x, 0.1)        ->        y = torch.ops.meshpar_function.Clipped_1f0a9c(x)        (0.1 belongs to the operator)

The operator saves its operands and runs `forward` again before `backward`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._torch import FakeTensorMode, OpOverload, TorchDispatchMode

_NAMESPACE = "meshpar_function"


@dataclass(frozen=True)
class Example:
    """What an operand looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool


class Unfit(Exception):
    """Why a Function cannot be an operator."""


def operator_of(cls: type[torch.autograd.Function], args: Sequence[Any]) -> Callable[..., Any]:
    """A function that takes the tensors among `args` and returns what `cls.apply(*args)` does, in one operator.

    Raises Unfit for a Function that draws random numbers, overwrites its operands, or takes or returns anything but tensors and constants.
    """
    like = tuple(
        Example(tuple(arg.shape), arg.dtype, arg.device, arg.requires_grad) if isinstance(arg, Tensor) else _constant(arg) for arg in args
    )
    return _operator(cls, like)


@dataclass(frozen=True)
class _Mapping:
    """A dict among the arguments, as something that can be compared."""

    items: tuple[tuple[Any, Any], ...]


def _constant(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if type(value) in (tuple, torch.Size):
        return tuple(_constant(item) for item in value)
    if type(value) is dict:
        return _Mapping(tuple((key, _constant(item)) for key, item in value.items()))
    raise Unfit(f"it takes a {type(value).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, _Mapping):
        return {key: _plain(item) for key, item in value.items}
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


class _Context:
    """The `ctx` of a Function that runs outside of autograd."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        raise Unfit("it overwrites its operands")

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    set_materialize_grads = save_for_forward = mark_non_differentiable


@dataclass(frozen=True)
class _Function:
    """A Function and what is fixed of its arguments."""

    cls: type[torch.autograd.Function]
    like: tuple[Any, ...]

    @property
    def tensors(self) -> tuple[Example, ...]:
        return tuple(arg for arg in self.like if isinstance(arg, Example))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, results = self._run(tensors)
        return tuple(_apart(result, tensors) for result in results)

    def backward(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the operands that need one."""
        context, _ = self._run(tensors)
        found = self.cls.backward(context, *grads)
        found = found if isinstance(found, tuple) else (found,)
        slots = [i for i, arg in enumerate(self.like) if isinstance(arg, Example)]
        return tuple(
            _apart(torch.zeros_like(tensor) if found[slot] is None else found[slot].to(tensor.dtype), (*tensors, *grads))
            for slot, tensor, example in zip(slots, tensors, self.tensors, strict=True)
            if example.needs_grad
        )

    def _run(self, tensors: Sequence[Tensor]) -> tuple[_Context, tuple[Tensor, ...]]:
        given = iter(tensors)
        args = [next(given).detach() if isinstance(arg, Example) else _plain(arg) for arg in self.like]
        context = _Context(tuple(isinstance(arg, Example) and arg.needs_grad for arg in self.like))
        with torch.no_grad():
            if self.cls.setup_context is torch.autograd.Function.setup_context:
                results = self.cls.forward(context, *args)
            else:
                results = self.cls.forward(*args)
                self.cls.setup_context(context, tuple(args), results)
        results = results if isinstance(results, tuple) else (results,)
        if not all(isinstance(result, Tensor) for result in results):
            raise Unfit("it returns more than tensors")
        return context, results


def _apart(result: Tensor, others: Sequence[Tensor]) -> Tensor:
    """A result in memory of its own."""
    memory = {other.untyped_storage()._cdata for other in others}
    return result.clone() if result.untyped_storage()._cdata in memory else result


class _Seen(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


_COPIES = {"aten::detach", "aten::clone", "aten::alias", "aten::_to_copy", "aten::empty_like", "aten::zeros_like", "prim::device"}


@lru_cache(maxsize=512)
def _operator(cls: type[torch.autograd.Function], like: tuple[Any, ...]) -> Callable[..., Any]:
    """Define the operator. (Its name follows from what it is, so that all ranks agree on it.)"""
    function = _Function(cls, like)
    count, elementwise = _tried(function)
    text = f"{cls.__module__}.{cls.__qualname__} {like} {_content(cls)}"
    name = f"{_NAMESPACE}::{cls.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    again = 0
    while hasattr(getattr(torch.ops, _NAMESPACE), (name + "_" * again).partition("::")[2]):
        again += 1  # another class of the same name
    name += "_" * again
    operands = ", ".join(f"Tensor x{i}" for i in range(len(function.tensors)))
    grads = ", ".join(f"Tensor grad{i}" for i in range(count))
    needed = sum(example.needs_grad for example in function.tensors)
    torch.library.define(name, f"({operands}) -> {_results(count)}", tags=(torch.Tag.pointwise,) if elementwise else ())
    torch.library.define(f"{name}_backward", f"({grads}, {operands}) -> {_results(needed)}")

    def forward(*tensors: Tensor) -> Any:
        return _bare(function.forward(*tensors))

    def backward(*tensors: Tensor) -> Any:
        return _bare(function.backward(tensors[:count], tensors[count:]))

    for which, run in ((name, forward), (f"{name}_backward", backward)):
        torch.library.impl(which, "default", run)
        torch.library.register_fake(which, run)
    space, _, short = name.partition("::")
    call, call_backward = (getattr(getattr(torch.ops, space), f"{short}{suffix}") for suffix in ("", "_backward"))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.outputs = [(one.shape, one.dtype, one.device) for one in (output if isinstance(output, tuple) else (output,))]

    def derivative(ctx: Any, *given: Any) -> tuple[Any, ...]:
        full = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(given, ctx.outputs, strict=True)
        ]
        found = call_backward(*full, *ctx.saved_tensors)
        each = iter(found if isinstance(found, tuple) else (found,))
        return tuple(next(each) if example.needs_grad else None for example in function.tensors)

    torch.library.register_autograd(name, derivative, setup_context=keep)
    return call


def _content(cls: type[torch.autograd.Function]) -> list[Any]:
    """What tells classes of one name apart, the same in every process: their code, and the plain values that it closes over."""
    found: list[Any] = []
    for name in ("forward", "backward", "setup_context"):
        code = getattr(getattr(cls, name), "__code__", None)
        if code is not None:
            cells = [cell.cell_contents for cell in getattr(cls, name).__closure__ or ()]
            found += [code.co_code.hex(), code.co_names, [c for c in (*code.co_consts, *cells) if isinstance(c, _PLAIN)]]
    return found


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


def _tried(function: _Function) -> tuple[int, bool]:
    """How many results there are, and whether both directions treat every element by itself."""
    with FakeTensorMode(), _Seen() as seen:
        tensors = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in function.tensors]
        seen.operators.clear()
        results = function.forward(*tensors)
        grads = [torch.empty_like(result) for result in results]
        function.backward(grads, tensors)
    names = {op: op._schema.name for op in seen.operators if isinstance(op, OpOverload)}
    if any(torch.Tag.nondeterministic_seeded in op.tags for op in names):
        raise Unfit("it draws random numbers")
    alone = all(torch.Tag.pointwise in op.tags or name in _COPIES for op, name in names.items())
    return len(results), alone and len({tuple(tensor.shape) for tensor in (*tensors, *results)}) == 1


def _results(count: int) -> str:
    return "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"


def _bare(values: tuple[Tensor, ...]) -> Any:
    return values[0] if len(values) == 1 else values
