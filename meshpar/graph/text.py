"""A captured graph as lines of text: what ranks compare, and what a message shows of the first line that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx

from meshpar._torch import FakeTensor, OpOverload
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Info, facts, infos_of
from meshpar.graph.op import op_name
from meshpar.ops.hooks import stable


def lines(captured: Captured) -> list[str]:
    """All that later passes read of a capture, one line per node in order, then what goes in and comes out.

    Two captures with equal lines are made into the same program.
    """
    graph = [f"{n.op} {n.name} {_target(n)} {n.args} {n.kwargs} {facts(n).info} {_compared(n)}" for n in captured.graph.nodes]
    return [stable(line) for line in graph] + [f"{name} = {value}" for name, value in _interface(captured).items()]


def _target(node: fx.Node) -> object:
    """What a node calls, by a name that is the same in every process: a function says where it is in memory."""
    return op_name(node.target) if isinstance(node.target, FunctionType) else node.target


def _compared(node: fx.Node) -> list[object]:
    """What decisions depend on, besides operator and shapes."""
    known = facts(node)
    return [known.module, known.region, known.seed, known.expert_stack or None]


def shown(captured: Captured) -> list[str]:
    """The same lines as a reader of the model knows them."""
    return [_shown(node) for node in captured.graph.nodes] + [f"{name}: {value}" for name, value in _interface(captured).items()]


def fingerprint(captured: Captured) -> str:
    """A hash of the lines."""
    return hashlib.sha256("\n".join(lines(captured)).encode()).hexdigest()[:16]


def calls_of(captured: Captured) -> str:
    """A hash of which calls a graph has, in which modules and in which order: the same for batches of other sizes, if all else is."""
    calls = [f"{n.name} {op_name(n.target)} {facts(n).module}" for n in captured.graph.nodes if n.op == "call_function"]
    return hashlib.sha256("\n".join(calls).encode()).hexdigest()[:16]


def inputs_of(captured: Captured) -> dict[str, str]:
    """The dtype and the shape of every input of a graph.

    >>> inputs_of(captured)  # doctest: +SKIP
    {'input_ids': 'int64 [8, 128]'}
    """
    return {str(node.target): _type(node) for node in captured.graph.nodes if node.op == "placeholder"}


def digest(tensor: torch.Tensor) -> str:
    """A hash of the elements of a tensor; of so many, evenly spaced, when it has more. A tensor without memory: of its shape."""
    about = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return about
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    part = flat[:: max(1, flat.numel() // _ELEMENTS)].cpu().contiguous()
    return hashlib.sha256(about.encode() + part.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


_ELEMENTS = 65_536


def _interface(captured: Captured) -> Mapping[str, Any]:
    """What is said of a graph besides its nodes, under the names that a reader knows."""
    return {
        "the inputs of the forward": captured.inputs,
        "the dims that hold samples": dict(captured.batch_dims),
        "the place of the loss among the outputs": captured.loss,
        "the buffers that the forward changes": captured.mutations,
        "the other names of tied parameters": sorted(captured.aliases.items()),
        **{f"the tensor made of Python numbers, number {i}": digest(value) for i, value in enumerate(captured.constants.values())},
    }


def _shown(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.target}: {_type(node)}"
    if node.op == "output":
        return f"the results: {_value(node.args[0])}"
    given = [_value(value) for value in node.args] + [f"{name}={_value(value)}" for name, value in node.kwargs.items()]
    where = f"at {facts(node).source or 'a line unknown'} in {facts(node).module or 'the model'}"
    return f"{_operator(node)}({', '.join(given)}) -> {_type(node)} {where}"


def _value(value: Any) -> str:
    """An argument: what is computed by the operator that does."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op != "call_function" else f"{_operator(value)} of {facts(value).source or 'a line unknown'}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_value(one) for one in value)}]"
    return str(value)


def _operator(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.partition("::")[2] if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def _type(node: fx.Node) -> str:
    return ", ".join(_shape(one) for one in infos_of(node))


def _shape(info: Any) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}" if isinstance(info, Info) else "?"
