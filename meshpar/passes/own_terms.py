"""Backwards of their own over microbatches: what they add to the loss is averaged, what is not linear must treat samples by themselves.

    before                                    after, m microbatches
      y = AddsLoss(x, penalty)                  y = AddsLoss(x, penalty, 1 / m)       the penalty's gradient is 1 / m

The gradients of m microbatches are summed. A backward that adds a term would add it m times; one that is not linear in the gradient gets
that of a microbatch, which is the whole one's only for values of a sample.
"""

from __future__ import annotations

from math import prod

from torch import fx

from meshpar.errors import PlanError, raise_all
from meshpar.graph.facts import facts
from meshpar.graph.op import Op, read
from meshpar.ops.own_backward import function_of_operator, nature_of_operator
from meshpar.passes.samples import Samples


def share_out(graph: fx.Graph, microbatches: int, samples: Samples) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Rewrite the calls with a backward of their own, in place. `samples`: where those of the graph are that are cut into microbatches.

    Returns the modules of terms that are averaged, and of calls that mix the samples of a microbatch. Raises PlanError for what is neither.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and facts(node).nature is not None]
    if not calls:
        return (), ()
    averaged, within, complaints = dict[str, None](), dict[str, None](), list[str]()
    for node in calls:
        call = _Call(read(node), samples)
        where = str(facts(node).module or node.name)
        if call.adds:
            if call.can_be_shared:
                node.args = (*node.args, 1.0 / microbatches)
                averaged[where] = None
            else:
                complaints.append(_told(node, "adds a term of its own to gradients", microbatches))
        if not call.is_linear and not call.is_by_sample:
            complaints.append(_told(node, "is not linear in the gradient that it is given", microbatches))
        elif call.counts:
            complaints.append(_told(node, "does not treat samples by themselves, as its forward does", microbatches))
        elif call.mixes:
            within[where] = None
    raise_all(PlanError, f"microbatches={microbatches}:", list(dict.fromkeys(complaints)))
    return tuple(averaged), tuple(within)


def _told(node: fx.Node, what: str, microbatches: int) -> str:
    where = f"{facts(node).module or 'the model'} ({facts(node).source or 'source unknown'})"
    return (
        f"the backward of {function_of_operator(node.target)} in {where} {what}: over {microbatches} microbatches, whose gradients are "
        "summed, it would give something else. Use microbatches=1, or write what it does as a term of the loss."
    )


class _Call:
    """A call with a backward of its own, and where its samples are."""

    def __init__(self, op: Op, samples: Samples) -> None:
        nature = op.nature
        assert nature is not None
        self.op, self.nature = op, nature
        needing = [i for i, info in enumerate(op.infos) if info.requires_grad]
        self.adding = [i for i in needing if i in nature.shared and i in nature.adding]
        self.others = [i for i in needing if i not in nature.shared]
        self.dims = [samples.dims(node) for node in op.operands]
        self.reached = [node in samples.reached for node in op.operands]

    @property
    def adds(self) -> bool:
        """Whether it adds terms that are not those of single samples."""
        return any(not (self.dims[i] and self.dims[i] <= set(self.nature.alone)) for i in self.adding)

    @property
    def can_be_shared(self) -> bool:
        """Whether every term is one number, or one of the parameters alone, and may be divided by the number of microbatches."""
        ours = nature_of_operator(self.op.node.target) is not None
        return ours and all(prod(self.op.infos[i].shape) == 1 or not self.reached[i] for i in self.adding)

    @property
    def is_linear(self) -> bool:
        return self.nature.linear or not self.others

    @property
    def is_by_sample(self) -> bool:
        """Whether the gradient of every operand is that of single samples."""
        return all(self.dims[i] and self.dims[i] <= set(self.nature.alone) for i in self.others)

    @property
    def counts(self) -> bool:
        """Whether backward alone mixes samples, or divides by how many there are."""
        return self._together(self.nature.alone) and not self._together(self.nature.apart)

    @property
    def mixes(self) -> bool:
        """Whether it treats the samples that it sees together."""
        return self._together(self.nature.alone)

    def _together(self, alone: tuple[int, ...]) -> bool:
        if self.nature.elementwise or not any(self.reached):
            return False
        held = [
            dims for i, (dims, reached) in enumerate(zip(self.dims, self.reached, strict=True)) if reached and i not in self.nature.shared
        ]
        return not all(dims and dims <= set(alone) for dims in held)
