"""autograd.Functions in a forward: a graph keeps what they compute and forgets their backward, so that backward must say nothing new.

And `module.to(...)`, which a graph would not see either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from meshpar._torch import FakeTensor, forward_alone, functions_behind, functions_called
from meshpar.capture.blame import here
from meshpar.capture.functions.proofs import draws, nature_of, sizes
from meshpar.capture.functions.state import FunctionState, changed, state_of
from meshpar.capture.stand_in import aside, close
from meshpar.errors import CaptureError
from meshpar.ops.nature import Nature
from meshpar.ops.own_backward import ExampleCall, FunctionForms, Unfit, operator_of


@contextmanager
def casting_nothing() -> Iterator[None]:
    """Inside, `module.to(...)` of what is there already does nothing. Raises CaptureError where it would change a parameter."""
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        tensors = (*self.parameters(recurse), *self.buffers(recurse))
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return original(self, fn, recurse)  # a stand-in
        for before, after in ((tensor, fn(tensor)) for tensor in tensors):
            if (before.dtype, before.device, before.shape) != (after.dtype, after.device, after.shape):
                raise CaptureError(
                    f"The forward turns the parameters of its {type(self).__name__} from {before.dtype} on {before.device} to "
                    f"{after.dtype} on {after.device}{here()}.\n"
                    "  Convert the module once, outside of forward, or cast the values that it computes with."
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def kept(calls: Calls) -> Iterator[None]:
    """Inside, every `autograd.Function` that runs is recorded as what its forward does, if its backward is the derivative of that.

    From wherever its `apply` was kept. One with another backward, one that cannot be compared, and one that reads Python state, becomes one
    operator. The comparison runs on random tensors in float64. Reentrant checkpoints only call what they wrap. Raises CaptureError for a
    Function that is neither.
    """
    with functions_called(calls.answer):
        yield


_INTERNAL = (
    "torch._library torch._functorch torch._higher_order_ops torch.utils.checkpoint torch._prims_common torch._export torch._dynamo "
    "torch._inductor torch.autograd.graph torch.distributed.fsdp meshpar.ops meshpar.pipeline"
).split()
"""Modules whose Functions belong to torch's machinery, or to operators that a graph keeps as they are."""


def _is_internal(cls: type[torch.autograd.Function]) -> bool:
    return any(cls.__module__ == name or cls.__module__.startswith(name + ".") for name in _INTERNAL)


class Calls:
    """The Functions that a forward called, and what became of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.in_cpp: dict[str, None] = {}
        """Functions written in C++, by name: a graph has them if they belong to an operator."""
        self._seen: set[type[torch.autograd.Function]] = set()
        self._answers: dict[tuple[Any, ...], bool] = {}

    def answer(self, apply: Callable[..., Any], cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a Function gives."""
        traced = any(isinstance(arg, FakeTensor) and arg.requires_grad for arg in args)
        if cls is CheckpointFunction:
            with nullcontext() if traced else torch.no_grad():  # nothing inside gets a gradient unless what goes in needs one
                return args[0](*args[2:])
        if _is_internal(cls) or not traced or not torch.is_grad_enabled():
            return apply(*args, **kwargs)
        key = (cls, *(_look(arg) if isinstance(arg, Tensor) else str(arg) for arg in args))
        if key not in self._answers:
            aside(lambda: _refuse_changing(self.model, cls, args))
            self._answers[key] = not state_of(cls) and aside(lambda: _agrees(cls, args))
        self._seen.add(cls)
        if self._answers[key]:
            return apply(*args, **kwargs)
        return _as_operator(self.model, cls, args, kwargs)

    def refuse_unseen(self, results: Iterable[Any]) -> None:
        """Look through the autograd graph of what the forward returned. Raises CaptureError for a Function whose call was not seen."""
        for function in functions_behind(results):
            self._look_at(function)

    def _look_at(self, function: type[torch.autograd.Function] | str | None) -> None:
        if isinstance(function, str) and not function.startswith(("at::", "torch::", "c10")):
            self.in_cpp[function] = None
        elif isinstance(function, type) and function not in self._seen and not _is_internal(function):
            raise CaptureError(
                f"{type(self.model).__name__} cannot be captured: {function.__qualname__} ({function.__module__}) is an autograd.Function "
                "that was not called by its apply, so that its backward would be lost.\n"
                f"  Call {function.__name__}.apply."
            )


