"""Follows gradients backward: which are whole and which are pending sums, and whether every parameter's is summed exactly once.

y = linear(x, w)   y cut over tp, x the same on all ranks     x's gradient is a pending sum: each rank has that of its columns
x = i_to_r(h)      takes a pending sum, makes it whole        h's gradient is whole
norm(h)            passes on what it gets                     whole by one use, pending by another: contradiction
"""

from __future__ import annotations

from torch import fx

from meshpar.graph.facts import facts, infos_of
from meshpar.proof.static.claims import Claims
from meshpar.proof.static.forms import AS_RESULT, PARTIAL, WHOLE, Gradient, told
from meshpar.proof.static.reader import GradientEdge, LocalKey, ProgramReading
from meshpar.sharding.types import I

_TOLD = {WHOLE: "whole on every rank", PARTIAL: "a pending sum"}


class Backward:
    """The gradients of everything that was read."""

    def __init__(self, reading: ProgramReading) -> None:
        self.reading, self.claims = reading, reading.claims
        self.found: dict[LocalKey, list[Gradient | None]] = {}

    def run(self) -> None:
        """Follow all gradients; what contradicts is noted in the reading."""
        for key, which, _ in self.reading.outputs:
            if _flows(key):
                begins = (WHOLE if whole else PARTIAL for whole in self.claims.gradients[which])
                self._arrive(key, list(begins))
        for node, stage in reversed(self.reading.order):
            self.reading.stage = stage
            for index in range(len(infos_of(node))):
                gradient = self.found.get((node, index))
                if gradient is not None:
                    self._through(node, index, gradient)

    def _through(self, node: fx.Node, index: int, gradient: list[Gradient | None]) -> None:
        self._check(node, index, gradient)
        if node.op == "get_attr":
            self._parameter(node, gradient)
        for edge in self.reading.edges.get((node, index), ()):
            if _flows(edge.operand):
                self._arrive(edge.operand, self._back(node, edge, gradient))

    def _check(self, node: fx.Node, index: int, gradient: list[Gradient | None]) -> None:
        """The gradient of a part, or of a pending sum, is never pending itself."""
        held = self.reading.held.get((node, index))
        if held is None or node.op == "get_attr":
            return
        for k, (axis, type_) in enumerate(zip(self.claims.axes, held.types, strict=True)):
            if type_ != I and gradient[k] is PARTIAL:
                self.reading.fault(node, axis.name, f"it is {told(type_)}, and what uses it gives gradients that are pending sums")
                gradient[k] = None

    def _back(self, node: fx.Node, edge: GradientEdge, gradient: list[Gradient | None]) -> list[Gradient | None]:
        found: list[Gradient | None] = []
        for axis, has, step in zip(self.claims.axes, gradient, edge.steps, strict=True):
            if has is not None and step.needs is not None and has is not step.needs:
                self.reading.fault(
                    node,
                    axis.name,
                    f"the gradient of its result is {_TOLD[has]}; its backward is right for one that is {_TOLD[step.needs]}",
                )
                found.append(None if step.gives is AS_RESULT else step.gives)
            else:
                found.append(has if step.gives is AS_RESULT else step.gives)
        return found

    def _arrive(self, key: LocalKey, gradient: list[Gradient | None]) -> None:
        if key not in self.found:
            self.found[key] = list(gradient)
            return
        here = self.found[key]
        for k, (axis, old, new) in enumerate(zip(self.claims.axes, here, gradient, strict=True)):
            if old is None:
                here[k] = new
            elif new is not None and new is not old:
                self.reading.fault(
                    key[0], axis.name, "its gradient is whole by one use and a pending sum by another, and they are added up"
                )
                here[k] = None

    def _parameter(self, node: fx.Node, gradient: list[Gradient | None]) -> None:
        """A parameter's gradient is summed over an axis exactly once: by the program, or by data parallelism after it."""
        held, name = self.reading.held.get((node, 0)), str(node.target)
        if held is None or not facts(node).info.requires_grad:  # type: ignore[union-attr]
            return
        for axis, type_, has, summed in zip(self.claims.axes, held.types, gradient, _summed(self.claims), strict=True):
            later = name in summed and type_ == I
            if has is (WHOLE if later else PARTIAL):
                told_ = "data parallelism adds it up again" if later else "nothing adds it up"
                self.reading.fault(node, axis.name, f"its gradient is {_TOLD[has]}, and {told_}")


def _summed(claims: Claims) -> tuple[frozenset[str], ...]:
    return claims.summed or (frozenset(),) * len(claims.axes)


def _flows(key: LocalKey) -> bool:
    infos = infos_of(key[0])
    info = infos[key[1]] if key[1] < len(infos) else None
    return info is not None and info.requires_grad and info.dtype.is_floating_point | info.dtype.is_complex
