"""The original on one device: what a parallel program is compared with, and whether such a comparison proves anything.

Two dead models agree. A loss that is no number, gradients that are all zero, or that are the same whatever the batch holds, agree with
nearly everything; so do data ranks that are all given the same samples. Such a reference is told, and does not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import nn

from meshpar._torch import as_one_process, pytree
from meshpar.capture.hooks.models import ParameterHooks, copied
from meshpar.capture.structure import call_loss, find_loss
from meshpar.config import ParallelConfig
from meshpar.errors import BatchError, ConfigError
from meshpar.proof.comparable import cast, only
from meshpar.proof.noise import Drawn

FLOOR = 1e-3
LEARNING_RATE = 1e-2
"""Large, so that a step not taken shows against parameters of size one."""
MAX_NORM = 1.0
NOISE = 1e-2
"""How much of the largest gradient moves with the last places of what it is computed from, where it is nothing else."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 6.0}
"""float64: a million times the rounding of one operation, far below any mistake. float32: a hundred times, for sums over a hidden dim.
bfloat16: in multiples of what that dtype does to the model on one device (see `verify`)."""

Batch = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """What is compared: everything a rank must know."""

    model: nn.Module
    batches: tuple[Batch, ...]
    """The global batch of every step."""
    config: ParallelConfig
    rules: Mapping[str, str] | None
    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    dtype: torch.dtype
    tolerance: float
    data_ranks: int
    hooks: ParameterHooks = field(default_factory=dict)
    """Of the parameters: a file loses them."""

    @property
    def samples(self) -> int:
        """Samples of the global batch."""
        return samples_of(self.batches[0])

    @property
    def drawn(self) -> Drawn:
        """The mode in which both programs draw the same numbers."""
        parts = self.data_ranks * self.config.microbatches
        return Drawn(self.samples // parts if self.config.microbatches > 1 and self.samples % parts == 0 else None)

    @contextmanager
    def conditions(self) -> Iterator[Drawn]:
        """What both programs run under."""
        with only(self.dtype), self.drawn as drawn:
            yield drawn


@dataclass(frozen=True)
class Reference:
    """The original on one device: losses and gradient norms of all steps, the first gradients, and what the tensors are at the end."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    gradients: Mapping[str, torch.Tensor | None]
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    eps: float
    without: tuple[frozenset[str], ...] = ()
    """Per step, the parameters that had no gradient, which is not the same to an optimizer as zeros."""
    drew: tuple[str, ...] = ()
    """Source lines that draw random numbers."""


def reference(task: Task, device: torch.device, *, eps: float = 0.0) -> Reference:
    """Train the original for the steps of `task`."""
    model = copied(task.model).to(device)
    losses, norms, gradients, without = [], [], dict[str, torch.Tensor | None](), []
    optimizer: torch.optim.Optimizer | None = None
    with task.conditions() as drawn:
        for batch in task.batches:
            loss = _backward(model, _on(batch, device), task.loss_fn)
            losses.append(loss)
            if not gradients:
                gradients = gradients_of(model)
            without.append(frozenset(n for n, p in model.named_parameters() if p.grad is None))
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            eps = eps or _eps(model, task.dtype)
            optimizer = optimizer or optimizer_of(model, eps)
            optimizer.step()
            optimizer.zero_grad()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    return Reference(tuple(losses), tuple(norms), gradients, parameters, buffers, eps, tuple(without), tuple(drawn.lines))


def wide(task: Task) -> Task:
    """The same in float64, from the same values."""
    batches = tuple(cast(batch, torch.float64) for batch in task.batches)
    return replace(task, model=cast(copied(task.model), torch.float64), batches=batches, dtype=torch.float64)


def _backward(model: nn.Module, batch: Batch, loss_fn: Callable[[Any, Any], torch.Tensor] | None) -> float:
    with as_one_process():
        output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
        loss = find_loss(output) if loss_fn is None else call_loss(loss_fn, output, batch)
    if loss is None:
        raise BatchError(
            "there is no loss to compare: the model returns none for this batch. Pass labels if the model computes its loss from them, or "
            "loss_fn=, a function of (output, batch)."
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"nothing to compare: the loss of {type(model).__name__} depends on no parameter that is trained, so there are no gradients "
            f"({_frozen(model)}). Train some parameters, and compute the loss from what they give."
        )
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:  # (a parallel program's are dense)
            parameter.grad = parameter.grad.to_dense()
    return loss.item()


def _frozen(model: nn.Module) -> str:
    trained = sum(p.requires_grad for p in model.parameters())
    return "every parameter has requires_grad=False" if not trained else f"{trained} parameters are trained, but the loss is detached"


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of all gradients, by name."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def optimizer_of(model: nn.Module, eps: float) -> torch.optim.Optimizer:
    """The optimizer of both programs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trained}], lr=LEARNING_RATE, eps=eps)  # a group: a rank of a pipeline may have none


