"""An `autograd.Function` with a backward of its own as one operator: a graph keeps it as a node, and its backward with it.

    y = Clipped.apply(x, 0.1)        ->        y = torch.ops.meshpar_function.Clipped_1f0a9c(x)        (0.1 belongs to the operator)

The operator saves its operands and runs `forward` again before `backward`. Where backward adds terms to the loss (`Nature.shared`), a last
argument says by how much they are multiplied: with m microbatches by 1/m, as other terms of the loss are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meshpar._torch import FakeTensorMode, OpOverload, TorchDispatchMode, draws, forward_alone, takes_a_list, written_arguments
from meshpar.ops.nature import Nature

_NAMESPACE = "meshpar_function"


@dataclass(frozen=True)
class ExampleCall:
    """What an operand looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool


class Unfit(Exception):
    """Why a Function cannot be an operator, and what to do about it."""

    def __init__(self, why: str, instead: str = "") -> None:
        super().__init__(why)
        self.instead = instead or "Make it one with torch.library.custom_op and register_autograd: that stays one node."


HAND_IN = "Draw the numbers outside of it, with torch's own operators, and hand them in as a tensor."


Prove = Callable[["FunctionForms"], Nature]


def operator_of(cls: type[torch.autograd.Function], args: Sequence[Any], prove: Prove) -> Callable[..., Any]:
    """A function that takes the tensors among `args` and returns what `cls.apply(*args)` does, in one operator.

    `prove` says what may be done with it, once for each kind of operands. Raises Unfit for a Function that draws random numbers, overwrites
    its operands, or takes or returns anything but tensors and constants.
    """
    like = tuple(
        ExampleCall(tuple(arg.shape), arg.dtype, arg.device, arg.requires_grad) if isinstance(arg, Tensor) else _constant(arg)
        for arg in args
    )
    return _operator(cls, like, prove)


def function_of_operator(target: Any) -> str:
    """The Function that an operator was made of, by name; the operator's own name for any other."""
    name = str(target)
    if not name.startswith(f"{_NAMESPACE}."):
        return name
    return re.sub(r"_[0-9a-f]{8}_*(_backward)?(\.default)?$", "", name.removeprefix(f"{_NAMESPACE}."))


def is_backward(target: OpOverload) -> bool:
    """Whether an operator is the backward of one that was made here."""
    return target.namespace == _NAMESPACE and target not in _NATURES


def nature_of_operator(target: Any) -> Nature | None:
    """What is known of an operator that was made here; None for any other."""
    return _NATURES.get(target)


_NATURES: dict[OpOverload, Nature] = {}
"""The operators that were made in this process, which are the process's as torch's own are."""


@dataclass(frozen=True)
class _Mapping:
    """A dict among the arguments, as something that can be compared."""

    items: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class _Listing:
    """A list among the arguments, as something that can be compared."""

    items: tuple[Any, ...]


