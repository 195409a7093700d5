"""What an axis is for, as the solver asks it: which factors may be cut, how values cross between units, where a parameter may lie.

    divides     values that cross                        factors that may be cut             parameters
    samples     cut along samples                        the samples                         whole, pending gradients
    experts     cut along samples                        the samples, the experts            as above; those of experts one part a rank
    sequence    cut along the sequence                   the sequence, heads, channels       whole, pending gradients
    weights     cut along the sequence, or invariant     those of matrices, the sequence     cut along any of them, or whole

A policy is one class, and a row of POLICIES. It decides nothing that costs tell: that is the 0-1 program's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from torch import fx

from meshpar.errors import PlanError
from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import Value, operands, value_info, value_of
from meshpar.graph.operators import ARITHMETIC, operator_of
from meshpar.roles import Divides
from meshpar.sharding import attention, positions
from meshpar.sharding.extents import shard
from meshpar.sharding.infer import BoundOp
from meshpar.sharding.price import Price
from meshpar.sharding.reading import Reading
from meshpar.sharding.types import I, Owned, R, Shard, Type, plain
from meshpar.sharding.typings import Choice, at_rest


@dataclass(frozen=True)
class Request:
    """What is to be solved: the axis, and what the user or an earlier solution already fixed."""

    axis: str
    size: int
    divides: Divides = "weights"
    """What the axis divides: its policy."""
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Placeholders cut along the axis -> the dim that is cut."""
    parameters: frozenset[str] = frozenset()
    """Names of parameters, among the get_attr targets."""
    pinned: Mapping[str, Type] = field(default_factory=dict)
    """Parameters whose type is given."""
    wanted: Mapping[str, int | None] = field(default_factory=dict)
    """Parameters the user has rules for -> the dim to cut, None for whole."""
    owned: bool = False
    """Whether a parameter may lie on one rank alone: experts kept as a list of modules are then divided too."""
    sequence: bool | Literal["auto"] = True
    """Whether residual streams are cut along their sequence where that is possible; "auto": where it is no dearer."""
    outputs: Sequence[Type | None] = ()
    """Types the outputs must have; None leaves it to the solver."""
    ordered: bool = True
    """Whether outputs that are cut leave in global order (as DTensors tell it), or as they are."""
    price: Price = field(default_factory=Price)
    context: str = "auto"
    """How attention is to be computed where the sequence is cut."""
    chunks: int | None = None
    """How many pieces of a sequence along which attention's work is uneven each rank gets; None: two of causal ones, if those divide."""
    inner: int = 1
    """Ranks of the axes that are typed after this one and cut the same heads and channels again: what is cut must divide by both."""
    samples: Mapping[str, int] = field(default_factory=dict)
    """Placeholders that hold samples -> along which dim."""
    sharing: int = 1
    """Ranks of the axes that are typed after this one and cut the samples."""


