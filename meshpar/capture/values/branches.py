"""Branches on values: a forward that asks a tensor for its value is answered with that of the example, and the graph checks it ever after.

    if labels.max() >= 100: raise ...        ->     expect(ge(max(labels), 100), [False], "model.py:7")
    if (mask == other).all(): ...            ->     computed from nothing but numbers: always the same, so no check

The value is computed from the graph as far as it has been recorded, when asked for, and only what it depends on. Integers become constants
when they depend on the batch alone; those that depend on parameters would change with every step.

With several microbatches the question is that of a microbatch, as it would be for the model on one device fed with microbatches.

`follow`: sizes that depend on values become those of the example, as well (see `counts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import meshpar.ops.expect  # noqa: F401  (registers meshpar::expect)
from meshpar._torch import FakeTensor, OpOverload, draws, enter_autocast, exit_autocast, overwrites, recorded_as, written_arguments
from meshpar.capture import blame
from meshpar.capture.stand_in import aside, filled
from meshpar.capture.values import counts
from meshpar.errors import CaptureError

aten = torch.ops.aten


def _is_row(data: Any) -> bool:
    """Whether `torch.tensor(data)` makes a row of single tensors, which it would read one by one."""
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(one, Tensor) and one.dim() == 0 for one in data)


def _row(data: Sequence[Tensor], *, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False, **_: Any) -> Tensor:
    made = torch.stack([one.detach() for one in data]).to(device=device, dtype=dtype)
    return made.requires_grad_() if requires_grad else made


class RanksDiffer(CaptureError):
    """The examples of the data ranks lead to different graphs."""


class Branches(TorchFunctionMode):
    """Answers questions about values while a forward is recorded.

    `parameters` and `inputs`: the real tensors behind the placeholders of the recorded graph, in their order; on meta (or None) where there
    are none: parameters are then guessed. Raises CaptureError for a question whose answer is drawn at random.
    """

    def __init__(
        self, parameters: Sequence[Tensor], inputs: Sequence[Tensor | None], device: torch.device, *, follow: bool = False
    ) -> None:
        super().__init__()
        self.sized = False
        """Whether something was made whose size depends on values."""
        self._follow = follow
        self._numbers: dict[fx.Node, torch.SymInt] = {}
        self._parameters = len(parameters)
        self._leaves = (*parameters, *inputs)
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
        self._computed: dict[fx.Node, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPARISONS and all(isinstance(arg, Tensor) for arg in args[:2]) and args[0].shape == args[1].shape:
            return self.__torch_function__(Tensor.__bool__, types, (_COMPARISONS[func](*args, **kwargs).all(),))
        if func in _INDEXING:
            args = (args[0], self._bounded(args[1]), *args[2:])
        if func is torch.tensor and args and _is_row(args[0]):
            return _row(args[0], **kwargs)
        if func in _MAKING:
            args, kwargs = self._plain(args), self._plain(kwargs)
        if func in _SHAPING:
            args, kwargs = (*args[:1], *self._plain(args[1:])), self._plain(kwargs)
        if counts.is_sized_by_values(func, args, kwargs):
            self.sized = True
            found = counts.followed(func, args, kwargs, self._of_batch) if self._follow else None
            mask = counts.mask_of(*args) if len(args) == 2 else None
            return found if found is not None else self._counted(func(*args, **kwargs), mask)
        if func in _QUESTIONS and args and isinstance(args[0], Tensor):
            found = self._answer(args[0], numbers=func not in _TRUTHS)
            if found is not None:
                return aside(lambda: func(found))
        return func(*args, **kwargs)

    def _answer(self, tensor: Tensor, *, numbers: bool) -> Tensor | None:
        """The value of `tensor` for the example, or None where there is none, or none that would hold. It is checked ever after."""
        recorded = recorded_as(tensor)
        if recorded is None or any(not isinstance(n, int) for n in tensor.shape):
            return None
        tape = _tape(recorded[0])
        places = {one: place for place, one in enumerate(n for n in recorded[0].graph.nodes if n.op == "placeholder")}
        sources = [places[one] for one in tape if one in places]
        drawn = any(_draws(one) for one in tape)
        settled = not sources and (not drawn or all(_compares(one) for one in tape))
        varies = drawn or any(place < self._parameters for place in sources)
        if (sources or drawn) and not numbers and tensor.dtype != torch.bool:
            return self._answer(tensor != 0, numbers=False)
        if (sources or drawn) and numbers and (tensor.dtype.is_floating_point or (varies and tensor.dtype != torch.bool)):
            return None
        value = self._drawn(*recorded, tape, places) if drawn else self._run(*recorded, tape, places)
        if value is not None and not settled:
            torch.ops.meshpar.expect(tensor, _elements(value), blame.here())
        return value

    def _counted(self, chosen: Any, mask: Tensor | None) -> Any:
        """Rows chosen by a mask, and by the same mask again: their numbers are the same."""
        recorded = None if mask is None else recorded_as(mask)
        if recorded is not None and not isinstance(chosen.shape[0], int):
            torch._check(chosen.shape[0] == self._numbers.setdefault(recorded[0], chosen.shape[0]))
        return chosen

    def _bounded(self, index: Any) -> Any:
        """`x[:n]` where `n` is a tensor."""
        if isinstance(index, tuple):
            return tuple(self._bounded(one) for one in index)
        if not isinstance(index, slice) or not any(isinstance(one, Tensor) for one in (index.start, index.stop, index.step)):
            return index
        return slice(*(self._number(one) for one in (index.start, index.stop, index.step)))

    def _plain(self, value: Any) -> Any:
        """Sizes that are given as tensors."""
        if isinstance(value, tuple | list):
            return type(value)(self._plain(one) for one in value) if type(value) in (tuple, list) else value
        if isinstance(value, dict):
            return {name: self._plain(one) for name, one in value.items()}
        integer = isinstance(value, Tensor) and value.dim() == 0 and not (value.dtype.is_floating_point or value.dtype.is_complex)
        return self._number(value) if integer and value.dtype != torch.bool else value

    def _number(self, value: Any) -> Any:
        found = self._answer(value, numbers=True) if isinstance(value, Tensor) else None
        return value if found is None else aside(lambda: int(found))

    def _of_batch(self, tensor: Tensor) -> list[int] | None:
        """The elements of what is made of the batch alone, and not of measured values, which are never the same twice."""
        recorded = recorded_as(tensor)
        if recorded is None:
            return None
        tape = _tape(recorded[0])
        places = {one: place for place, one in enumerate(n for n in recorded[0].graph.nodes if n.op == "placeholder")}
        if any(_draws(one) for one in tape) or any(places.get(one, self._parameters) < self._parameters for one in tape):
            return None
        if _measures(tape):
            return None
        value = self._run(*recorded, tape, places)
        return None if value is None else _elements(value)

    def _drawn(self, node: fx.Node, root: nn.Module, tape: Sequence[fx.Node], places: Mapping[fx.Node, int]) -> Tensor | None:
        """What `node` is for the smallest draws as well as for the largest."""
        bounded = all(_op_name(one) in _BOUNDED for one in tape if _draws(one))
        low, high = (self._run(node, root, tape, places, draw) for draw in (0.0, math.nextafter(1.0, 0.0)))
        if low is None or high is None:
            return None
        if not bounded or not aside(lambda: torch.equal(low, high)):
            raise CaptureError(
                f"The forward draws a random number to decide what to do{blame.here()}.\n"
                "  A graph holds one way. Switch the drawing off (for instance layerdrop = 0), or multiply by the draw instead."
            )
        return low

    def _run(
        self, node: fx.Node, root: nn.Module, tape: Sequence[fx.Node], places: Mapping[fx.Node, int], draw: float | None = None
    ) -> Tensor | None:
        """Compute `node`. What was computed before is taken as it is, unless something is overwritten or drawn on the way."""
        pure = draw is None and not any(overwrites(one.target) for one in tape)
        known = self._computed if pure else {}

        def compute() -> Tensor | None:
            values = dict(known)
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread alone
            with torch.no_grad():
                for one in tape:
                    if one in values:
                        continue
                    if one.op == "placeholder":
                        value = self._leaf(one, places[one])
                        value = value if pure or value is None else value.clone()
                    elif one.op == "get_attr":
                        value = _attribute(root, str(one.target))
                    elif draw is not None and _draws(one):
                        value = torch.full(one.meta["val"].shape, draw, dtype=one.meta["val"].dtype, device=self._device)
                    else:
                        args, kwargs = map_arg((one.args, one.kwargs), values.__getitem__)
                        value = one.target(*args, **kwargs)  # type: ignore[operator]
                    if value is None and one.target is not exit_autocast:
                        return None
                    values[one] = value
            if pure:
                known.update((one, value) for one, value in values.items() if one.target not in _CONTEXT)
            return values[node]

        return aside(compute)

    def _leaf(self, node: fx.Node, place: int) -> Tensor | None:
        real, fake = self._leaves[place] if place < len(self._leaves) else None, node.meta.get("val")
        if real is None or isinstance(real, FakeTensor) or not isinstance(fake, Tensor):
            return None
        if real.is_meta and place < self._parameters:  # whichever way it goes is checked later
            guess = filled(torch.empty(fake.shape, dtype=fake.dtype, device="meta"), torch.Generator().manual_seed(place), hollow=True)
            return guess.to(self._device)
        if real.is_meta:
            return None
        real = real.detach().to(self._device, fake.dtype)
        return real if real.shape == fake.shape else _resized(real, fake.shape)


def _elements(value: Tensor) -> list[int]:
    """The numbers in a tensor; simulated ranks may not all have the same."""
    found = aside(lambda: value.flatten().tolist())
    if not all(isinstance(n, int | float | complex) for n in found):
        raise RanksDiffer(
            f"The forward asks for a value that is not the same for every data rank{blame.here()}.\n"
            "  A graph holds one way. Give every rank a batch with the same value there, use one data rank, or torch.where in the model."
        )
    return [int(n) for n in found]


def settled(tensor: Tensor) -> bool:
    """Whether `tensor` is made of nothing but numbers: the same in every forward."""
    recorded = recorded_as(tensor)
    return recorded is not None and not any(one.op == "placeholder" or _draws(one) for one in _tape(recorded[0]))


def made_of(tensor: Tensor, original: Tensor) -> bool:
    """Whether `tensor` is computed from `original`, a constant of the graph."""
    recorded = recorded_as(tensor)
    if recorded is None:
        return False
    memory = original.untyped_storage()._cdata
    constants = (_attribute(recorded[1], str(one.target)) for one in _tape(recorded[0]) if one.op == "get_attr")
    return any(one is not None and one.untyped_storage()._cdata == memory for one in constants)


def cast_of(tensor: Tensor, original: Tensor) -> bool:
    """Whether `tensor` is `original` in another type."""
    recorded, source = recorded_as(tensor), recorded_as(original)
    if recorded is None or source is None:
        return False
    node = recorded[0]
    return _op_name(node) in ("to", "_to_copy") and node.args[0] is source[0]


def _resized(real: Tensor, shape: Sequence[int]) -> Tensor | None:
    """More or fewer samples: those that there are, over and over."""
    if len(shape) != real.dim() or 0 in real.shape:
        return None
    for dim, n in enumerate(shape):
        if n != real.shape[dim]:
            real = real.index_select(dim, torch.arange(n, device=real.device) % real.shape[dim])
    return real


def _attribute(root: nn.Module, name: str) -> Tensor | None:
    """A tensor that the forward made of Python data."""
    value = getattr(root, name, None)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta else None


def _tape(node: fx.Node) -> list[fx.Node]:
    """What has to run to compute `node`, in order: what it reads, and what has written to the memory of that before."""
    wanted, memory = {node}, {*_memory(node)}
    for one in reversed(node.graph.nodes):
        if one not in wanted and one.target not in _CONTEXT and not memory & _written(one):
            continue
        wanted.add(one)
        for source in one.all_input_nodes:
            wanted.add(source)
            memory |= _memory(source)
    return [one for one in node.graph.nodes if one in wanted]


def _memory(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    tensors = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _written(node: fx.Node) -> set[int]:
    """The memory a node writes to."""
    if not overwrites(node.target):
        return set()
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return {tensor.untyped_storage()._cdata for tensor in written_arguments(node.target, args, kwargs)}  # type: ignore[arg-type]


def _draws(node: fx.Node) -> bool:
    """Whether a node draws numbers, other than which elements to drop."""
    if node.target is aten.scaled_dot_product_attention.default:
        return False
    return draws(node.target) and "dropout" not in _op_name(node)


def _op_name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, OpOverload) else ""


def _measures(tape: Sequence[fx.Node]) -> bool:
    """Whether integers or booleans are made of floating inputs, other than by looking for a value that stands for none."""
    floating: set[fx.Node] = set()
    for one in tape:
        value = one.meta.get("val")
        wide = isinstance(value, Tensor) and value.dtype.is_floating_point
        if one.op == "placeholder" or any(source in floating for source in one.all_input_nodes):
            if wide:
                floating.add(one)
            elif one.op != "placeholder" and _op_name(one) not in ("eq", "ne", "isnan", "isinf", "isfinite"):
                return True
    return False


def _compares(node: fx.Node) -> bool:
    """Whether a node draws a number between 0 and 1, or compares one with a constant: what holds for both ends holds for all."""
    return _op_name(node) in _BOUNDED or (_op_name(node) in ("lt", "le", "gt", "ge") and _op_name(node.all_input_nodes[0]) in _BOUNDED)


_BOUNDED = frozenset({"rand", "rand_like"})
_CONTEXT = (enter_autocast, exit_autocast)

_MAKING = frozenset({torch.zeros, torch.ones, torch.empty, torch.arange, torch.linspace})
_SHAPING = frozenset(
    {torch.narrow, Tensor.narrow, Tensor.view, Tensor.reshape, Tensor.expand, Tensor.repeat, functional.interpolate, functional.pad}
    | {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty}
)
"""Functions whose integers are sizes: all, and all but the first argument."""
_INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_COMPARISONS: Mapping[Any, Callable[..., Tensor]] = {
    Tensor.equal: torch.eq,
    torch.equal: torch.eq,
    torch.allclose: torch.isclose,
    Tensor.allclose: torch.isclose,
}
_TRUTHS = frozenset({Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero})
_QUESTIONS = _TRUTHS | {Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist}
