"""Whether a model ignores padding, by running its own forward and backward on drawn values, with it and without it.

    a short batch  ──────────────> outputs, loss, gradients of all parameters, buffers  ──┐
    the same, filled up  ────────> ...                                                    ├── equal, or refused with what moved
                                   outputs where samples and positions were before       ──┘

Parameters are drawn, everything is computed in float64 (what the model asks to have in less, too), and random numbers are their means: they
would differ between the two batches, as they do between any two steps. RunSizes are small, the widths are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshpar._torch import TorchDispatchMode, as_if_exporting, checkpoints_only_call, pytree, without_modes
from meshpar.capture import fake, structure
from meshpar.capture.batch import ReadBatch, read_batch
from meshpar.capture.padding.fills import BatchLayout, GrowingDims, filled
from meshpar.capture.recorder import ForwardRecorder, Returned
from meshpar.capture.state import taken as state
from meshpar.capture.witness import AsksNothing, OnDevice, without_memory
from meshpar.graph.captured import Slot
from meshpar.graph.op import op_name
from meshpar.simulate import local_tensors

TOLERANCE = 1e-9
"""Of the largest element."""
MOST = 1 << 27
"""Elements of all parameters that are drawn at most."""
LENGTH, WORK = 24, 2e10
"""Positions at least, and about how many operations a run may take with more."""


class PaddingCounts(Exception):
    """Padding counts; the reason, for the user."""


class PaddingUnproved(Exception):
    """It cannot be told whether padding counts; the reason, for the user."""


@dataclass(frozen=True)
class Question:
    """What is padded, of which model: `batch` and `layout` tell what batches look like, and values that the model takes."""

    model: nn.Module
    batch: tuple[tuple[Any, ...], dict[str, Any]]
    layout: BatchLayout
    loss_fn: Callable[[Any, Any], Tensor] | None
    ask: state.Ask
    outputs: bool
    """Whether all outputs are asked about, or the loss alone."""


def prove(question: Question, *, samples: bool) -> tuple[tuple[int, ...], ...]:
    """The dims of every output that grow: with more samples, or else with more positions. (None of them where the loss alone is asked for.)

    Raises PaddingCounts with what moves, PaddingUnproved with why that is not known.
    """
    size = sum(p.numel() for p in question.model.parameters())
    if size > MOST:
        raise PaddingUnproved(f"the model has {size:,} parameters, and the proof draws {MOST:,} at most")
    length = _length(question.layout, size)
    less = (2, length) if samples else (2, length - max(1, length // 3))
    more = (1, 0) if samples else (0, length - less[1])
    leaves, spec = pytree.tree_flatten(question.batch)
    inputs = question.layout.inputs
    small = [_small(leaf, dims, *less) for leaf, dims in zip(leaves, inputs, strict=True)]
    large = [filled(leaf, dims, *more) for leaf, dims in zip(small, inputs, strict=True)]
    with without_modes():
        short = _run(question, pytree.tree_unflatten(small, spec), None)
        long = _run(question, pytree.tree_unflatten(large, spec), short)
        if question.layout.length is not None and length < question.layout.length:
            _check_longer(short, question)
    before = less[0] if samples else less[1]
    grown = tuple(_grown(a, b, before) for a, b in zip(short.outputs, long.outputs, strict=False)) if question.outputs else ()
    _check(short, long, question, before)
    return grown


def _length(layout: BatchLayout, size: int) -> int:
    if layout.length is None:
        return LENGTH
    return max(2, min(layout.length, max(LENGTH, int(WORK / (36 * max(size, 1))))))


def _small(leaf: Any, dims: GrowingDims | None, samples: int, length: int) -> Any:
    """An input of so many samples and positions, with values that the model takes."""
    if dims is None or not isinstance(leaf, Tensor):
        return leaf
    leaf = next(iter(local_tensors(leaf).values())).detach().cpu()
    for dim, size in (((0, samples),) if dims.samples else ()) + tuple((d, length) for d in dims.positions):
        if not leaf.shape[dim]:
            leaf = leaf.new_ones([max(n, 1) for n in leaf.shape])
        leaf = torch.cat([leaf] * -(-size // leaf.shape[dim]), dim).narrow(dim, 0, size)
    leaf = leaf.clone()
    if dims.ignored is not None and leaf.dim() > 1:  # labels that count, and some that do not
        leaf = torch.where(leaf == dims.ignored, torch.zeros_like(leaf), leaf)
        leaf[:, :1] = dims.ignored
    elif dims.ignored is not None:
        leaf[leaf == dims.ignored] = 0
    return leaf.double() if leaf.is_floating_point() else leaf


def _check_longer(short: _Tried, question: Question) -> None:
    """Raise PaddingUnproved where the forward does something else at the true length, on tensors without memory."""
    wide = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, question.batch)
    args, kwargs = without_memory(wide)
    read = read_batch(question.model, args, kwargs, {}, scale=1, divide=1)
    hollow = fake.replaced(question.model, lambda tensor: fake.fake_of(tensor, _META, nullcontext(), dtype=torch.double))
    with _told(), hollow, running(), OnDevice(torch.device("cpu")), _Heard() as heard:
        recorder = ForwardRecorder(question.model, read, question.loss_fn, state.Recording(question.ask))
        recorder.functions = AsksNothing()  # type: ignore[assignment]
        recorder(*read.tensors)
    for one, other in zip([*short.calls, ""], [*heard.calls, ""], strict=False):
        if one != other:
            raise PaddingUnproved(
                f"its forward does otherwise at {question.layout.length} positions than at few: {other} in place of {one}"
            )


@dataclass
class _Tried:
    """What came out of one batch."""

    outcome: Returned
    outputs: tuple[Tensor, ...] = ()
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    modules: list[tuple[str, Tensor]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


def _run(question: Question, batch: Any, short: _Tried | None) -> _Tried:
    """Forward and backward. `short`: that without padding, if this is the one with it."""
    args, kwargs = batch
    read = read_batch(question.model, args, kwargs, {}, scale=1, divide=1)
    with _told(), _drawn(question.model), running():
        return _recorded(question, read, short)


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong inside is a reason."""
    try:
        yield
    except (PaddingCounts, PaddingUnproved):
        raise
    except Exception as error:  # whatever it is: nothing is known then
        said = str(error).strip().partition("\n")[0][:200]
        raise PaddingUnproved(f"its forward cannot be run on drawn values: {type(error).__name__}: {said}") from error


