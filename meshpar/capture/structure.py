"""Inputs and outputs as pytrees: which leaves are tensors, and how to give back the model's own structure."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshpar._torch import pytree


def order_of(model: nn.Module) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """How to put keyword arguments in order, whatever order they are passed in: that of the forward's parameters, then by name.

    >>> order_of(nn.Linear(2, 2))({"b": 1, "input": 2, "a": 3})
    {'input': 2, 'a': 3, 'b': 1}
    """
    places = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}

    def ordered(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: kwargs[name] for name in sorted(kwargs, key=lambda name: (places.get(name, len(places)), name))}

    return ordered


class Record:
    """An object unknown to pytree (a dataclass or a mapping) as a pytree node that unflattens to the object's own type."""

    def __init__(self, kind: type, fields: dict[Any, Any]) -> None:
        self.kind = kind
        self.fields = fields


def _flatten_record(record: Record) -> tuple[list[Any], Any]:
    return list(record.fields.values()), (record.kind, tuple(record.fields))


def _unflatten_record(values: Any, context: Any) -> Any:
    kind, names = context
    fields = dict(zip(names, values, strict=True))
    return kind(fields) if issubclass(kind, Mapping) else kind(**fields)


pytree.register_pytree_node(Record, _flatten_record, _unflatten_record)

_PLAIN = (torch.Tensor, int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec, tuple[str, ...]]:
    """The leaves of `value`, its structure, and the readable paths of leaves that were dropped because nothing is known about their type.

    A dropped leaf becomes None. Dataclasses and mappings that pytree does not know keep their type.
    """
    dropped: list[str] = []
    leaves, spec = pytree.tree_flatten(_known(value, "", dropped))
    return leaves, spec, tuple(dropped)


def _known(value: Any, path: str, dropped: list[str]) -> Any:
    """`value` with every part that pytree does not know replaced by a `Record` or None."""
    if isinstance(value, _PLAIN):
        return value
    if _is_registered(value):
        items, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        keys = _keys(value, len(items))
        return pytree.tree_unflatten([_known(item, f"{path}{key}", dropped) for item, key in zip(items, keys, strict=True)], spec)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return Record(type(value), {name: _known(item, f"{path}.{name}", dropped) for name, item in fields.items()})
    if isinstance(value, Mapping):
        return Record(type(value), {key: _known(item, f"{path}[{key!r}]", dropped) for key, item in value.items()})
    dropped.append(f"{path or 'output'}: {type(value).__name__}")
    return None


def _is_registered(value: Any) -> bool:
    return type(value) in pytree.SUPPORTED_NODES or pytree.is_namedtuple_instance(value)


def by_key(spec: pytree.TreeSpec) -> list[int]:
    """The leaves of a structure in an order that is the same for equal structures: those of a dict by key, whatever was put in first.

    >>> by_key(flatten({"b": 1, "a": [2, 3]})[1])
    [1, 2, 0]
    """
    return _by_key(spec, 0)


def _by_key(spec: pytree.TreeSpec, first: int) -> list[int]:
    if spec.is_leaf():
        return [first]
    parts = []
    for child in spec.children():
        parts.append(_by_key(child, first))
        first += child.num_leaves
    return [place for _, part in sorted(zip(_names_of(spec, len(parts)), parts, strict=True), key=lambda pair: pair[0]) for place in part]


def _names_of(spec: pytree.TreeSpec, count: int) -> Sequence[Any]:
    """What the parts of a structure are sorted by: the keys of a mapping, else their places."""
    kind, context = spec.type, spec.context
    if kind is Record:
        kind, context = context
    if kind is defaultdict:
        context = context[1]
    if isinstance(kind, type) and issubclass(kind, Mapping) and isinstance(context, list | tuple) and len(context) == count:
        return [(type(key).__name__, str(key)) for key in context]
    return range(count)


def _keys(value: Any, count: int) -> list[str]:
    if isinstance(value, Mapping) and len(value) == count:
        return [f"[{key!r}]" for key in value]
    return [f"[{i}]" for i in range(count)]


def find_loss(output: Any) -> torch.Tensor | None:
    """The training loss in a model's output: `output.loss`, `output["loss"]`, the output itself, or the only scalar of a tuple."""
    if isinstance(output, Mapping):
        return _scalar(output.get("loss"))
    if isinstance(output, torch.Tensor):
        return _scalar(output)
    if hasattr(output, "loss"):
        return _scalar(output.loss)
    scalars = [item for item in output if _scalar(item) is not None] if isinstance(output, tuple | list) else []
    return scalars[0] if len(scalars) == 1 else None


def _scalar(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    return value if all(isinstance(n, int) and n == 1 for n in value.shape) else None  # a size that depends on data is no int


def call_loss(loss_fn: Callable[[Any, Any], torch.Tensor], output: Any, batch: Any) -> torch.Tensor:
    """The user's loss, checked to be one floating number."""
    loss = loss_fn(output, batch)
    if _scalar(loss) is None:
        found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn(output, batch) must return one floating number as a tensor; it returned {found}.")
    return loss