def _constant(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if type(value) in (tuple, torch.Size):
        return tuple(_constant(item) for item in value)
    if type(value) is list:
        return _Listing(tuple(_constant(item) for item in value))
    if type(value) is dict:
        return _Mapping(tuple((key, _constant(item)) for key, item in value.items()))
    raise Unfit(f"it takes a {type(value).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, _Mapping):
        return {key: _plain(item) for key, item in value.items}
    if isinstance(value, _Listing):
        return [_plain(item) for item in value.items]
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


class _Context:
    """The `ctx` of a Function that runs outside of autograd."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Any, ...] = ()
        self._undifferentiable: tuple[Tensor, ...] = ()
        self._fills = True

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        raise Unfit("it overwrites its operands")

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self._undifferentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._fills = value


@dataclass(frozen=True)
class FunctionForms:
    """A Function and what is fixed of its arguments, as two functions of tensors."""

    cls: type[torch.autograd.Function]
    like: tuple[Any, ...]

    @property
    def tensors(self) -> tuple[ExampleCall, ...]:
        """What its operands look like."""
        return tuple(arg for arg in self.like if isinstance(arg, ExampleCall))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results, in memory of their own."""
        _, results = self._run(tensors)
        return _apart([result.detach() for result in results], tensors)

    def backward(self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the operands that need one."""
        context, _ = self._run(tensors)
        found = self._backward(context, grads)
        slots = [i for i, arg in enumerate(self.like) if isinstance(arg, ExampleCall)]
        others = (*tensors, *(grad for grad in grads if grad is not None))
        gradients = [
            torch.zeros_like(tensor) if found[slot] is None else self._fitting(found[slot].detach(), tensor)
            for slot, tensor, example in zip(slots, tensors, self.tensors, strict=True)
            if example.needs_grad
        ]
        return _apart(gradients, others)

    def without(self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> tuple[bool, ...]:
        """The operands that need a gradient, and for which backward returns None."""
        context, _ = self._run(tensors)
        found = self._backward(context, grads)
        slots = (found[i] for i, arg in enumerate(self.like) if isinstance(arg, ExampleCall))
        return tuple(example.needs_grad and gradient is None for example, gradient in zip(self.tensors, slots, strict=True))

    def marks(self, *tensors: Tensor) -> tuple[tuple[bool, ...], bool]:
        """Which results are declared to have no gradient, and whether gradients that do not come are filled with zeros."""
        context, results = self._run(tensors)
        return tuple(any(result is one for one in context._undifferentiable) for result in results), context._fills

    def _backward(self, context: _Context, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        given: Any = self.cls.vjp if self.cls.vjp is not torch.autograd.Function.vjp else self.cls.backward
        with torch.no_grad():
            found = given(context, list(grads)) if takes_a_list(self.cls) else given(context, *grads)
        found = found if isinstance(found, tuple) else (found,)
        return (*found, *(None for _ in range(len(self.like) - len(found))))

    def _fitting(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        """As autograd takes it: in the operand's type, and summed to the operand's shape where it was broadcast."""
        gradient = gradient.to(tensor.dtype)
        return gradient if gradient.shape == tensor.shape else gradient.sum_to_size(tensor.shape)

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What `apply` takes: each operand by itself, needing a gradient if it did, for that is what forward may ask."""
        given = iter(tensors)
        return [next(given).detach().requires_grad_(arg.needs_grad) if isinstance(arg, ExampleCall) else _plain(arg) for arg in self.like]

    def _run(self, tensors: Sequence[Tensor]) -> tuple[_Context, tuple[Tensor, ...]]:
        args = self.arguments(tensors)
        context: Any = _Context(tuple(isinstance(arg, ExampleCall) and arg.needs_grad for arg in self.like))
        with torch.no_grad():
            if self.cls.setup_context is torch.autograd.Function.setup_context:
                results = forward_alone(self.cls)(context, *args)
            else:
                results = forward_alone(self.cls)(*args)
                self.cls.setup_context(context, tuple(args), results)
        results = results if isinstance(results, tuple) else (results,)
        if not all(isinstance(result, Tensor) for result in results):
            raise Unfit("it returns more than tensors")
        return context, results


def _apart(results: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results in memory of their own."""
    memory, found = {other.untyped_storage()._cdata for other in others}, []
    for result in results:
        own = result.clone() if result.untyped_storage()._cdata in memory else result
        memory.add(own.untyped_storage()._cdata)
        found.append(own)
    return tuple(found)


class _Dispatched(TorchDispatchMode):
    """Notes which operators run, and which memory they write to."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[OpOverload] = []
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operators.append(func)
        if isinstance(func, OpOverload):
            self.written.update(tensor.untyped_storage()._cdata for tensor in written_arguments(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


_EACH = frozenset(
    f"aten::{name}"
    for name in (
        "detach clone alias _to_copy lift_fresh where masked_fill view _unsafe_view expand unsqueeze squeeze zeros ones full empty "
        "scalar_tensor zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"
    ).split()
) | {"prim::device"}
"""Operators without torch's tag that treat every element by itself, or make elements of one value. (Whether views keep elements in their
place is seen on drawn values.)"""


@dataclass(frozen=True)
class _ShapeRun:
    """What a run on tensors without values shows."""

    results: int
    undifferentiable: tuple[bool, ...]
    fills: bool
    each: bool
    """Whether all that runs treats every element by itself."""
    without: tuple[bool, ...]
    """The operands that get None for a gradient, though all that come in are there: to autograd they are cut off, which is not zeros."""


@lru_cache(maxsize=512)
def _operator(cls: type[torch.autograd.Function], like: tuple[Any, ...], prove: Prove) -> Callable[..., Any]:
    """Define the operator. (Its name follows from what it is, so that all ranks agree on it.)"""
    function = FunctionForms(cls, like)
    facts = _tried(function)
    nature = prove(function)
    nature = replace(nature, elementwise=nature.elementwise and facts.each)
    text = f"{cls.__module__}.{cls.__qualname__} {like} {_content(cls)}"
    name = f"{_NAMESPACE}::{cls.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    again = 0
    while hasattr(getattr(torch.ops, _NAMESPACE), (name + "_" * again).partition("::")[2]):
        again += 1  # another class of the same name
    call = _defined(name + "_" * again, function, facts, nature)
    _NATURES[call.default] = nature
    if not any((*facts.undifferentiable, *facts.without)):
        return call

    def cut_off(*tensors: Tensor) -> Any:
        results = call(*(one.detach() if not_ else one for one, not_ in zip(tensors, facts.without, strict=True)))
        each = results if isinstance(results, tuple) else (results,)
        return _bare(tuple(one.detach() if not_ else one for one, not_ in zip(each, facts.undifferentiable, strict=True)))

    return cut_off


def _defined(name: str, function: FunctionForms, facts: _ShapeRun, nature: Nature) -> Any:
    count = facts.results
    operands = ", ".join(f"Tensor x{i}" for i in range(len(function.tensors)))
    grads = ", ".join(f"Tensor? grad{i}" for i in range(count))
    needing = [i for i, example in enumerate(function.tensors) if example.needs_grad]
    needed = [i for i in needing if not facts.without[i]] or needing  # (all of them cut off: no gradient will come)
    tags = (torch.Tag.pointwise,) if nature.elementwise else ()
    torch.library.define(name, f"({operands}, float {SHARE}=1.0) -> {_results(count)}", tags=tags)
    torch.library.define(f"{name}_backward", f"({grads}, {operands}, float {SHARE}) -> {_results(len(needed))}")

    def forward(*tensors: Any) -> Any:
        return _bare(function.forward(*tensors[: len(function.tensors)]))

    def backward(*given: Any) -> Any:
        found = dict(zip(needing, function.backward(given[:count], given[count:-1]), strict=True))
        scaled = (found[i] * given[-1] if given[-1] != 1.0 and i in nature.shared else found[i] for i in needed)
        return _bare(tuple(scaled))

    for which, run in ((name, forward), (f"{name}_backward", backward)):
        torch.library.impl(which, "default", run)
        torch.library.register_fake(which, run)
    space, _, short = name.partition("::")
    call, call_backward = (getattr(getattr(torch.ops, space), f"{short}{suffix}") for suffix in ("", "_backward"))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.share = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.outputs = [(one.shape, one.dtype, one.device) for one in (output if isinstance(output, tuple) else (output,))]

    def derivative(ctx: Any, *given: Any) -> tuple[Any, ...]:
        full = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None and facts.fills else grad
            for grad, (shape, dtype, device) in zip(given, ctx.outputs, strict=True)
        ]
        found = call_backward(*full, *ctx.saved_tensors, ctx.share)
        each = iter(found if isinstance(found, tuple) else (found,))
        gradients = [next(each) if i in needed else None for i in range(len(function.tensors))]
        if any(one is None for one in full):  # some results are not used: then None may stay None
            nones = _without(function, tuple(one is not None for one in full))
            gradients = [None if none else gradient for none, gradient in zip(nones, gradients, strict=True)]
        return (*gradients, None)

    torch.library.register_autograd(name, derivative, setup_context=keep)
    return call


@lru_cache(maxsize=512)
def _without(function: FunctionForms, coming: tuple[bool, ...]) -> tuple[bool, ...]:
    """The operands that get None where gradients come for some of the results alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in function.tensors]
        grads = [torch.empty_like(r) if there else None for r, there in zip(function.forward(*tensors), coming, strict=True)]
        return function.without(grads, tensors)


SHARE = "share"
"""The argument that multiplies the gradients of shared operands."""


def _content(cls: type[torch.autograd.Function]) -> list[Any]:
    """What tells classes of one name apart, the same in every process: their code, and the plain values that it closes over."""
    found: list[Any] = []
    for name in ("forward", "backward", "vjp", "setup_context"):
        code = getattr(getattr(cls, name), "__code__", None)
        if code is not None:
            cells = [cell.cell_contents for cell in getattr(cls, name).__closure__ or ()]
            found += [code.co_code.hex(), code.co_names, [c for c in (*code.co_consts, *cells) if isinstance(c, _PLAIN)]]
    return found


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


def _tried(function: FunctionForms) -> _ShapeRun:
    """Run both directions on tensors without values. Raises Unfit for what an operator may not do."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Dispatched() as seen:
        tensors = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in function.tensors]
        seen.operators.clear()
        results = function.forward(*tensors)
        grads = [torch.empty_like(result) for result in results]
        memory = {tensor.untyped_storage()._cdata for tensor in (*tensors, *grads)}
        function.backward(grads, tensors)
        ran = [op for op in seen.operators if isinstance(op, OpOverload)]
        undifferentiable, fills = function.marks(*tensors)
        without = function.without(grads, tensors)
    if any(draws(op) for op in ran):
        raise Unfit("it draws random numbers", HAND_IN)
    if seen.written & memory:
        raise Unfit("it overwrites what it is given")
    each = all(torch.Tag.pointwise in op.tags or op._schema.name in _EACH for op in ran)
    return _ShapeRun(len(results), undifferentiable, fills, each, without)


def _results(count: int) -> str:
    return "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"


def _bare(values: tuple[Tensor, ...]) -> Any:
    return values[0] if len(values) == 1 else values