class Policy(ABC):
    """What the solver asks about an axis."""

    even: bool
    """Whether all ranks must hold equal parts."""
    experts: frozenset[int] = frozenset()
    """The factors that are the experts of the model, where the axis splits those."""
    slices_early: bool = False
    """Whether values without gradients of which every use wants the same part are made as that part."""

    @abstractmethod
    def crosses(self, value: Value, users: int) -> Type:
        """The type in which a value is handed from the unit that makes it to the `users` units that use it."""

    def streams(self) -> tuple[int, ...]:
        """The streams of values that cross cut, and may cross whole as well if that is cheaper."""
        return ()

    def leaving_whole(self, streams: Iterable[int]) -> Policy:
        """The same policy, with these streams whole."""
        return self

    @abstractmethod
    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        """Per unit, the factors that may be cut. `residual`: the types of the values that cross."""

    @abstractmethod
    def placements(self, node: fx.Node, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        """Where a parameter may lie. `whole`: what leaving it whole costs; `seeds`: the factors that may be cut where it is used."""

    def fixed(self, call: BoundOp) -> Choice | None:
        """The one typing of a call that is not for the solver to choose."""
        return None

    def revised(self, call: BoundOp, found: Sequence[Choice], work: float, unit: float) -> Sequence[Choice]:
        """The typings of a call as they are on such an axis. `work`: seconds of the whole call, `unit`: to gather the largest value."""
        return found


class SamplesPolicy(Policy):
    """Samples are cut, parameters stay whole, and their gradients are pending sums."""

    even = True  # what is decided for the next axis, on the shapes of one rank, holds for all

    def __init__(self, request: Request, reading: Reading) -> None:
        self.request, self.reading = request, reading

    def crosses(self, value: Value, users: int) -> Type:
        info = value_info(value)
        for factor in self.reading.batch:
            for d, one in enumerate(self.reading.inference.dims[value]):
                cut = self.reading.shard(d, one, factor)
                if cut is not None:
                    return cut
        return I if value[0] in self.reading.depends or not info.requires_grad else at_rest(info, R)

    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        return dict.fromkeys(set(self.reading.units.values()), self.reading.batch)

    def placements(self, node: fx.Node, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        return (Choice((), (at_rest(info_of(node), R),), 0.0, "data"),)


class ExpertsPolicy(Policy):
    """Samples are cut, and the rows of experts go to the ranks that hold these experts."""

    even = True

    def __init__(self, request: Request, reading: Reading) -> None:
        self.request, self.reading = request, reading
        self.samples = SamplesPolicy(request, reading)
        self.experts = self._factors()
        self.owners = self._owners() if request.owned else {}

    def crosses(self, value: Value, users: int) -> Type:
        return self.samples.crosses(value, users)

    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        return {unit: (*batch, *sorted(self.experts)) for unit, batch in self.samples.seeds(residual).items()}

    def placements(self, node: fx.Node, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        if node in self.owners:
            return (Choice((), (Owned(self.owners[node]),), 0.0, "experts"),)
        divided = self._of_experts(node)
        return self.samples.placements(node, whole, seeds) if divided is None else (divided,)

    def fixed(self, call: BoundOp) -> Choice | None:
        if not call.op.operands or call.op.operands[0] not in self.owners:
            return None
        uses = tuple(Owned(self.owners[part]) for part in call.op.operands)
        return Choice(uses, (plain(0, len(uses)),), 0.0, "experts")

    def _factors(self) -> frozenset[int]:
        """What stands for the experts: the first dim of their matrices, and of tables looked up by the expert of a row."""
        found: set[int] = set()
        for node, call in self.reading.inference.calls.items():
            infos, table = call.op.infos, -1
            if call.op.name == "meshpar.grouped_mm":
                table = 1
            elif call.op.name == "index" and len(infos) == 2 and infos[1].rows and not infos[0].rows:
                table = 0
            if table >= 0 and (one := self.reading.inference.dims[value_of(operands(node)[table])][0]) is not None:
                found.add(self.reading.inference.extents.find(one))
        return frozenset(found)

    def _owners(self) -> dict[fx.Node, int]:
        """The parameters of experts kept as a list of modules -> the rank that has them."""
        found: dict[fx.Node, int] = {}
        for parts in expert_stacks(self.reading.graph):
            if len(parts) % self.reading.size:
                raise PlanError(f"{self.request.axis}={self.reading.size} does not divide the {len(parts)} experts of {parts[0].target}.")
            found.update({part: k // (len(parts) // self.reading.size) for k, part in enumerate(parts)})
        return found

    def _of_experts(self, node: fx.Node) -> Choice | None:
        """A parameter with one part for each expert is divided among the ranks."""
        shape = info_of(node).shape
        for d, one in enumerate(self.reading.inference.dims[node, 0]):
            if one is not None and self.reading.inference.extents.find(one) in self.experts:
                if shape[d] % self.reading.size:
                    divisors = ", ".join(str(n) for n in range(1, shape[d] + 1) if shape[d] % n == 0)
                    raise PlanError(
                        f"{self.request.axis}={self.reading.size} does not divide the {shape[d]} experts of {node.target} {list(shape)}. "
                        f"Valid {self.request.axis}: {divisors}."
                    )
                return Choice((), (plain(d, shape[d]),), 0.0, "experts")
            for cut in filter(None, (self.reading.shard(d, one, factor) for factor in self.experts)):  # joined with another dim
                return Choice((), (cut,), 0.0, "experts")
        return None


class WeightsPolicy(Policy):
    """Matrices are cut along what they are made of (heads, MLP width, vocabulary, ...), the residual stream along its sequence."""

    even = False

    def __init__(self, request: Request, reading: Reading, whole: frozenset[int] = frozenset()) -> None:
        self.request, self.reading, self.whole = request, reading, whole

    def crosses(self, value: Value, users: int) -> Type:
        found = self._sequence(value, users)
        return I if found is None or found[0] in self.whole else found[1]

    def streams(self) -> tuple[int, ...]:
        """The sequences along which values that cross are cut, each one stream: an encoder's, a decoder's."""
        if self.request.sequence != "auto":
            return ()
        found = (self._sequence(value, len(users)) for value, users in self.reading.crossing.items())
        return tuple(dict.fromkeys(one[0] for one in found if one is not None and one[0] not in self.whole))

    def leaving_whole(self, streams: Iterable[int]) -> Policy:
        return WeightsPolicy(self.request, self.reading, self.whole | frozenset(streams))

    def _sequence(self, value: Value, users: int) -> tuple[int, Shard] | None:
        if not (self.request.sequence and value_info(value).requires_grad and users <= 3):
            return None
        return self.reading.sequence(self.reading.inference.dims[value])

    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        """The factors of a unit's matrices that are not the residual's, and the residual's sequence.

        Those of the residual too where most of a unit is matrices from the residual to itself with nothing else in between: an
        elementwise recurrence of the stream's own channels, and what mixes them after it.
        """
        carried, sequence = self._residual_factors(residual)
        found: dict[str | None, dict[int, None]] = {}
        within: dict[str | None, dict[fx.Node, list[int]]] = {}
        for node in self.reading.graph.nodes:
            if node.op != "get_attr" or node.target not in self.reading.parameters or len(info_of(node).shape) < 2:
                continue
            dims = [one for one in self.reading.inference.dims[node, 0] if one is not None]
            factors = [factor for one in dims for factor in self._outermost(one, carried)]
            for unit in self.reading.units_using(node):
                found.setdefault(unit, {}).update(dict.fromkeys(factors))
                if not factors and len(dims) > 1:
                    within.setdefault(unit, {})[node] = dims
        for unit, matrices in within.items():
            if unit is not None and sum(prod(info_of(node).shape) for node in matrices) > self.reading.elements[unit] / 2:
                found[unit].update(dict.fromkeys(f for dims in matrices.values() for one in dims for f in self._outermost(one, set())))
        return {u: tuple(dict.fromkeys([*found.get(u, {}), *sequence])) for u in set(self.reading.units.values())}

    def placements(self, node: fx.Node, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        found = [Choice((), (I,), whole, "whole")]
        seen: set[Type] = set()
        for factor in seeds:
            for d, one in enumerate(self.reading.inference.dims[node, 0]):
                cut = self.reading.shard(d, one, factor)
                if cut is not None and cut not in seen:
                    seen.add(cut)
                    found.append(Choice((), (cut,), 0.0 if cut.is_contiguous else 1e-11, "matrix"))
        return self._ruled(node, found) if node.target in self.request.wanted else tuple(found)

    def _residual_factors(self, residual: Mapping[Value, Type]) -> tuple[set[int], list[int]]:
        """The factors of the residual's hidden size, and those of its sequence that are cut."""
        find, leaves = self.reading.inference.extents.find, self.reading.inference.extents.leaves
        carried: set[int] = set()
        sequence: dict[int, None] = {}
        for value, type_ in residual.items():
            if not value_info(value).requires_grad:
                continue
            for d, one in enumerate(self.reading.inference.dims[value]):
                if one is None:
                    continue
                if self.reading.is_hidden(one):
                    carried.update((find(one), *leaves(one)))
                if isinstance(type_, Shard) and type_.dim == d:
                    factors = (*reversed(leaves(one)), find(one))
                    sequence.update(dict.fromkeys([f for f in factors if self.reading.shard(d, one, f) == type_][:1]))
        return carried, list(sequence)

    def _outermost(self, one: int, carried: set[int]) -> list[int]:
        """The outermost factor along which a parameter's dim can be cut: heads rather than what is inside a head."""
        factors = (f for f in self.reading.inference.extents.cuttable(one) if f not in carried and f not in self.reading.taken)
        return [f for f in factors if self.reading.shard(0, one, f) is not None][:1]

    def _ruled(self, node: fx.Node, found: Iterable[Choice]) -> tuple[Choice, ...]:
        """The placements a user's rule allows."""
        dim, shape = self.request.wanted[str(node.target)], info_of(node).shape
        if dim is None:
            return (Choice((), (I,), 0.0, "rule"),)
        fitting = [Choice((), c.outs, c.cost, "rule") for c in found if isinstance(c.outs[0], Shard) and c.outs[0].dim == dim]
        if not fitting:
            cut = shard(dim, (1, ((shape[dim], 1),)), self.reading.size)
            if cut is None:
                raise PlanError(
                    f"rule: {self.request.axis}={self.reading.size} cannot cut dim {dim} of {node.target} {list(shape)}; "
                    f"valid {self.request.axis}: {', '.join(str(d) for d in range(1, shape[dim] + 1) if shape[dim] % d == 0)}."
                )
            fitting = [Choice((), (cut,), 0.0, "rule")]
        return tuple(fitting)


class SequencePolicy(Policy):
    """Positions are cut, parameters stay whole, and their gradients are pending sums.

    Batches enter whole and are cut where they are used, so that shifts of labels, positions and masks are those of one device. What cannot
    be cut along positions (a scan, attention by heads) is cut along heads or channels, which an all-to-all brings about.
    """

    even = True  # what is decided for the next axis, on the shapes of one rank, holds for all
    slices_early = True  # a mask of all pairs of positions would be the largest value by far

    def __init__(self, request: Request, reading: Reading) -> None:
        self.request, self.reading = request, reading
        self.weights, self.price = WeightsPolicy(request, reading), request.price.at_scale(reading.largest)
        reading.batch = self._needed()
        self._check_length()
        reading.chunks = self._chunks()

    def crosses(self, value: Value, users: int) -> Type:
        info = value_info(value)
        if not info.requires_grad:
            return I
        return self.reading.along_sequence(self.reading.inference.dims[value]) or (I if value[0] in self.reading.depends else R)

    def seeds(self, residual: Mapping[Value, Type]) -> Mapping[str | None, tuple[int, ...]]:
        sequence = self.reading.sequences()
        found = self.weights.seeds(residual)
        ranks = self.request.size * self.request.inner
        size = self.reading.inference.extents.size
        return {unit: tuple(dict.fromkeys([*sequence, *(f for f in own if size(f) % ranks == 0)])) for unit, own in found.items()}

    def placements(self, node: fx.Node, whole: float, seeds: Iterable[int]) -> tuple[Choice, ...]:
        return (Choice((), (at_rest(info_of(node), R),), 0.0, "data"),)

    def revised(self, call: BoundOp, found: Sequence[Choice], work: float, unit: float) -> Sequence[Choice]:
        """Matrices are used whole (gathering what meets them would grow with the sequence); a product is repeated as the last resort."""
        if (row := operator_of(call.op.node.target)).kind not in ARITHMETIC:
            return [*found, *positions.piecewise(call, self.reading, self.price, work)]
        kept = [one for one in found if row.kind != "product" or not self._cuts_a_matrix(call, one)]
        kept += positions.of_parts(call, self.reading, self.price, work)
        if row.sequences:
            kept = attention.gathering(call, kept, self.reading, self.price)
            kept = self._asked_for(call, [*kept, *attention.between_parts(call, self.reading, self.price, work)])
        return [one if _is_cut(one) else replace(one, cost=one.cost + _REPEATED * unit) for one in kept]

    def _cuts_a_matrix(self, call: BoundOp, choice: Choice) -> bool:
        pairs = zip(call.op.operands, choice.uses, strict=True)
        return any(one.op == "get_attr" and one.target in self.request.parameters and isinstance(use, Shard) for one, use in pairs)

    def _asked_for(self, call: BoundOp, found: Sequence[Choice]) -> list[Choice]:
        """The typings of the form the user asked for, where there are any; others are told why not."""
        asked = self.request.context
        fitting = [one for one in found if attention.form(one) in (("ring", "halo") if asked == "ring" else (asked,))]
        return fitting or attention.instead(found, call, self.reading, asked)

    def _needed(self) -> tuple[int, ...]:
        """The samples, where they are too few to be cut here (of what has no positions) and on later axes too."""
        extents, found = self.reading.inference.extents, dict[int, None]()
        for node in self.reading.graph.nodes:
            if node.op == "placeholder" and node.target in self.request.samples:
                one = self.reading.inference.dims[node, 0][self.request.samples[str(node.target)]]
                if one is not None and extents.size(one) % (self.request.size * self.request.sharing):
                    found.update(dict.fromkeys((extents.find(one), *extents.leaves(one))))
        return tuple(found) if self.request.sharing > 1 else ()

    def _chunks(self) -> dict[int, int]:
        """The sequences along which attention's work is uneven -> how many pieces of them each rank gets.

        Raises PlanError where they cannot be dealt out in as many as are asked for.
        """
        asked = self.request.chunks
        found = self._uneven(masked=asked is not None)
        size, ranks = self.reading.inference.extents.size, self.request.size * (2 if asked is None else asked)
        if any(size(one) % ranks for one in found):
            if asked is None:
                return {}
            length = next(size(one) for one in found if size(one) % ranks)
            raise PlanError(
                f"context_chunks={asked}: {asked} x {self.request.axis}={self.request.size} pieces do not divide the {length} positions "
                f"that are attended to. Pad them to {-(-length // ranks) * ranks} (ParallelConfig(pad_to=1) does where that counts "
                f'nothing), or say "auto", or one of {", ".join(map(str, chunk_counts(length, self.request.size)))}.'
            )
        return dict.fromkeys(sorted(found), asked or 2)

    def _uneven(self, *, masked: bool) -> set[int]:
        """The sequences of causal attention, and (`masked`) those whose attention has a mask that is not known beforehand."""
        found: set[int] = set()
        for node, call in self.reading.inference.calls.items():
            if not operator_of(call.op.node.target).sequences:
                continue
            if call.op.arguments.get("is_causal", True) or (masked and len(call.op.operands) > 3):
                one = self.reading.inference.dims[value_of(operands(node)[0])][-2]
                found.update(() if one is None else [self.reading.inference.extents.find(one)])
        return found

    def _check_length(self) -> None:
        """Raises PlanError where the positions of what the model is given cannot be dealt out evenly."""
        size = self.request.size
        for node in self.reading.graph.nodes:
            if node.op != "placeholder" or facts(node).info is None:
                continue
            for d, one in enumerate(self.reading.inference.dims[node, 0]):
                n = info_of(node).shape[d]
                if one is not None and n % size and self.reading.inference.extents.find(one) in self.reading.positions:
                    enough, balanced = (-(-n // k) * k for k in (size, 2 * size))
                    better = "" if enough == balanced else f"; better to {balanced}, so that causal attention is shared out evenly"
                    divisors = ", ".join(str(k) for k in range(1, min(n, 64) + 1) if n % k == 0)
                    raise PlanError(
                        f"{self.request.axis}={size} does not divide the {n} positions of {node.target} {list(info_of(node).shape)}. "
                        f"Say ParallelConfig(pad_to=1), which pads batches where that counts nothing, or pad the batch to {enough} "
                        f"(labels with -100, and an attention mask{better}), or use another {self.request.axis}: {divisors}."
                    )


def chunk_counts(length: int, size: int, most: int = 128) -> list[int]:
    """In how many pieces a rank a sequence of `length` can be dealt out to `size` ranks, back and forth: 1, and even numbers.

    >>> chunk_counts(48, 2)
    [1, 2, 4, 6, 8, 12, 24]
    """
    return [one for one in (1, *range(2, most + 1, 2)) if length % (one * size) == 0]


def _is_cut(choice: Choice) -> bool:
    return any(isinstance(type_, Shard) for type_ in (*choice.uses, *choice.outs))


_REPEATED = 100.0
"""A product that every rank repeats costs as much as gathering the largest value so many times: toy sizes make arithmetic look free."""

POLICIES: dict[Divides, type[SamplesPolicy] | type[ExpertsPolicy] | type[WeightsPolicy] | type[SequencePolicy]] = {
    "samples": SamplesPolicy,
    "experts": ExpertsPolicy,
    "sequence": SequencePolicy,
    "weights": WeightsPolicy,
}


def expert_stacks(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """The parameters of experts that are kept as a list of modules and used as a stack: those of one role together, in order."""
    found = []
    for node in graph.nodes:
        parts = operands(node) if facts(node).expert_stack else ()
        if parts and all(part.op == "get_attr" and len(part.users) == 1 for part in parts) and len(set(parts)) == len(parts):
            found.append(parts)
    return found