@contextmanager
def running() -> Iterator[None]:
    """Inside, models run as a capture runs them, in float64 and without draws; but for experts: those run as they are written."""
    with (
        state.without_autocast(),
        torch.inference_mode(False),
        torch.enable_grad(),
        as_if_exporting(),
        checkpoints_only_call(),
        _Wide(),
    ):
        yield


def _recorded(question: Question, batch: ReadBatch, short: _Tried | None) -> _Tried:
    model = question.model
    recorder = ForwardRecorder(model, batch, question.loss_fn, state.Recording(question.ask))
    recorder.functions = AsksNothing()  # type: ignore[assignment]
    with _watched(model) as modules, _Heard() as heard:
        outputs = recorder(*batch.tensors)
    run = _Tried(recorder.outcome, tuple(outputs), modules=modules, calls=heard.calls)
    run.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    objective = _objective(run, question, short)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained and objective.requires_grad:
        found = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
        run.gradients = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
    return run


def _objective(run: _Tried, question: Question, short: _Tried | None) -> Tensor:
    """What gradients are taken of: the loss, or a number that all outputs without padding enter."""
    if not question.outputs:
        if run.outcome.loss is None:
            raise PaddingUnproved("the batch gives no loss")
        return run.outputs[run.outcome.loss].sum()
    total = torch.zeros((), dtype=torch.double)
    for i, one in enumerate(run.outputs):
        if one.is_floating_point():
            own = one if short is None else _before(one, short.outputs[i])
            total = total + (own.double() * torch.linspace(0.5, 1.5, own.numel()).view(own.shape)).square().sum()
    return total


def _before(value: Tensor, short: Tensor) -> Tensor:
    """The part of a value where samples and positions were without padding."""
    if value.dim() != short.dim() or any(a < b for a, b in zip(value.shape, short.shape, strict=True)):
        raise PaddingUnproved(f"a result of shape {list(short.shape)} has shape {list(value.shape)} with padding")
    for dim, size in enumerate(short.shape):
        value = value.narrow(dim, 0, size)
    return value


def _grown(short: Tensor, long: Tensor, before: int) -> tuple[int, ...]:
    dims = tuple(d for d, (a, b) in enumerate(zip(short.shape, long.shape, strict=True)) if a != b)
    if any(short.shape[d] != before for d in dims):
        raise PaddingUnproved(f"an output of shape {list(short.shape)} has samples and positions in one dim")
    return dims


# -- what is compared ----------------------------------------------------------------------------------------------------------------------


def _check(short: _Tried, long: _Tried, question: Question, before: int) -> None:
    names = _names(short.outcome, len(short.outputs))
    if len(long.outputs) != len(short.outputs):
        raise PaddingCounts("another number of outputs")
    loss = short.outcome.loss
    wanted = range(len(short.outputs)) if question.outputs else [loss] if loss is not None else []
    moved = [names[i] for i in wanted if not _equal(_before(long.outputs[i], short.outputs[i]), short.outputs[i])]
    scalars = [i for i, one in enumerate(short.outputs) if i != loss and one.numel() == 1]
    terms = [names[i] for i in scalars if not question.outputs and not _equal(long.outputs[i], short.outputs[i])]
    if moved:
        because = f" (so does {', '.join(terms)}, which it returns too)" if terms else ""
        raise PaddingCounts(f"{', '.join(moved)} moves{because}: {_where(short, long, before)}")
    largest = max((float(g.abs().max()) for g in short.gradients.values() if g.numel()), default=0.0)
    for name in {**short.gradients, **long.gradients}:
        a, b = short.gradients.get(name), long.gradients.get(name)
        if a is None or b is None or not _equal(b, a, 1e-3 * largest):
            raise PaddingCounts(f"the loss is the same, and the gradient of {name} is not: a backward adds something of its own")
    for name, buffer in short.buffers.items():
        if buffer.shape == long.buffers[name].shape and not _equal(long.buffers[name], buffer):
            raise PaddingCounts(f"the buffer {name} is updated by what is padded: {_where(short, long, before)}")


