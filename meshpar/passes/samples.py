"""Which dims of which values hold samples, and which calls mix the samples they see.

h [b, d]   mean(0) -> m [d]      samples are gone: what follows is a statistic of them
h - m                            mixes: every sample is given something of the others
h @ h.T    -> [b, b]             mixes: two dims of samples
softmax(h, 0), h.roll(1, 0)      mix: the dim of samples is read as a whole
h[-1] = 1                        mixes: it is the last sample of those that are seen
loss(h)    -> [], added up       does not: nothing of a sample meets it any more
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from meshpar.graph.op import Value, op_name, value_of
from meshpar.graph.operators import draws, operator_of
from meshpar.sharding.infer import BoundOp, Inference, infer

_ROWS = ("experts", "lookup", "write")
"""Kinds whose calls read a dim as a whole in order to find rows in it: what is in a row is that of its sample, if a sample chose it."""


_NOT_READ = ("created", "copy")
"""Kinds whose calls are given values for their shape or dtype."""


class Samples:
    """Where the samples are in a graph. `split`: inputs that hold some -> their dim."""

    def __init__(self, graph: fx.Graph, split: Mapping[str, int]) -> None:
        self.inference: Inference = infer(graph)
        self.whole: set[int] = set()
        """The extents of the samples of every input."""
        self.reached: set[fx.Node] = set()
        """Values that depend on samples."""
        for node in graph.nodes:
            if node.op == "placeholder" and str(node.target) in split:
                self.reached.add(node)
                one = self.inference.dims[node, 0][split[str(node.target)]]
                self.whole.update(() if one is None else (one,))
            elif any(source in self.reached for source in node.all_input_nodes):
                self.reached.add(node)
        extents = self.inference.extents
        self.factors = {part for one in self.whole for part in (extents.find(one), *extents.leaves(one))}
        self.in_segments = any(extents.in_segments(one) for one in self.whole)
        """Whether anything takes some of the samples."""

    def dims(self, node: fx.Node) -> frozenset[int]:
        """The dims of a value along which its samples lie."""
        axes = self.inference.dims.get(value_of(node), ())
        return frozenset(d for d, one in enumerate(axes) if one is not None and self.is_one(one))

    def is_one(self, extent: int) -> bool:
        """Whether samples lie along an extent."""
        extents = self.inference.extents
        return bool(self.factors & {extents.find(extent), *extents.leaves(extent)})

    def of(self, values: Iterable[Value]) -> list[tuple[int, ...]]:
        """The extents of samples that each value has."""
        return [tuple(one for one in self.inference.dims.get(value, ()) if one is not None and self.is_one(one)) for value in values]

    def leaves(self, extents: Iterable[Sequence[int]]) -> set[int]:
        """Their undivided factors, but for those of other dims that they were joined with."""
        found = self.inference.extents
        return self.factors & {found.find(leaf) for held in extents for one in held for leaf in found.leaves(one)}

    def is_whole(self, extent: int) -> bool:
        """Whether it is all samples of an input."""
        return self.inference.extents.find(extent) in {self.inference.extents.find(one) for one in self.whole}


def statistics(samples: Samples, graph: fx.Graph) -> dict[fx.Node, frozenset[int]]:
    """Value -> the extents of samples that it depends on and has no more: it is a statistic of them.

    A call whose results have them again mixes samples; what follows from it is not marked once more.
    """
    gone: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        gone[node] = frozenset[int]().union(*(gone[source] for source in node.all_input_nodes))
        call = samples.inference.calls.get(node)
        if call is None or call.signature is None or node not in samples.reached:
            continue
        if operator_of(call.op.node.target).kind not in (*_ROWS, *_NOT_READ):
            gone[node] |= samples.leaves(samples.of(map(value_of, call.op.operands)))
        gone[node] -= samples.leaves(samples.of(_results(call)))
    return gone


def mixing(samples: Samples, graph: fx.Graph, towards: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """The calls, among those that `towards` depends on, whose results for a sample depend on the other samples it sees.

    Calls with a backward of their own are not looked at: what they mix was measured (`own_terms`).
    """
    gone, needed = statistics(samples, graph), _needed(towards)
    calls = [call for node, call in samples.inference.calls.items() if node in needed and node in samples.reached]
    return tuple(call.op.node for call in calls if call.op.nature is None and call.signature is not None and _mixes(call, samples, gone))


def _mixes(call: BoundOp, samples: Samples, gone: Mapping[fx.Node, frozenset[int]]) -> bool:
    given, results = samples.of(map(value_of, call.op.operands)), samples.of(_results(call))
    if not any(results):
        return False
    kind = operator_of(call.op.node.target).kind
    if kind in _ROWS:
        return _writes_some(call, samples) or any(_is_moved(index) for index in _indices(call, samples))
    seen = samples.leaves([*given, *results])
    if any(gone[node] & seen for node in call.op.operands) or _reads_across(call, samples):
        return True
    return _divides(samples, given, results) if kind == "view" else max(map(len, results)) > max(map(len, given))


def _results(call: BoundOp) -> list[Value]:
    return [(call.op.node, k) for k, info in enumerate(call.op.outs) if info is not None]


def _divides(samples: Samples, given: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]) -> bool:
    """Whether some of all samples are taken: they are met by others, or left out."""
    whole = any(samples.is_whole(one) for held in given for one in held)
    return whole and samples.in_segments and not any(samples.is_whole(one) for held in results for one in held)


def _reads_across(call: BoundOp, samples: Samples) -> bool:
    """Whether a dim of samples is one that the operator reads as a whole, and has it in its results again."""
    signature = call.signature
    assert signature is not None
    across = {name for name in signature.fixed if (one := call.names.get(name)) is not None and samples.is_one(one)}
    return any(name in across for dims in signature.outputs for dim in dims for segment in dim for name in segment)


def _indices(call: BoundOp, samples: Samples) -> Iterator[fx.Node]:
    """What picks samples by their numbers, where no sample has a say in it."""
    name, given = op_name(call.op.node.target), call.op.arguments
    if name == "index":
        by_dim: Iterable[tuple[int, Any]] = enumerate(given["indices"])
    else:
        by_dim = [(given["dim"], given["index"])] if name in _BY_NUMBER else []
    for dim, index in by_dim:
        if isinstance(index, fx.Node) and index not in samples.reached and _along(dim, call) in samples.dims(call.op.operands[0]):
            yield index


_BY_NUMBER = frozenset({"index_select", "index_add", "gather", "scatter", "scatter_add", "scatter_reduce"})
"""Operators with an index into one dim."""


def _along(dim: int, call: BoundOp) -> int:
    """A dim of the first operand, counted from the first."""
    return dim % max(1, len(call.op.infos[0].shape))


def _writes_some(call: BoundOp, samples: Samples) -> bool:
    """Whether samples are written to by their numbers."""
    name, given = op_name(call.op.node.target), call.op.arguments
    if name not in ("select_scatter", "slice_scatter") or _along(given["dim"], call) not in samples.dims(call.op.operands[0]):
        return False
    size = call.op.infos[0].shape[_along(given["dim"], call)]
    return name == "select_scatter" or (given["start"] or 0, given["step"]) != (0, 1) or (given["end"] is not None and given["end"] < size)


def _is_moved(index: fx.Node) -> bool:
    """Whether an index is seen to be other than 0, 1, 2, ..., which leaves every sample in its place."""
    if any(draws(node) for node in _needed([index])):
        return True
    try:
        found = _value(index)
    except LookupError:
        return True
    return not bool((found.flatten() == torch.arange(found.numel())).all())


def _value(node: fx.Node) -> torch.Tensor:
    """What a call gives that depends on nothing. Raises LookupError where it depends on something."""
    if node.op != "call_function":
        raise LookupError(node.name)
    args, kwargs = map_arg((node.args, node.kwargs), _value)
    found: torch.Tensor = node.target(*args, **{**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)  # type: ignore[operator]
    return found


def _needed(values: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
