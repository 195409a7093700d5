"""What is known of a node of a graph, as one frozen record; a new node's record is derived from an old one's, never put together by hand.

    facts(node)                                        what is known of it
    set_facts(new, facts(old))                         the same call in another graph (`node_copy` keeps them by itself)
    set_facts(new, facts(old).beside(info))            another value, computed at the same place of the model
    set_facts(new, facts(old).outside())               the same, but no part of a block
    set_facts(item, facts(call).item(1, info))         one of the results of a call
    set_facts(new, facts(old).lowered(...))            the part of the value that a rank holds
    set_facts(new, facts(old).converted(...))          the value in another type

The record stands under one key of `node.meta`. While a model is captured, torch's own keys ("val", "nn_module_stack", ...) are beside it;
graphs of ours have no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import fx

from meshpar.ops.nature import Nature
from meshpar.sharding.types import Partial, Ragged, Shard, Type


@dataclass(frozen=True, slots=True)
class Info:
    """One tensor of the graph: `shape`, `dtype`, and whether a gradient flows through it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    rows: bool = False
    """Whether it holds rows sorted by expert (or says where those of each expert end, or which is which): see `graph.rows`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class DataSized:
    """While a model is captured: a tensor with a size that depends on data. Its symbol stands where the number would."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> tuple[str, int] | None:
        """The symbol and its dim, if there is one."""
        found = [(n, d) for d, n in enumerate(self.shape) if isinstance(n, str)]
        return found[0] if len(found) == 1 else None


Results = Info | DataSized | tuple[Info | DataSized | None, ...] | None
"""What a node gives: one tensor, or several (None for a result that is none), or nothing that is known of."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a conversion does: between which types, on the `axis` of `size` ranks, of a value that is `whole` on this axis.

    (Whole as far as ranks of this axis are concerned: later axes may cut it.)
    """

    axis: str
    size: int
    before: Type
    after: Type
    whole: Info


@dataclass(frozen=True, slots=True)
class Exchange:
    """What an exchange of experts' rows sends: `rows`, as a rank has them, over the `axis` of `size` ranks."""

    axis: str
    size: int
    rows: Info


@dataclass(frozen=True, slots=True)
class PartOf:
    """Whose value a node of a lowered graph holds: what it takes to compare the two."""

    origin: str
    """The name of the captured node."""
    typed: tuple[tuple[str, int, tuple[Type, ...]], ...] = ()
    """For every axis so far: its name, its size, and the types of all results of the captured node (or that of this one alone)."""
    index: int = 0
    """Which of the results it is."""

    def converted(self, change: Change) -> PartOf:
        """The same value, of another type on one axis."""
        typed = tuple(
            (axis, size, tuple(change.after if t == change.before else t for t in types) if axis == change.axis else types)
            for axis, size, types in self.typed
        )
        return replace(self, typed=typed)


