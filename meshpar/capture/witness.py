"""What a forward does for a batch of other sizes, found by running it on tensors without memory: no export and no graph.

    witness = testify(model, (), batch, device="cpu")
    witness.calls         every operator in order, which value each takes, and all that is no number
    witness.numbers       every number among arguments and shapes, in the same order

Two batches for which the calls are equal are computed by one program whose numbers differ. Where Python branches on a size the calls
differ; where it computes with one, the number is there. Gradients switched off, values of tensors made of Python data, draws: all of it is
in the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshpar._torch import OpOverload, TorchDispatchMode, as_if_exporting, checkpoints_only_call, pytree
from meshpar.capture import decompositions, fake, structure
from meshpar.capture.batch import ReadBatch, maybe_packed, read_batch
from meshpar.capture.experts import seam as experts
from meshpar.capture.recorder import ForwardRecorder, Returned
from meshpar.capture.state import taken as state
from meshpar.graph.captured import Captured
from meshpar.graph.text import digest

_META = torch.device("meta")


class Unseen(Exception):
    """The forward cannot be watched in this way; the reason, for the user."""


@dataclass(frozen=True)
class Witness:
    """What a forward did for one batch."""

    batch: ReadBatch
    outcome: Returned
    state: state.State
    calls: tuple[Any, ...]
    numbers: tuple[int | float, ...]
    experts: Mapping[str, str] = field(default_factory=dict)


def testify(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    device: torch.device,
    scale: int,
    divide: int,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    dtype: torch.dtype | None,
    like: Captured,
    ask: state.Ask,
) -> Witness:
    """Run the forward of `model`, as `capture` would, on shapes alone. `like`: its capture for a batch of another shape.

    Raises Unseen where the batch is read in another way now, and where the forward asks for the value of a tensor.
    """
    batch = read_again(model, args, kwargs, like, scale=scale, divide=divide)
    recording = state.Recording(ask)
    if recording.slots():
        raise Unseen("it takes numbers of Python as inputs")
    inputs = [_hollow(leaf, shape, dtype) for leaf, shape in zip(batch.tensors, batch.shapes, strict=True)]
    watch = _Watch()
    try:
        with (
            state.without_autocast(),
            _hollowed(model, dtype),
            experts.seam(model) as found,
            torch.inference_mode(False),
            torch.enable_grad(),
            as_if_exporting(),
            decompositions.Written(),
            checkpoints_only_call(),
            OnDevice(device),
            watch,
        ):
            recorder = ForwardRecorder(model, batch, loss_fn, recording)
            recorder.functions = AsksNothing()  # type: ignore[assignment]
            watch.name(dict(zip(batch.names, inputs, strict=True)), sized=True)
            watch.name(dict((*model.named_parameters(), *model.named_buffers())), sized=False)
            recorder(*inputs)
    except Unseen:
        raise
    except Exception as error:  # whatever it is: a capture is made instead, and tells what is wrong with it
        raise Unseen(f"it cannot be run on shapes alone: {str(error).strip().partition(chr(10))[0][:200]}") from error
    assert recording.found is not None
    taken = state.settled(recording.found, model, found.lifted)
    return Witness(batch, recorder.outcome, taken, tuple(watch.calls), tuple(watch.numbers), found.lifted)


def read_again(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Captured, *, scale: int, divide: int, **_: Any
) -> ReadBatch:
    """The batch, read as that of the capture `like` was. Raises Unseen where it is read in another way, BatchError."""
    ordered = structure.order_of(model)(dict(kwargs))
    batch = read_batch(model, args, ordered, like.batch_dims, scale=scale, divide=divide)
    if batch.dims != like.batch_dims or maybe_packed(batch):
        raise Unseen("another dim of an input is as long as the batch")
    return batch


class AsksNothing:
    """Asks nothing of the functions behind results: the capture did."""

    def refuse_unseen(self, results: Any) -> None:
        """Nothing to refuse."""


class OnDevice(TorchFunctionMode):
    """Tensors without memory say that they are on the device that the model runs on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        says = {"device": device, "is_meta": False, "is_cpu": device.type == "cpu", "is_cuda": device.type == "cuda"}
        self._says = {getattr(Tensor, name).__get__: value for name, value in says.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in self._says:
            return self._says[func]
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Writes every operator down. What is made is made without memory, but for what Python data is made into."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.numbers: list[int | float] = []
        self._known: dict[int, int | str] = {}
        self._alive: list[Tensor] = []
        self._strange = False
        self._made: dict[Any, Any] = {}

    def name(self, tensors: Mapping[str, Tensor], *, sized: bool) -> None:
        """What the forward starts from; `sized`: whether their sizes may differ."""
        for name, tensor in tensors.items():
            self._known.setdefault(id(tensor), name)
            self._alive.append(tensor)
            self.numbers.extend(tensor.shape if sized else ())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        written = self._written((args, kwargs))
        if self._strange:
            raise Unseen("it reads a tensor without memory that is neither a parameter nor a buffer")
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors) and not all(x.is_meta for x in tensors):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(_META), (args, kwargs))
        result = self._result(func, args, kwargs)
        self.calls.append((func, torch.is_grad_enabled(), written, self._written(result)))
        self._strange = False
        return result

    def _result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives; for arguments that it had before, another one like that: to ask some operators takes milliseconds."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = func, _described(args), _described(kwargs)
        like = self._made.get(key)
        if like is None:
            result = func(*args, **kwargs)
            if type(result) is Tensor and result.is_meta:
                self._made[key] = result.shape, result.stride(), result.dtype
            elif type(result) is tuple and all(type(one) is Tensor and one.is_meta for one in result):
                self._made[key] = tuple((one.shape, one.stride(), one.dtype) for one in result)
            return result
        return _empty(like) if isinstance(like[0], torch.Size) else tuple([_empty(one) for one in like])

    def _written(self, value: Any) -> Any:
        kind = type(value)
        if kind is int or (kind is float and value == value):
            self.numbers.append(value)
            return kind
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is list or kind is tuple:
            return tuple([self._written(one) for one in value])
        if kind is dict:
            return tuple([(key, self._written(one)) for key, one in value.items()])
        return kind, value if isinstance(value, _PLAIN) else str(value)

    def _tensor(self, value: Tensor) -> Any:
        known = self._known.get(id(value))
        if known is not None:
            return known
        self._alive.append(value)
        self._known[id(value)] = len(self._alive)
        self.numbers.extend(value.shape)
        held = None if value.is_meta else digest(value)
        self._strange = self._strange or value.is_meta
        return len(self._alive), value.dim(), value.dtype, value.requires_grad, held


@cache
def _makes_new(func: OpOverload) -> bool:
    """Whether the results of an operator are its own memory, and it writes to no argument."""
    schema = func._schema
    return not any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))


def _described(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta or id(value)
    if kind is list or kind is tuple:
        return tuple([_described(one) for one in value])
    if kind is dict:
        return tuple([(key, _described(one)) for key, one in value.items()])
    return kind, value if isinstance(value, _PLAIN) or kind is int else repr(value)


def _empty(like: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
    shape, stride, dtype = like
    return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


_PLAIN = (bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def without_memory(batch: Any) -> Any:
    """The same batch without its values."""
    return pytree.tree_map_only(Tensor, lambda tensor: _hollow(tensor, None, None), batch)


def _hollow(tensor: Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> Tensor:
    """A tensor of this kind without memory."""
    return fake.fake_of(tensor, _META, nullcontext(), shape=shape, dtype=dtype)


@contextmanager
def _hollowed(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, `model` holds tensors without memory."""

    def stand_in(tensor: Tensor) -> Tensor:
        return _hollow(tensor, None, dtype if isinstance(tensor, nn.Parameter) else None)

    with fake.replaced(model, stand_in):
        yield
