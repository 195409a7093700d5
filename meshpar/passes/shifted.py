"""A loss over all positions but some at the ends, as one over all positions whose labels there are ignored.

    before                                                  after
      x = slice(logits, 1, 0, -1)         [b, s - 1, v]
      y = reshape(x, [b (s - 1), v])                          y = reshape(logits, [b s, v])
      t = reshape(labels[:, 1:], [b (s - 1)])                 t = reshape(pad(labels[:, 1:], (0, 1), -100), [b s])
      loss = cross_entropy(y, t, sum)                         loss = cross_entropy(y, t, sum)

A rank's part of a sequence without its last position is not a part of the sequence without it: where positions are cut, the logits would be
gathered. An ignored label adds nothing to a sum, nor to its gradient; the count of labels stays that of the labels as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from meshpar.graph.facts import Info, facts, info_of, set_facts
from meshpar.graph.op import op_name, operands, read
from meshpar.graph.operators import operator_of

aten = torch.ops.aten
_LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
_SUM = 2


@dataclass(frozen=True)
class IgnoreEnds:
    """Losses of the kind above, in the whole graph. Changes it in place."""

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            if node.op == "call_function" and op_name(node.target) in _LOSSES and (found := _shifted(node)) is not None:
                found.rewrite(node)
        return graph


@dataclass(frozen=True)
class _Shifted:
    cut: fx.Node
    """The slice."""
    steps: Sequence[fx.Node]
    """What is done to it before it meets the labels, in order."""
    before: int
    """Positions that are left out at the beginning."""
    after: int
    target: fx.Node

    def rewrite(self, loss: fx.Node) -> None:
        """Let `loss` see all positions."""
        ignored = read(loss).arguments["ignore_index"]
        with loss.graph.inserting_before(loss):
            labels = self._labels(ignored)
            logits: Any = self.cut.args[0]
            for step in self.steps:
                logits = self._again(step, logits)
        loss.args = (logits, labels, *loss.args[2:])
        for old in (*reversed(self.steps), self.cut):
            if not old.users:
                loss.graph.erase_node(old)

    def _again(self, step: fx.Node, first: fx.Node) -> fx.Node:
        """A step of all positions."""
        if step.target is aten.slice.Tensor:  # that took all there was
            return first
        new = step.graph.node_copy(step, lambda n: first if n is operands(step)[0] else n)
        shape = _grown(step, info_of(first).shape)
        if operator_of(step.target).view and op_name(step.target) in _RESHAPES:
            new.target, new.args, new.kwargs = aten.reshape.default, (first, list(shape)), {}
        return set_facts(new, replace(facts(step), info=replace(info_of(step), shape=shape)))

    def _labels(self, ignored: int) -> fx.Node:
        """The labels, with ignored ones at the ends."""
        short, long = info_of(self.cut).shape, info_of(self.cut.args[0]).shape  # type: ignore[arg-type]
        info, lead = info_of(self.target), short[:-1]
        first = self._made(aten.reshape.default, info, lead, self.target, list(lead)) if info.shape != lead else self.target
        padded = self._made(aten.constant_pad_nd.default, info, long[:-1], first, [self.before, self.after], ignored)
        if info.shape == lead:
            return padded
        n = info.shape[0] // (lead[0] * lead[1]) * long[0] * long[1]
        return self._made(aten.reshape.default, info, (n,), padded, [n])

    def _made(self, op: Any, info: Info, shape: tuple[int, ...], *args: Any) -> fx.Node:
        new = self.target.graph.call_function(op, args)
        return set_facts(new, facts(self.target).beside(replace(info, shape=tuple(shape))))


_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten")


def _shifted(loss: fx.Node) -> _Shifted | None:
    """What a loss leaves out, if that is positions at the ends and nothing else is in the way."""
    arguments = read(loss).arguments
    target = arguments["target"]
    if arguments["reduction"] != _SUM or info_of(target).dtype.is_floating_point or len(operands(loss)) != 2:
        return None
    steps: list[fx.Node] = []
    node = operands(loss)[0]
    while not _leaves_out(node):
        if not _goes_through(node):
            return None
        steps.insert(0, node)
        node = operands(node)[0]
    n, shape = info_of(operands(node)[0]).shape[-2], info_of(node).shape
    merges = [len(info_of(step).shape) < len(info_of(operands(step)[0]).shape) for step in steps]
    ways = sum(merges) + sum(op_name(step.target) == "transpose" for step in steps)
    if ways != len(shape) - 2 or info_of(target).shape != ((shape[0] * shape[1],) if any(merges) else shape[:-1]):
        return None  # (the dim before the last is not that of the labels)
    start = int(read(node).arguments["start"] or 0) % n
    return _Shifted(node, steps, start, n - start - shape[-2], target)


def _leaves_out(node: fx.Node) -> bool:
    """Whether a node is all of a value but some positions (the dim before the last) at the ends."""
    if node.op != "call_function" or node.target is not aten.slice.Tensor:
        return False
    call = read(node)
    before, after = call.shapes[0], call.out.shape
    return before != after and len(after) in (2, 3) and call.dim() == len(after) - 2 and call.arguments["step"] == 1


def _goes_through(node: fx.Node) -> bool:
    """Whether a node does the same to all positions, whatever their number."""
    if node.op != "call_function" or not operands(node) or not isinstance(facts(node).info, Info):
        return False
    name, row, given = op_name(node.target), operator_of(node.target), operands(node)
    before, after = info_of(given[0]).shape, info_of(node).shape
    if name == "linear":
        return all(other.op == "get_attr" for other in given[1:])
    if len(given) > 1:
        return False
    if name in _RESHAPES:
        return before == after or (len(before) == 3 and after == (before[0] * before[1], before[2]))
    if name == "transpose":
        return len(before) == 3 and {a % 3 for a in node.args[1:3]} == {1, 2}  # type: ignore[operator]
    if name in ("softmax", "log_softmax", "_softmax", "_log_softmax"):
        return read(node).dim() == len(after) - 1
    return before == after and (row.kind in ("elementwise", "copy") or (row.view and name in ("alias", "detach", "slice")))


def _grown(step: fx.Node, first: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a step's result when its operand has shape `first`."""
    name, after = op_name(step.target), info_of(step).shape
    if name == "transpose":
        return first[0], first[2], first[1]
    if name == "linear":
        return (*first[:-1], after[-1])
    return first if len(after) == len(first) else (first[0] * first[1], first[2])