def _eps(model: nn.Module, dtype: torch.dtype) -> float:
    """AdamW's eps at the floor of the gradients: with a smaller one, a gradient that is rounding alone is a full step of random sign.

    AdamW divides by the gradient and eps, so it blows the rounding of small gradients up by as much as the floor is small: in float32 a
    thousand times would be seen.
    """
    floor = FLOOR if dtype == torch.float64 else 10 * FLOOR
    largest = max((p.grad.abs().max().item() for p in model.parameters() if p.grad is not None and p.numel()), default=1.0)
    return floor * largest if 0 < largest < inf else 1e-8


def _on(batch: Batch, device: torch.device) -> Batch:
    """A copy, since a model may change what it is given."""
    found: Batch = pytree.tree_map(lambda leaf: leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf, batch)
    return found


# ---- batches ---------------------------------------------------------------------------------------------------------------------------


def samples_of(batch: Batch) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)


def batches_of(batch: Batch, steps: int) -> tuple[Batch, ...]:
    """A batch for every step: the same samples, every time in another order.

    Another order gives every rank and every microbatch other samples than those it was captured with, and is as valid as the first. A batch
    with tensors of several rows per sample stays as it is: where its samples begin is not known.
    """
    samples = samples_of(batch)
    rows = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if any(n != samples and samples > 1 and n % samples == 0 for n in rows):
        return (batch,) * steps
    return tuple(_changed(batch, samples, partial(torch.roll, shifts=step, dims=0)) for step in range(steps))


