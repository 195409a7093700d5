"""A step whose loss is computed outside of the model, by any function of what the model returns: `pm.forward_backward(batch, loss_fn)`.

    batch ──> microbatches ──> output of each, whole over tp and cp ──> loss_fn(output, microbatch) ──> backward     (on the last stage)

    without count     the loss is the mean of what loss_fn gives, over microbatches and data ranks
    with count        what loss_fn gives is a sum, and the loss the sum of all / the sum of count(batch) over data ranks

`count` is asked before the first forward, of what the loss is a mean over: backward of one microbatch begins before the others are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshpar._torch import pytree
from meshpar.capture import structure
from meshpar.capture.batch import input_names, maybe_packed, read_batch
from meshpar.errors import BatchError, ConfigError
from meshpar.mesh import Axis
from meshpar.ops.collectives import p_to_i
from meshpar.simulate import is_simulated

LossFunction = Callable[[Any, Any], torch.Tensor]
"""(output of the model for a microbatch, the microbatch or its targets) -> one floating number."""


@dataclass(frozen=True)
class Microbatch:
    """One microbatch: the arguments of forward, and what the loss function is given beside the output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any


def parts(model: torch.nn.Module, batch: Any, target: Any, microbatches: int) -> list[Microbatch]:
    """The microbatches of a local batch. Raises BatchError where they do not divide it."""
    args, kwargs = ((), structure.order_of(model)(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})
    given, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in given if isinstance(x, torch.Tensor) and x.dim()]
    samples = tensors[0].shape[0] if tensors else 0
    if samples % microbatches:
        raise BatchError(
            f"forward_backward: {microbatches} microbatches do not divide the {samples} samples of the local batch, and samples that are "
            "filled in would be in a loss of your own. Pass a multiple (DataLoader(drop_last=True)), or other microbatches= in the config."
        )
    if microbatches > 1 and (packed := maybe_packed(read_batch(model, args, kwargs, {}, scale=1, divide=microbatches))):
        raise BatchError(f"forward_backward: {', '.join(packed)} may hold several rows of each sample: use microbatches=1.")
    dims = read_batch(model, args, kwargs, {}, scale=1, divide=microbatches).dims
    names = input_names(model, args, kwargs)
    cut = [_cut(leaf, dims.get(name or ""), microbatches) for name, leaf in zip(names, given, strict=True)]
    pieces = [pytree.tree_unflatten([leaf[i] for leaf in cut], spec) for i in range(microbatches)]
    if target is None:
        return [Microbatch(args, kwargs, kwargs if isinstance(batch, Mapping) else args) for args, kwargs in pieces]
    wanted, spec = pytree.tree_flatten(target)
    lone = [list(x.shape) for x in wanted if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] != samples]
    if lone:
        raise BatchError(f"forward_backward: target= has tensors of shape {lone}, and the local batch {samples} samples: a row for each.")
    cut = [_cut(leaf, 0 if isinstance(leaf, torch.Tensor) and leaf.dim() else None, microbatches) for leaf in wanted]
    targets = [pytree.tree_unflatten([leaf[i] for leaf in cut], spec) for i in range(microbatches)]
    return [Microbatch(args, kwargs, one) for (args, kwargs), one in zip(pieces, targets, strict=True)]


def _cut(leaf: Any, dim: int | None, count: int) -> Sequence[Any]:
    return (leaf,) * count if dim is None else leaf.chunk(count, dim)


def loss_of(loss_fn: LossFunction, output: Any, target: Any) -> torch.Tensor:
    """The user's loss of one microbatch. Raises ConfigError for anything but one floating number."""
    loss = loss_fn(output, target)
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point() or loss.numel() != 1:
        found = f"a {loss.dtype} tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"forward_backward: loss_fn(output, batch) gives one floating number as a tensor, this one gave {found}. For a mean over "
            "tokens let it give their sum, and pass count=, what the sum is to be divided by."
        )
    return loss.reshape(())


@dataclass(frozen=True)
class Weight:
    """What the loss of a microbatch counts: `own` in the mean over the data ranks, `share` in the loss of all."""

    own: torch.Tensor
    share: torch.Tensor


def weight(count: Callable[[Any], Any] | None, target: Any, microbatches: int, data: Axis, device: torch.device) -> Weight:
    """The same on every rank. Collective over the data ranks if there is `count`."""
    if count is None:
        own = torch.tensor(1.0 / microbatches, dtype=torch.float64, device=device)
        return Weight(own, own / data.size)
    found = count(target)
    own = found if isinstance(found, torch.Tensor) else torch.tensor(found)
    total = summed(own.detach().to(device, torch.float64).reshape(()), data)
    if not is_simulated() and total.item() <= 0:
        raise BatchError(f"forward_backward: count(batch) is {total.item():g} over all data ranks: there is nothing to take a mean over.")
    return Weight(data.size / total, 1.0 / total)


def summed(value: torch.Tensor, data: Axis) -> torch.Tensor:
    """The sum over the data ranks."""
    return p_to_i(value, group=data.group, size=data.size, rank=data.rank)
