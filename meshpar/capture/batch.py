"""One data rank's batch, read: a name for every tensor, the dim that holds its samples, and the shape that is captured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshpar._torch import pytree
from meshpar.errors import BatchError
from meshpar.graph.captured import Slot


@dataclass(frozen=True)
class ReadBatch:
    """One data rank's batch, read: a name and a captured shape for every tensor."""

    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    dims: Mapping[str, int]

    @property
    def requires_grad(self) -> dict[str, bool]:
        return {name: tensor.requires_grad for name, tensor in zip(self.names, self.tensors, strict=True)}


def read_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dims: Mapping[str, int], *, scale: int, divide: int
) -> ReadBatch:
    """The batch of a rank as a graph of `local // divide * scale` samples takes it. Raises BatchError where it does not divide."""
    given, spec = pytree.tree_flatten((args, kwargs))
    called = input_names(model, args, kwargs)
    names = {name: leaf for name, leaf in zip(called, given, strict=True) if name is not None}
    leaves: list[Any] = [leaf if name is None else Slot(name) for name, leaf in zip(called, given, strict=True)]
    dims = _batch_dims(names, batch_dims)
    shapes = _scaled(names, dims, scale=scale, divide=divide)
    return ReadBatch(tuple(names.values()), tuple(names), shapes, spec, tuple(leaves), dims)


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str | None]:
    """A name for every leaf of a batch that is a tensor: its argument's, then the keys below it."""
    positional = _positional_names(model, len(args))
    found: dict[str | None, None] = {}
    names: list[str | None] = []
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        names.append(_unique(_input_name(path, positional), found) if isinstance(leaf, torch.Tensor) else None)
        found[names[-1]] = None
    return names


def _positional_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [known[i] if i < len(known) else f"input_{i}" for i in range(count)]


def _input_name(path: tuple[Any, ...], positional: list[str]) -> str:
    """A placeholder name for the leaf at `path` of (args, kwargs): its argument's name, then the keys below it."""
    where, first, *rest = path
    head = positional[first.idx] if where.idx == 0 else str(first.key)
    tail = [str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key)))) for key in rest]
    return "".join(c if c.isalnum() else "_" for c in "_".join([head, *tail]))


def _unique(name: str, taken: Mapping[Any, Any]) -> str:
    return name if name not in taken else next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)


def _batch_dims(tensors: Mapping[str, torch.Tensor], asked: Mapping[str, int]) -> dict[str, int]:
    """Which dim of each input holds samples."""
    unknown = [name for name in asked if name not in tensors]
    if unknown:
        raise BatchError(f"batch_dims names {', '.join(unknown)}, but the tensors of the batch are {', '.join(tensors)}.")
    first = next((tensor.shape[asked.get(name, 0)] for name, tensor in tensors.items() if tensor.dim() > 0), None)
    dims = {name: 0 for name, tensor in tensors.items() if tensor.dim() > 0 and tensor.shape[0] == first}
    return {name: asked.get(name, dims.get(name, -1)) for name in tensors if name in asked or name in dims}


def maybe_packed(batch: ReadBatch) -> list[str]:
    """The inputs that may hold several rows of each sample, or rows that are the same for all samples."""
    samples = next(
        (tensor.shape[batch.dims.get(name, 0)] for name, tensor in zip(batch.names, batch.tensors, strict=True) if tensor.dim()), 0
    )
    rows = {name: tensor.shape[0] for name, tensor in zip(batch.names, batch.tensors, strict=True) if tensor.dim()}
    return [name for name, count in rows.items() if name not in batch.dims and count > samples > 0 and count % samples == 0]


def _scaled(tensors: Mapping[str, torch.Tensor], dims: Mapping[str, int], *, scale: int, divide: int) -> tuple[tuple[int, ...] | None, ...]:
    """The captured shape of each input; None keeps shape and strides."""
    uneven = {name: tensors[name].shape[dim] for name, dim in dims.items() if tensors[name].shape[dim] % divide}
    if uneven:
        found = ", ".join(f"{name} has {samples}" for name, samples in uneven.items())
        valid = [n for n in range(1, min(uneven.values()) + 1) if all(tensors[name].shape[dim] % n == 0 for name, dim in dims.items())]
        raise BatchError(
            f"{divide} microbatches do not divide the samples of a local batch: {found}. Numbers that do: {valid}.\n"
            f"  (Steps fill up the last batch of an epoch by themselves, where that counts nothing; the example is one of whole batches.)"
        )
    if scale == divide:
        return tuple(None for _ in tensors)

    def shape(name: str) -> tuple[int, ...] | None:
        if name not in dims:
            return None
        return tuple(n // divide * scale if d == dims[name] else n for d, n in enumerate(tensors[name].shape))

    return tuple(shape(name) for name in tensors)
