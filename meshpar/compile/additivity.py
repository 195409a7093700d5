"""How a value of all samples follows from those of equal parts of them: it is their sum, their mean, or neither.

    sum(f(x)), sum(f(x)) * 0.01, labels lost by a sum        sum
    mean(f(x)), sum(f(x)) / len(x), what no sample enters    mean
    max(f(x)), mean(f(x)).sqrt(), mean(f(x)) * mean(g(x))    neither

A sum that is divided by a number of samples is a mean. Such a number is a constant in a graph; it is known by being the number of samples
in the graph times sizes of what is summed. In a graph of one sample, sums over samples and divisions by their number have vanished: only a
mean over all elements, or a count of labels, is known for what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from math import prod
from typing import Literal

from torch import fx

from meshpar.graph.facts import Info, facts, info_of
from meshpar.graph.op import op_name, operands, read, value_of
from meshpar.graph.operators import operator_of
from meshpar.passes.samples import Samples, statistics

Adding = Literal["sum", "mean", "neither"]


class Additivity:
    """Asks a graph. `samples`: where they are in it; `numbers`: values that count as constants."""

    def __init__(self, graph: fx.Graph, samples: Samples, numbers: Collection[fx.Node] = ()) -> None:
        self.samples, self.numbers = samples, numbers
        self.gone = statistics(samples, graph)
        self.count = prod(samples.inference.extents.size(one) for one in list(samples.whole)[:1])

    def of(self, node: fx.Node, over: Sequence[fx.Node] = ()) -> Adding:
        """What a value is. `over`: calls on the way from it to the loss that multiply it with a constant, or divide it by one."""
        if node not in self.samples.reached:
            return "mean"
        if node.op != "call_function":
            return "neither"
        name = op_name(node.target)
        given = [a for a in operands(node) if a not in self.numbers]
        if passes_on(node):
            return self.of(given[0], over)
        if name in ("mul", "div") and len(given) == 1 and given[0] is node.args[0]:
            return self.of(given[0], (*over, node))
        if name in ("add", "sub", "rsub", "stack", "cat"):
            return self._together([self.of(a, over) for a in given], alone=name in ("add", "sub", "rsub") and len(given) == 1)
        if name == "mean" or adds_up(node):
            return self._reduced(node, name, given, over)
        return "neither"

    def _together(self, kinds: Sequence[Adding], alone: bool) -> Adding:
        """Of values side by side, or of one (`alone`) and a constant: a part's sum would have the constant once too often."""
        (kind, *others) = dict.fromkeys(kinds)
        return "neither" if others or (alone and kind == "sum") else kind

    def _reduced(self, node: fx.Node, name: str, given: Sequence[fx.Node], over: Sequence[fx.Node]) -> Adding:
        before = self.samples.leaves(self.samples.of(map(value_of, given)))
        after = self.samples.leaves(self.samples.of([(node, 0)]))
        if any(self.gone[a] & (before or {*self.gone[a]}) for a in given) and before:
            return "neither"
        if not self.samples.whole:
            return "mean" if name == "mean" and info_of(node).shape == () and info_of(given[0]).shape[:1] == (1,) else "neither"
        if before and not after:
            return "mean" if name == "mean" or self._is_divided(node, over) else "sum"
        return "neither" if before or len(given) != 1 else self.of(given[0], over)

    def _is_divided(self, node: fx.Node, over: Sequence[fx.Node]) -> bool:
        """Whether one of the constants is a number of samples, or of elements of samples, that are summed."""
        counts = {self.count * product for source in _summed(node) for product in self._products(source)}
        return any(round(d) in counts and abs(d - round(d)) < 1e-9 * d for d in map(_divisor, over) if d is not None and d > 0.5)

    def _products(self, value: fx.Node) -> Iterator[int]:
        """The products of any dims of a value but those of its samples."""
        extents = self.samples.inference.extents
        leaves = [leaf for one in self.samples.inference.dims.get(value_of(value), ()) if one is not None for leaf in extents.leaves(one)]
        sizes = [extents.size(leaf) for leaf in leaves if not self.samples.is_one(leaf)][:8]
        return (prod(some) for n in range(len(sizes) + 1) for some in combinations(sizes, n))


_SAME_SHAPE = ("elementwise", "view", "copy", "reduction", "loss", "label loss", "softmax")


def _summed(node: fx.Node) -> Iterator[fx.Node]:
    """What a call sums, as it was before other sums and what is done element by element."""
    while given := [a for a in operands(node) if isinstance(facts(a).info, Info)]:
        node = given[0]
        yield node
        if node.op != "call_function" or operator_of(node.target).kind not in _SAME_SHAPE:
            return


def _divisor(node: fx.Node) -> float | None:
    """By what a call divides: a number, unless it is one that may change."""
    by = node.args[1]
    if not isinstance(by, (int, float)) or by == 0:
        return None
    return float(by) if op_name(node.target) == "div" else 1.0 / by


def passes_on(node: fx.Node) -> bool:
    """Whether a call hands on the elements of one value, all of them and nothing else, or these negated."""
    if node.op != "call_function" or len(operands(node)) != 1:
        return False
    before, after = facts(operands(node)[0]).info, facts(node).info
    moves = operator_of(node.target).kind in ("view", "copy") and isinstance(before, Info) and isinstance(after, Info)
    return op_name(node.target) == "neg" or (moves and prod(before.shape) == prod(after.shape))  # type: ignore[union-attr]


def adds_up(node: fx.Node) -> bool:
    """Whether what a call gives for parts of the samples adds up to what it gives for all: a sum, a loss that takes no mean."""
    return operator_of(node.target).additive and read(node).arguments.get("reduction") in _SUMS


_SUMS = (None, 2, "sum")
"""What a reduction by a sum is called: by nothing, by torch's own losses, by other people's."""
