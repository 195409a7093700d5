"""The sizes of all values of a graph, from those of its inputs: every operator is asked, on tensors without memory, once for each kind."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from meshpar._torch import OpOverload, without_modes
from meshpar.compile.shapes.numbers import Differs
from meshpar.graph.facts import Info, facts, gives_several, infos_of, set_facts
from meshpar.graph.op import op_name

_META = torch.device("meta")
Sizes = tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]


def spread(graph: fx.Graph, inputs: Mapping[str, tuple[int, ...]]) -> None:
    """Set the shapes of every node of `graph`, in place, for `inputs` of these shapes. Raises Differs for what cannot be computed."""
    known: dict[Any, Sizes] = {}
    with without_modes(), torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder" and node.target in inputs:
                _set(node, (inputs[str(node.target)],))
            elif node.op == "call_function" and node.target is operator.getitem:
                one = infos_of(node.args[0])[node.args[1]]  # type: ignore[arg-type, index, unused-ignore]
                assert isinstance(one, Info)
                _set(node, (one.shape,))
            elif node.op == "call_function":
                _call(node, known)


def _call(node: fx.Node, known: dict[Any, Sizes]) -> None:
    kind = node.target, _key(node.args), _key(node.kwargs)
    if kind not in known:
        known[kind] = _sizes(node)
    found, before = known[kind], infos_of(node)
    if len(found) < len(before):
        raise Differs(f"{op_name(node.target)} gives another number of results")
    for size, info in zip(found, before, strict=False):
        if info is not None and (size is None or size[1] != info.dtype or len(size[0]) != len(info.shape)):
            raise Differs(f"{op_name(node.target)} gives another type")
    _set(node, tuple(size and size[0] for size in found[: len(before)]))


def _set(node: fx.Node, shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    infos = tuple(i and replace(i, shape=s or ()) for i, s in zip(infos_of(node), shapes, strict=True))
    set_facts(node, replace(facts(node), info=infos if gives_several(node) else infos[0]))


def _key(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return tuple((i.shape, i.dtype) if isinstance(i, Info) else None for i in infos_of(value))
    if isinstance(value, (list, tuple)):
        return tuple([_key(one) for one in value])
    if isinstance(value, Mapping):
        return tuple([(key, _key(one)) for key, one in value.items()])
    return type(value), str(value)


def _sizes(node: fx.Node) -> Sizes:
    if not isinstance(node.target, OpOverload):
        raise Differs(f"{op_name(node.target)} is no operator of torch")
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _hollow)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": _META}
    try:
        made = node.target(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise Differs(f"{op_name(node.target)} does not take the new sizes") from error
    results = made if isinstance(made, (list, tuple)) else (made,)
    return tuple((tuple(one.shape), one.dtype) if isinstance(one, torch.Tensor) else None for one in results)


def _hollow(node: fx.Node) -> torch.Tensor:
    info = facts(node).info
    if not isinstance(info, Info):
        raise Differs("an operator takes what is no tensor")
    return torch.empty(info.shape, dtype=info.dtype, device=_META)