class Extra(Enum):
    """What a graph is handed beside the batch: the kind of an input, and the name that it has where that is free."""

    DENOMINATOR = "denominator"
    """A count of the whole step, by which a term of the loss is divided. There may be several; they are numbered."""
    RANDOM_KEY = "random_key"
    """An integer that the runtime changes with every forward; random numbers follow from it."""
    EXPERT_TALLY = "expert_tally"
    """A `Tally`, where experts' loads are noted."""
    WEIGHT_GRADIENTS = "weight_gradients"
    """A `WeightGradients`, the queue of gradients that wait, or None where nothing does."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a node besides its operator and its arguments."""

    info: Results = None
    """What it gives."""

    # where it comes from and where it runs

    module: str | None = None
    """The submodule that ran it, "" for the model itself; of a parameter, the one that holds it."""
    region: str | None = None
    """The block that it belongs to; None outside of blocks."""
    source: str | None = None
    """The line that ran it, as "file.py:line"."""
    stage: int | None = None
    """The stage of the pipeline that a plan wants it on."""

    # what its operator does not say

    seed: int | None = None
    """A running number, on calls that draw random numbers."""
    nature: Nature | None = None
    """What is known of the backward, where it is not torch's own. Without one it is the derivative: linear."""
    expert_stack: bool = False
    """On an `aten.stack` of the parameters of experts that the model keeps as a list: one `get_attr` for each expert, in order."""
    statistics: bool = False
    """On the mean of a batch norm that was written out."""
    extra: Extra | None = None
    """On an input that is no tensor of the batch: what it is."""
    unrecognised: str | None = None
    """On a softmax that may be a part of attention: why it is not made that."""

    # what lowering made of it

    part_of: PartOf | None = None
    """Whose value it holds."""
    cut: tuple[str, ...] = ()
    """The axes on which its ranks hold something different each."""
    axis: str | None = None
    """The axis that it was last made a call on local sizes for."""
    conversion: Change | None = None
    """On a call that converts a value from one type to another."""
    joined: tuple[Change, ...] = ()
    """On one call that stands for several conversions: what each of its results was."""
    exchange: Exchange | None = None
    """On a call that sends experts' rows to other ranks, or back."""
    inside: tuple[Facts, ...] = ()
    """On one call that was several, one after the other: what is known of the others."""

    # while it is captured

    stack: tuple[str, ...] = ()
    """The modules that were running, outermost first."""
    symbol: str | None = None
    """On a number that depends on data: its name in sizes."""

    def beside(self, info: Results) -> Facts:
        """Of another value that is computed at the same place."""
        return Facts(info, self.module, self.region, self.source, self.stage, stack=self.stack)

    def outside(self) -> Facts:
        """Of the same call, as no part of a block."""
        return replace(self, region=None)

    def item(self, index: int, info: Info | None) -> Facts:
        """Of one of the results: what is said of the call itself is not said of it."""
        part = self.part_of and replace(self.part_of, index=index)
        return replace(self.beside(info), part_of=part, cut=self.cut)

    def lowered(self, name: str, axis: tuple[str, int], types: tuple[Type, ...], held: Callable[[Info, Type], Info]) -> Facts:
        """Of the part that a rank holds once the value has these `types` on one `axis` (name, size) more.

        `name`: the node's own. `held`: what a rank has of a tensor of a type. What is sent over earlier axes becomes smaller too.
        """
        part = self.part_of or PartOf(name)
        infos = self.info if isinstance(self.info, tuple) else (self.info,)
        local = tuple(held(i, t) if isinstance(i, Info) else None for i, t in zip(infos, types, strict=True))
        change, exchange, first = self.conversion, self.exchange, (infos[0], local[0])
        change = change and replace(change, whole=_share(change.whole, *first))
        exchange = exchange and replace(exchange, rows=_share(exchange.rows, *first))
        different = any(isinstance(t, (Shard, Partial, Ragged)) for t in types)
        cut = tuple(sorted({*self.cut, axis[0]})) if different else self.cut
        info = local if isinstance(self.info, tuple) else local[0]
        part = replace(part, typed=(*part.typed, (*axis, types)))
        return replace(self, info=info, part_of=part, cut=cut, conversion=change, exchange=exchange)

    def converted(self, change: Change, info: Info, *, at: Facts) -> Facts:
        """Of the same value in another type, converted where `at` is, which asks for it: in its block, and on whichever stage of the
        pipeline lets less be sent (it has no `stage` of its own, see `compile.split`)."""
        part = self.part_of and self.part_of.converted(change)
        return replace(at.beside(info), stage=None, part_of=part, cut=self.cut, conversion=change)


def _share(sent: Info, whole: Results, local: Info | None) -> Info:
    """What is sent over an earlier axis, of a value of which this rank holds `local` of `whole`."""
    assert isinstance(whole, Info) and local is not None
    shape = (n * part // n_whole if n_whole else n for n, n_whole, part in zip(sent.shape, whole.shape, local.shape, strict=True))
    return replace(sent, shape=tuple(shape))


_KEY = "facts"
_NONE = Facts()


def facts(node: fx.Node) -> Facts:
    """What is known of a node; nothing, of one that nobody said anything of."""
    found: Facts = node.meta.get(_KEY, _NONE)
    return found


def set_facts(node: fx.Node, known: Facts) -> fx.Node:
    """Replace what is known of a node; returns the node."""
    node.meta[_KEY] = known
    return node


def info_of(node: fx.Node) -> Info:
    """The one tensor that a node gives."""
    info = facts(node).info
    assert isinstance(info, Info), f"{node.format_node()} gives {info}"
    return info


def infos_of(node: fx.Node) -> tuple[Info | None, ...]:
    """All that a node gives, in order; (None,) where that is nothing known."""
    info = facts(node).info
    return info if isinstance(info, tuple) else (info,)  # type: ignore[return-value]


def gives_several(node: fx.Node) -> bool:
    """Whether the results of a node are picked by `getitem`."""
    return isinstance(facts(node).info, tuple)