def _changed(batch: Batch, samples: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    def one(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == samples else leaf

    found: Batch = pytree.tree_map(one, batch)
    return found


# ---- whether it proves anything --------------------------------------------------------------------------------------------------------


def unproved(task: Task, found: Reference, device: torch.device) -> tuple[str, ...]:
    """Why a comparison with this reference proves nothing; empty where it does."""
    for step, (loss, norm) in enumerate(zip(found.losses, found.norms, strict=True), 1):
        if not (isfinite(loss) and isfinite(norm)):
            what = "loss" if not isfinite(loss) else "gradient norm"
            value = loss if not isfinite(loss) else norm
            return (f"the {what} of the model on one device is {value} in step {step}: there is nothing to compare with.",)
    if not any(g is not None and bool(g.any()) for g in found.gradients.values()):
        return ("every gradient of the model on one device is zero: any program with the same loss would pass.",)
    if _is_rounding(task, found, device):
        return (
            "every gradient of the model on one device is zero but for rounding: they are others when batch and parameters are changed by "
            "a few units of their last place.",
        )
    reasons = []
    if _shares_are_alike(task):
        reasons.append(
            f"all {task.data_ranks} data ranks get the same samples: one that took another's would pass. Give samples that differ."
        )
    if not _depends_on_batch(task, found, device):
        reasons.append(
            "the gradients of the model on one device do not depend on the batch (they stay the same when its values are changed): a "
            "program that reads other data, or none, would pass."
        )
    return tuple(reasons)


def _is_rounding(task: Task, found: Reference, device: torch.device) -> bool:
    """Whether nothing of the gradients is left but rounding. (Small ones alone may be as exact as any.)"""
    eps, trained = torch.finfo(task.dtype).eps, {name: g for name, g in found.gradients.items() if g is not None and g.numel()}
    largest = max(grad.abs().max().item() for grad in trained.values())
    reach = max(found.parameters[name].abs().max().item() for name in trained)
    if largest * max(1.0, reach) >= eps * abs(found.losses[0]):  # moves the loss by more than the loss is known
        return False
    draw, model = torch.Generator().manual_seed(0), copied(task.model).to(device)

    def nudged(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 4 * eps * torch.randint(-1, 2, x.shape, generator=draw).to(x)) if x.is_floating_point() else x

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(nudged(parameter))
    batch: Batch = pytree.tree_map(lambda leaf: nudged(leaf) if isinstance(leaf, torch.Tensor) else leaf, task.batches[0])
    with task.conditions():
        _backward(model, _on(batch, device), task.loss_fn)
    others = gradients_of(model)
    moved = (0.0 if (other := others[name]) is None else (other - grad).abs().max().item() for name, grad in trained.items())
    return max(moved) > NOISE * largest


def _shares_are_alike(task: Task) -> bool:
    """Whether the tensors that are divided among the data ranks are the same on all of them."""
    samples, ranks = task.samples, task.data_ranks
    if ranks < 2 or samples % ranks:
        return False
    cut = [x for x in pytree.tree_leaves(task.batches[0]) if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == samples]
    return all(bool((part == x.chunk(ranks)[0]).all()) for x in cut for part in x.chunk(ranks)[1:])


def _depends_on_batch(task: Task, found: Reference, device: torch.device) -> bool:
    """Whether any gradient changes when the batch does; True where no changed batch is one that the model takes."""
    tried = False
    for change in _CHANGES:
        model = copied(task.model).to(device)
        batch = _changed(task.batches[0], task.samples, change)
        try:
            with task.conditions():
                loss = _backward(model, _on(batch, device), task.loss_fn)
        except Exception:  # the model refuses this batch, which was never promised to be a valid one: it tells nothing
            continue
        if not isfinite(loss):
            continue
        tried = True
        if _differ(gradients_of(model), found.gradients, torch.finfo(task.dtype).eps):
            return True
    return not tried


def _differ(some: Mapping[str, torch.Tensor | None], others: Mapping[str, torch.Tensor | None], eps: float) -> bool:
    """Whether gradients are further apart than the order of a sum explains."""
    largest = max((g.abs().max().item() for g in others.values() if g is not None and g.numel()), default=0.0)
    for name, other in others.items():
        found = some[name]
        if found is None or other is None:
            if (found is None) != (other is None):
                return True
        elif found.numel() and (found - other).abs().max().item() > 16 * eps * largest:
            return True
    return False


def _first(x: torch.Tensor) -> torch.Tensor:
    """The first sample in all places."""
    return x[:1].expand_as(x).clone()


def _moved(x: torch.Tensor) -> torch.Tensor:
    """Numbers scaled, each by another factor near one; integers one place on."""
    if x.is_floating_point():
        factors = 1 + torch.arange(x.numel(), dtype=torch.float64).mul(2**0.5).remainder(1).reshape(x.shape) / 4
        return (x * factors.to(x)).to(x.dtype)
    return x.roll(1, -1)


def _constant(x: torch.Tensor) -> torch.Tensor:
    """The first value of every sample in all its places."""
    return x if x.ndim < 2 else x.flatten(1)[:, :1].expand(x.flatten(1).shape).reshape(x.shape).clone()


_CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (_first, _moved, _constant)