def _equal(value: Tensor, wanted: Tensor, least: float = 0.0) -> bool:
    if value.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() and not wanted.is_complex():
        return torch.equal(value, wanted)
    if not wanted.numel():
        return True
    difference = float((value - wanted).detach().abs().max())
    return difference <= TOLERANCE * max(float(wanted.detach().abs().max()), least)


def _where(short: _Tried, long: _Tried, before: int) -> str:
    """The first module that gives something else, or that it is the loss itself. (Of those whose results have dims that grow.)"""
    if [name for name, _ in short.modules] == [name for name, _ in long.modules]:
        for (name, a), (_, b) in zip(short.modules, long.modules, strict=True):
            grows = a.dim() == b.dim() and all(x == y or (x == before < y) for x, y in zip(a.shape, b.shape, strict=True))
            if grows and not _equal(_before(b, a), a):
                return f"{name} gives other values where there is no padding"
    return "every module gives the same where there is no padding, and what is computed of that counts padding too, as a mean over all does"


def _names(outcome: Returned, count: int) -> list[str]:
    """What the outputs are called: by the keys of what the model returns, where it has keys."""
    names = [f"output {i}" for i in range(count)]
    spec, leaf = outcome.spec, iter(outcome.leaves)
    assert spec is not None
    context = spec.context[1] if spec.type is structure.Record else spec.context
    keys = context if isinstance(context, (list, tuple)) and len(context) == spec.num_children else range(spec.num_children)
    for key, child in zip(keys, spec.children(), strict=True):
        for one in (next(leaf) for _ in range(child.num_leaves)):
            if isinstance(one, Slot):
                names[int(one.key)] = key if isinstance(key, str) else f"output {key}"
    return ["the loss" if i == outcome.loss else name for i, name in enumerate(names)]


# -- how it runs ---------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _drawn(model: nn.Module) -> Iterator[None]:
    """Inside, `model` holds drawn parameters, and copies of its buffers."""
    generator = torch.Generator().manual_seed(0)

    def stand_in(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            if tensor.is_meta:
                raise PaddingUnproved("a buffer of the model has no values (it was built on the meta device)")
            found = tensor.detach().cpu().clone()
            return found.double() if found.is_floating_point() else found
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.double)
        drawn = drawn / max(tensor.shape[-1], 1) ** 0.5 if tensor.dim() > 1 else 0.5 + 0.1 * drawn
        return nn.Parameter(drawn, requires_grad=tensor.requires_grad)

    with fake.replaced(model, stand_in):
        yield


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """What every module inside of `model` gives, in the order in which they are done."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found: list[tuple[str, Tensor]] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if id(module) in names and isinstance(first, Tensor):
            found.append((names[id(module)], first))

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        yield found
    finally:
        handle.remove()


_MEANS: Mapping[str, float] = {
    **dict.fromkeys(("rand", "rand_like", "uniform", "uniform_"), 0.5),
    **dict.fromkeys(("randn", "randn_like", "normal_", "normal_functional"), 0.0),
    **dict.fromkeys(("bernoulli", "bernoulli_"), 1.0),
}
"""Operator that draws -> what is drawn instead, the same wherever it is."""
_DRAWS = ("multinomial", "randperm", "randint", "randint_like", "exponential_", "geometric_", "poisson", "native_dropout")


class _Wide(TorchDispatchMode):
    """Computes in float64 what is asked for in less, and draws nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op_name(func)
        if name in _DRAWS:
            raise PaddingUnproved(f"it draws random numbers by {name}, others for a batch with padding")
        wide = pytree.tree_map_only(torch.dtype, lambda dtype: torch.double if dtype in _NARROW else dtype, (args, kwargs or {}))
        result = func(*wide[0], **wide[1])
        return result.fill_(_MEANS[name]) if name in _MEANS else result


class _Heard(TorchFunctionMode):
    """What of torch was called, but for tensors and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        plain = [str(x) for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, (bool, str, torch.dtype))]
        self.calls.append(" ".join([getattr(func, "__name__", str(func)), *plain]))
        return func(*args, **(kwargs or {}))


_META = torch.device("meta")
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
