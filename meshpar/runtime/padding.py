"""Batches that do not fit, made larger by samples and positions that count nothing: proved for the model, or refused.

    3 samples, 2 microbatches                                4 samples, the last of them with labels that the loss ignores
    9 positions on one data rank, 12 on another, pad_to=1    12 on both
    9 positions, pad_to=16                                   16

Samples are filled up for microbatches wherever that is needed; ranks say how much they have to each other only where `pad_to` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import pytree, resolve_process_group
from meshpar.capture.batch import input_names
from meshpar.capture.padding.fills import BatchLayout, filled, ignored_labels, layout
from meshpar.capture.padding.proof import PaddingCounts, PaddingUnproved, Question, prove
from meshpar.capture.state.taken import Ask
from meshpar.compile.programs import Programs
from meshpar.config import ParallelConfig
from meshpar.consensus import is_real
from meshpar.errors import BatchError
from meshpar.graph.captured import Captured
from meshpar.mesh import data_axis, mesh_sizes
from meshpar.roles import dividing


@dataclass(frozen=True, slots=True)
class Most:
    """The most samples and positions of any data rank, and whether any has less."""

    samples: int
    length: int | None
    other_samples: bool
    other_lengths: bool


@dataclass(frozen=True)
class Filled:
    """A batch as it is run. `cut(i, value)`: of its i-th output, the part that is not padding."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cut: Callable[[int, torch.Tensor], torch.Tensor] | None = None

    def own(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """The part of an output that is not padding."""
        return value if self.cut is None else self.cut(index, value)


class RunSizes:
    """How large the batches of all data ranks are made."""

    def __init__(self, mesh: DeviceMesh, config: ParallelConfig) -> None:
        self._device, self._pad_to = mesh.device_type, config.pad_to
        sizes = mesh_sizes(mesh)
        pieces = 2 if config.context_chunks == "auto" else config.context_chunks
        self._even = lcm(1, *(pieces * sizes[name] for name in dividing("sequence", sizes) if sizes[name] > 1))
        """What lengths are made divisible by: the pieces of every rank's part of the sequence."""
        data = data_axis(mesh)
        self._group = data.group if config.pad_to is not None and data.size > 1 and is_real(mesh) else None

    def alike(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """A batch in the sizes that it is run in; only these, not its values, are meant. Collective where `fit` is."""
        if self._pad_to is None:
            return args, kwargs
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        found = layout(leaves, [None] * len(leaves), lengths=True)
        most = self.most(found)
        return grown(args, kwargs, found, most.samples, None if most.length is None else self.long(most.length))

    def most(self, found: BatchLayout) -> Most:
        """The most samples and positions of any data rank. Collective where `pad_to` is set and there are several data ranks."""
        if self._group is None:
            return Most(found.samples, found.length, False, False)
        own = [found.samples, -found.samples, -1 if found.length is None else found.length, 1 if found.length is None else -found.length]
        sent = torch.tensor(own, device=self._device)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=resolve_process_group(self._group))
        samples, least, length, shortest = sent.tolist()
        return Most(samples, None if found.length is None else length, samples != -least, length != -shortest)

    def long(self, length: int) -> int:
        """The length that this one is padded to."""
        if isinstance(self._pad_to, int):
            step = lcm(self._pad_to, self._even)
            return -(-length // step) * step
        buckets: Sequence[int] = self._pad_to or ()
        found = next((size for size in buckets if size >= length), None)
        if found is None:
            raise BatchError(
                f"the batch has {length} positions, and the longest of ParallelConfig(pad_to={list(buckets)}) is {buckets[-1]}."
            )
        return -(-found // self._even) * self._even


class Padding:
    """What is known of padding for one parallel model."""

    def __init__(self, makes: Programs, mesh: DeviceMesh, config: ParallelConfig, first: Captured) -> None:
        self._makes, self._sizes, self._lengths = makes, RunSizes(mesh, config), config.pad_to is not None
        self._labels = ignored_labels(first)
        self._names: dict[tuple[int, tuple[str, ...]], list[str | None]] = {}
        self._proved: dict[Hashable, tuple[tuple[int, ...], ...]] = {}

    def fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int, *, training: bool, outputs: bool) -> Filled:
        """The batch as it is to be run. Collective where `pad_to` is set and there are several data ranks.

        Raises BatchError where padding would count.
        """
        if not self._lengths and _samples(args, kwargs) % microbatches == 0:
            return Filled(args, kwargs)
        found = layout(pytree.tree_leaves((args, dict(kwargs))), self._ignored(args, kwargs), lengths=self._lengths)
        most = self._sizes.most(found)
        samples = -(-most.samples // microbatches) * microbatches
        length = None if most.length is None else self._sizes.long(most.length)
        ways = [True] * (most.other_samples or samples != most.samples) + [False] * (most.other_lengths or length != most.length)
        if not ways:  # (on no data rank)
            return Filled(args, kwargs)
        grows = [(by_samples, self._prove(args, kwargs, found, training, outputs, samples=by_samples)) for by_samples in ways]
        args, kwargs = grown(args, kwargs, found, samples, length)

        def cut(index: int, value: torch.Tensor) -> torch.Tensor:
            for by_samples, dims in grows:
                for dim in dims[index]:
                    value = value.narrow(dim, 0, found.samples if by_samples else found.length or 0)
            return value

        return Filled(args, kwargs, cut if outputs else None)

    def _ignored(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int | None]:
        """For every leaf of a batch, the label that the loss ignores, if it holds labels."""
        kind = len(args), tuple(kwargs)
        names = self._names.get(kind)
        if names is None or any(isinstance(x, (dict, list, tuple)) for x in (*args, *kwargs.values())):
            names = self._names[kind] = input_names(self._makes.skeleton, args, dict(kwargs))
        return [self._labels.get(name or "") for name in names]

    def _prove(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: BatchLayout, training: bool, outputs: bool, *, samples: bool
    ) -> tuple[tuple[int, ...], ...]:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        kinds = tuple((x.dim(), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
        key = str(spec), kinds, found.inputs, training, outputs, samples
        if key not in self._proved:
            ask = Ask(self._makes.following.original, gradients=torch.is_grad_enabled())
            question = Question(self._makes.skeleton, (args, dict(kwargs)), found, self._makes.loss_fn, ask, outputs)
            try:
                self._proved[key] = prove(question, samples=samples)
            except (PaddingCounts, PaddingUnproved) as error:
                raise BatchError(_refusal(error, samples=samples)) from error
        return self._proved[key]


def grown(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], found: BatchLayout, samples: int, length: int | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A batch filled up to so many samples and positions."""
    more = samples - found.samples, 0 if length is None or found.length is None else length - found.length
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    new = [filled(leaf, dims, *more) for leaf, dims in zip(leaves, found.inputs, strict=True)]
    args, kwargs = pytree.tree_unflatten(new, spec)
    return args, kwargs


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many samples a batch has."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0]
    leaves = (x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor) and x.dim())
    return next((x.shape[0] for x in leaves), 0)


def _refusal(error: Exception, *, samples: bool) -> str:
    what = "samples" if samples else "positions"
    known = "padding would count" if isinstance(error, PaddingCounts) else "it cannot be proved that padding counts nothing"
    way = (
        "Give every data rank as many samples as the others, a multiple of microbatches (DataLoader(drop_last=True) leaves out the rest of "
        "an epoch), or take a loss that is the mean over labels that count (cross entropy with ignore_index, in labels of the batch)."
        if samples
        else "Pass attention_mask (1 for every token) if the model attends to all positions: it is filled up with 0. Or take a loss that "
        "is the mean over labels that count (cross entropy with ignore_index), or batches of equal lengths without pad_to."
    )
    return f"the batch was to be filled up with {what} that count nothing, and {known}: {error}.\n  {way}"