def _look(tensor: Tensor) -> ExampleCall:
    return ExampleCall(tuple(int(n) for n in tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _as_operator(model: nn.Module, cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    modules = [arg for arg in args if isinstance(arg, nn.Module)]
    if modules:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured{here()}: {cls.__qualname__} ({cls.__module__}) is an autograd.Function that is "
            f"handed a {type(modules[0]).__name__}. What its backward does with the parameters in there is seen neither in a graph nor "
            "in an operator, whose gradients are those of the tensors that it is given.\n"
            "  Call the modules in forward itself and leave the Function out. If it is there to save memory (reversible layers), "
            'ParallelConfig(recompute="full") does that.'
        )
    try:
        if kwargs:
            raise Unfit(f"it takes {', '.join(kwargs)} by keyword alone")
        call = aside(lambda: operator_of(cls, args, nature_of_function))
    except Exception as error:
        unfit = error if isinstance(error, Unfit) else Unfit(f"{type(error).__name__}: {error}")
        raise CaptureError(
            f"{type(model).__name__} cannot be captured{here()}: {cls.__qualname__} ({cls.__module__}) is an autograd.Function whose "
            f"backward is not the derivative of its forward, and no operator can be made of it: {unfit}.\n"
            f"  {unfit.instead}"
        ) from error
    return call(*(arg for arg in args if isinstance(arg, Tensor)))


def nature_of_function(function: FunctionForms) -> Nature:
    """What is proved of a Function. What it reads from Python may change later: nothing is linear for ever then.

    Raises Unfit where running its methods one by one does not give what its `apply` does.
    """
    found = nature_of(function)
    for examples in sizes(function.tensors):
        verdicts = [_as_applied(function, values) for values in draws(examples)]
        if False in verdicts:
            raise Unfit("run outside of autograd, its backward gives other gradients than under it")
        if True in verdicts:
            break
    return replace(found, linear=False) if state_of(function.cls) else found


def _as_applied(function: FunctionForms, values: Sequence[Tensor]) -> bool | None:
    """Whether the Function gives, as an operator will run it, what it gives under autograd; None where it does not run on these values."""
    generator = torch.Generator().manual_seed(4)
    try:
        args = function.arguments(values)
        with torch.enable_grad():
            theirs = _tensors(function.cls.apply(*args))
        given = [torch.randn(r.shape, dtype=torch.double, generator=generator).to(r.dtype) if r.requires_grad else None for r in theirs]
        pairs = [(result, grad) for result, grad in zip(theirs, given, strict=True) if grad is not None]
        wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        right = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True)
        _, fills = function.marks(*values)
        filled = [torch.zeros_like(r) if g is None and fills else g for r, g in zip(theirs, given, strict=True)]
        found = function.backward(filled, values)
    except Exception:  # whatever it is, there is nothing to compare
        return None
    if not all(bool(torch.isfinite(value).all()) for value in (*theirs, *right)):
        return None
    return close(found, right, _NEAR) and close(function.forward(*values), [r.detach() for r in theirs], _NEAR)


# -- a backward that is the derivative ----------------------------------------------------------------------------------------------------


class _LoneContext:
    """The `ctx` of a forward that runs by itself."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    mark_non_differentiable = mark_dirty = set_materialize_grads = save_for_forward = save_for_backward


def _agrees(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> bool:
    """Whether backward gives the derivative of forward, wherever both could be had, for gradients of any size."""
    for examples in sizes([_look(arg) for arg in args if isinstance(arg, Tensor)]):
        verdicts = [_agrees_at(cls, _with(args, values, examples)) for values in draws(examples)]
        if False in verdicts:
            return False
        if True in verdicts:
            return True
    return False


def _with(args: tuple[Any, ...], values: Sequence[Tensor], examples: Sequence[ExampleCall]) -> tuple[Any, ...]:
    made = iter([value.requires_grad_(example.needs_grad) for value, example in zip(values, examples, strict=True)])
    return tuple(next(made) if isinstance(arg, Tensor) else arg for arg in args)


def _agrees_at(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> bool | None:
    """Whether both derivatives are the same at `args`; None where one of them is not a number, or cannot be had."""
    try:
        with torch.enable_grad():
            theirs = _tensors(cls.apply(*args))
            leading = (_LoneContext(args),) if cls.setup_context is torch.autograd.Function.setup_context else ()
            # Without writes in place, which autograd would refuse where they follow what was saved.
            plain = _tensors(torch.func.functionalize(lambda *given: forward_alone(cls)(*leading, *given))(*args))
        if [t.requires_grad for t in theirs] != [t.requires_grad for t in plain] or not close(theirs, plain, _NEAR):
            return False
        return _same_derivatives(theirs, plain, [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad])
    except Exception:  # whatever it is, the two could not be compared
        return None


def _same_derivatives(theirs: Sequence[Tensor], plain: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool | None:
    generator = torch.Generator().manual_seed(2)
    for scale in (1.0, 1e-6, 1e6):
        pairs = [(a, b) for a, b in zip(theirs, plain, strict=True) if a.requires_grad]
        given = [torch.randn(a.shape, dtype=torch.double, generator=generator).to(a.dtype) * scale for a, _ in pairs]
        found, right = (
            torch.autograd.grad(list(results), wanted, given, retain_graph=True, allow_unused=True) for results in zip(*pairs, strict=True)
        )
        if [one is None for one in found] != [one is None for one in right]:  # zeros are a gradient, to an optimizer
            return False
        ours, derived = ([one for one in gradients if one is not None] for gradients in (found, right))
        if not all(bool(torch.isfinite(value).all()) for value in derived):
            return None
        if not close(ours, derived, _NEAR):
            return False
    return True


_NEAR = 1e-4


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]


# -- Python state -------------------------------------------------------------------------------------------------------------------------


def _refuse_changing(model: nn.Module, cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> None:
    """Run both directions twice, and see what the second time changes (the first may fill a cache)."""
    values = next(iter(draws(next(iter(sizes([_look(arg) for arg in args if isinstance(arg, Tensor)]))))))
    given = _with(args, values, [_look(arg) for arg in args if isinstance(arg, Tensor)])
    before: FunctionState = {}
    for _ in range(2):
        before = state_of(cls)
        try:
            with torch.enable_grad():
                parts = [part for part in _tensors(cls.apply(*given)) if part.requires_grad]
            torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
        except Exception:  # it does not run on drawn values: nothing is seen
            return
    names = changed(before, state_of(cls))
    if names:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {cls.__qualname__} ({cls.__module__}) is an autograd.Function that changes "
            f"{', '.join(names)} when it runs. A parallel program runs it once for every microbatch on every rank, and its forward once "
            "more in backward: it would change that as often.\n"
            "  Count and log outside of the Function, in the training loop."
        )
