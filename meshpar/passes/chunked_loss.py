"""Logits and their loss a few rows at a time, where nothing else reads the logits.

before                                            after
  y = linear(x, w)            [b, s, v]             loss = chunked_loss.cross_entropy(x, w, None, t, None, rows, float32, ...)
  y = _to_copy(y, float32)
  y = reshape(y, [b s, v])
  loss = cross_entropy(y, t, sum)

Reshapes and slices between the product and the loss, which leave the classes alone, are done to the rows of x. Classes that are cut over an
axis stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from meshpar.graph.facts import facts, info_of, set_facts
from meshpar.graph.op import op_name, read
from meshpar.ops import chunked_loss, vocab_parallel
from meshpar.ops.again import CheapStep
from meshpar.sharding.types import Shard

_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")
_REDUCTIONS = {0: "none", 2: "sum"}


@dataclass(frozen=True)
class ChunkLoss:
    """Let no more than `nbytes` of a loss's logits be there at once. Changes the graph in place."""

    nbytes: int

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            if node.op == "call_function" and (loss := _loss(node)) is not None and (steps := _steps(node, loss)) is not None:
                _rewrite(node, loss, steps, max(1, self.nbytes // (loss.classes * info_of(loss.logits).dtype.itemsize)))
        return graph


@dataclass(frozen=True)
class _Loss:
    """What a cross entropy is told."""

    logits: fx.Node
    target: fx.Node
    weights: fx.Node | None
    cut: Shard
    """Of the classes."""
    size: int
    named: dict[str, Any]

    @property
    def classes(self) -> int:
        """The most that a rank has."""
        return max(self.cut.local_length(self.size, rank) for rank in range(self.size))


def _loss(node: fx.Node) -> _Loss | None:
    """The cross entropy of a matrix of logits that a node is."""
    if node.target is vocab_parallel.cross_entropy:
        logits, target, weights, dim, repeat, segments = node.args
        cut, named = Shard(dim, repeat, segments), dict(node.kwargs)  # type: ignore[arg-type]
    elif op_name(node.target) == "cross_entropy_loss":
        given = read(node).arguments
        logits, target, weights = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
        if given["reduction"] not in _REDUCTIONS:
            return None
        cut = Shard(1, 1, ((info_of(logits).shape[-1], 1),))  # type: ignore[arg-type]
        named = {name: given[name] for name in ("ignore_index", "label_smoothing")} | {"reduction": _REDUCTIONS[given["reduction"]]}
    else:
        return None
    assert isinstance(logits, fx.Node) and isinstance(target, fx.Node)
    if cut.dim != 1 or len(info_of(logits).shape) != 2 or len(info_of(target).shape) != 1:
        return None
    return _Loss(logits, target, weights, cut, int(named.get("size", 1)), named)  # type: ignore[arg-type]


def _steps(node: fx.Node, loss: _Loss) -> Sequence[fx.Node] | None:
    """What leads from a product to its loss, the product first; None where anything else reads of it, or it is no product."""
    steps, at = list[fx.Node](), loss.logits
    width = info_of(at).shape[-1]
    while list(at.users) == [steps[-1] if steps else node] and at.op == "call_function":
        steps.append(at)
        name = op_name(at.target)
        if name in ("linear", "meshpar.ops.deferred.linear"):
            return steps[::-1]
        before = at.args[0]
        same = isinstance(before, fx.Node) and info_of(before).shape[-1:] == (width,)
        if not same or not (name in _RESHAPES or name == "_to_copy" or (name == "slice" and at.args[1] != len(info_of(at).shape) - 1)):
            return None
        at = before  # type: ignore[assignment]
    return None


def _rewrite(node: fx.Node, loss: _Loss, steps: Sequence[fx.Node], rows: int) -> None:
    product, *others = steps
    bias = product.args[2] if len(product.args) > 2 else None
    node.target = chunked_loss.cross_entropy
    node.args = (*product.args[:2], bias, loss.target, loss.weights, rows, info_of(loss.logits).dtype, loss.cut.segments)
    node.kwargs = {**loss.named, "repeat": loss.cut.repeat, "steps": tuple(_of_rows(step) for step in others)}
    set_facts(node, replace(facts(node), inside=tuple(facts(step) for step in steps)))
    for old in reversed(steps):
        node.graph.erase_node(old)


def _of_rows(step: fx.Node) -> CheapStep:
    """A step between product and loss, of logits or of what they are made of."""
    name = op_name(step.target)
    if name == "_to_copy":
        return "aten._to_copy.default", ("%0",), (("dtype", info_of(step).dtype),)
    if name == "slice":
        return "aten.slice.Tensor", ("%0", *step.args[1:]), ()
    return "aten.reshape.default", ("%0", (*info_of(step).shape[:-1], -1)), ()
