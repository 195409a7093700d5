"""Experts modules of unknown form whose parameters are stacked over the experts: their own forward, for one expert, lifted to all.

Two calls are known, by shapes and types alone:

    experts(hidden [..., h], index [T, k], weights [T, k] or [T, E])   ->  dispatch, the lifted body, combine
    project(rows [n, i] sorted by expert, sizes: E numbers)            ->  the lifted body

What is lifted is what the module computes when every row goes to one expert. Before it is used, it is compared with the module's forward
under random routings, values and gradients. Numbers beyond the experts that have parameters may stand for experts without any (which pass
rows on, say): what those compute is added once per token.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import at_hints, pytree
from meshpar.capture.experts.body import Body, BodyStep, NotLifted, Ref, idle, read_by, refuse_changes
from meshpar.capture.experts.proofs import attempt, proven, reasoned
from meshpar.capture.experts.record import drop, record
from meshpar.capture.stand_in import LARGE, alike, close, derivatives, filled, hooked, reduced, settings, stand_in
from meshpar.ops.experts import combine, dispatch


class ShapeNumbers(list[Any]):
    """The numbers in a one-dimensional tensor, and the tensor."""

    def __init__(self, numbers: list[Any], tensor: Tensor) -> None:
        super().__init__(numbers)
        self.tensor = tensor

    @staticmethod
    def of(numbers: list[Any], tensor: Tensor) -> list[Any]:
        whole = tensor.dim() == 1 and not tensor.is_floating_point()
        return ShapeNumbers(numbers, tensor) if whole else numbers


@dataclass(frozen=True, slots=True)
class Experts:
    """How many experts there are."""

    own: int
    """Those with parameters of their own."""
    total: int
    """With those that have none, as far as the sizes of parameters tell: a stack may have rows for these that nothing reads."""
    joined: bool = False
    """Whether the parameters of all experts are joined along their first dim, [E * n, ...], instead of stacked along one of its own."""

    def stacks(self, tensors: Mapping[str, Tensor], least: int) -> dict[str, Tensor]:
        """Those that may be of all experts; where they are stacked, of `least` dims or more."""
        if self.joined:
            return {name: t for name, t in tensors.items() if t.dim() and t.shape[0] > self.own and t.shape[0] % self.own == 0}
        return {name: t for name, t in tensors.items() if t.dim() >= least and t.shape[0] in (self.own, self.total)}


def experts_of(module: nn.Module) -> tuple[Experts, ...]:
    """How many experts there may be, if the module's own parameters may be stacked ones, or those of the only module in it joined ones."""
    counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() >= 3}
    if counts:
        return (Experts(min(counts), max(counts)),) if len(counts) <= 2 and min(counts) > 1 else ()
    holders = [child for child in module.modules() if next(child.parameters(recurse=False), None) is not None]
    if len(holders) != 1 or len(inspect.signature(type(module).forward).parameters) < 4 or not 1 < len([*module.parameters()]) < 8:
        return ()
    lengths = [p.shape[0] for p in module.parameters() if p.dim()]
    named = {n for n in vars(module).values() if type(n) is int and n > 1 and all(length % n == 0 and length > n for length in lengths)}
    return tuple(Experts(n, n, joined=True) for n in sorted(named))


@dataclass(frozen=True)
class ExpertsCall:
    """How a call of an experts module reads: which leaf of its arguments is what."""

    spec: Any
    leaves: tuple[Any, ...]
    rows: int
    index: int
    weights: int | None
    """None where the rows are sorted already and `index` holds the number of rows of each expert."""

    def with_leaves(self, changed: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


def _is_sizes(leaf: Any) -> bool:
    return isinstance(leaf, ShapeNumbers)


def read(module: nn.Module, experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall | NotLifted | None:
    """The call, if it is one of the known two; None if nothing in it chooses experts."""
    if experts.own == experts.total:
        return _read(module, experts.own, args, kwargs)
    call = _read(module, experts.total, args, kwargs)
    return call if isinstance(call, ExpertsCall) and call.weights is not None else None  # stacks of two lengths need not be of experts


def _read(module: nn.Module, experts: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall | NotLifted | None:
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_sizes)
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    whole = [i for i, t in tensors.items() if not t.is_floating_point() and t.dtype != torch.bool]
    floating = [i for i, t in tensors.items() if t.is_floating_point() and t.dim() >= 2]
    sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, ShapeNumbers) and len(leaf) == experts]
    flat = len(floating) == 1 and tensors[floating[0]].dim() == 2
    if len(tensors) == 1 and flat and len(sizes) == 1:
        return ExpertsCall(spec, tuple(leaves), floating[0], sizes[0], None)
    if len(tensors) == 2 and flat and len(whole) == 1 and tensors[whole[0]].shape == (experts,):
        return ExpertsCall(spec, tuple(leaves), floating[0], whole[0], None)
    unknown = NotLifted("it is not called with hidden [T, h], index [T, k] and weights [T, k]") if whole or sizes else None
    if len(tensors) != 3 or len(floating) != 2 or len(whole) != 1 or tensors[whole[0]].dim() != 2:
        return unknown
    tokens, choices = tensors[whole[0]].shape
    widths = {n for p in module.parameters() for n in p.shape[1:]}
    for rows, weights in (floating, floating[::-1]):
        h, w = tensors[rows].shape, tensors[weights].shape
        if len(w) == 2 and h[:-1].numel() == w[0] == tokens and w[1] in (choices, experts) and h[-1] in widths:
            return ExpertsCall(spec, tuple(leaves), rows, whole[0], weights)
    return unknown


@dataclass(frozen=True)
class LiftedForward:
    """What the forward of an experts module is in terms of dispatched rows."""

    body: Body
    own: int
    beyond: Body | None = None
    """What experts without parameters compute, whose numbers come after the others."""


@dataclass(frozen=True)
class Called:
    """A lifted forward, and the call it is for."""

    lifted: LiftedForward
    call: ExpertsCall


_NO_RUN = "it does not run on a few random rows"


@dataclass
class Stacks:
    """What was learnt about experts modules during one capture."""

    learnt: list[tuple[nn.Module, Experts, ExpertsCall, LiftedForward | NotLifted]] = field(default_factory=list)

    def first(
        self, module: nn.Module, counts: Sequence[Experts], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Called | NotLifted | None:
        """The call, lifted for the first of `counts` for which that can be done; or why for none; or None if it chooses no experts."""
        reasons: list[NotLifted] = []
        for experts in counts:
            call = read(module, experts, args, kwargs)
            found = self.lifted(module, experts, call) if isinstance(call, ExpertsCall) else call
            if isinstance(found, LiftedForward):
                assert isinstance(call, ExpertsCall)
                return Called(found, call)
            if found is not None:
                reasons.append(found)
        told = [reason for reason in reasons if not str(reason).startswith(_NO_RUN)]  # that many experts there may be
        return next(iter(told or reasons), None)

    def lifted(self, module: nn.Module, experts: Experts, call: ExpertsCall) -> LiftedForward | NotLifted:
        """The forward of `module`, lifted and proven; or why it is not."""
        for other, of, as_called, known in self.learnt:
            if (_signature(as_called), of) == (_signature(call), experts) and (other is module or alike(other, module)):
                return known
        numbered = replace(call, leaves=at_hints(call.leaves))
        found = attempt(lambda: _learn(module, experts, numbered), _NO_RUN)
        self.learnt.append((module, experts, call, found))
        return found


def _signature(call: ExpertsCall) -> tuple[Any, ...]:
    """The call without its number of tokens."""
    shapes = [(leaf.dtype, leaf.dim(), leaf.shape[-1]) if isinstance(leaf, Tensor) else type(leaf) for leaf in call.leaves]
    return (call.spec, *shapes, call.rows, call.index, call.weights)


def run(module: nn.Module, lifted: LiftedForward, call: ExpertsCall) -> Tensor:
    """The module's result, by the lifted forward."""
    body, own = lifted.body, lifted.own
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    rows, index = call.leaves[call.rows], call.leaves[call.index]
    if call.weights is None:
        sizes = index.tensor if isinstance(index, ShapeNumbers) else index
        return body(rows, sizes.cumsum(0).to(torch.int32), values)
    if rows.dim() > 2:
        flat = run(module, lifted, replace(call, leaves=tuple({**dict(enumerate(call.leaves)), call.rows: rows.flatten(0, -2)}.values())))
        return flat.unflatten(0, rows.shape[:-1])
    weights = call.leaves[call.weights]
    if weights.shape[1] != index.shape[1]:
        weights = weights.gather(1, index)
    if lifted.beyond is None:
        x, offsets, perm = dispatch(rows, index, own)
        return combine(body(x, offsets, values), perm, weights)
    passed = index >= own
    x, offsets, perm = dispatch(rows, index.masked_fill(passed, own), own, True)
    y = combine(body(x, offsets, values), perm, weights.masked_fill(passed, 0.0))
    share = weights.masked_fill(~passed, 0.0).sum(1, keepdim=True)
    return y + (lifted.beyond(rows, offsets, values) * share).to(y.dtype)


@dataclass(frozen=True)
class _Case:
    """What is to be lifted."""

    module: nn.Module
    experts: Experts
    call: ExpertsCall
    alone: bool = True
    """Whether the module takes fewer choices per token than it is called with."""

    @property
    def choices(self) -> int:
        return 1 if self.call.weights is None else self.call.leaves[self.call.index].shape[1]


def _learn(module: nn.Module, experts: Experts, call: ExpertsCall) -> LiftedForward:
    if any(hooked(child) for child in module.modules() if child is not module):
        raise NotLifted("modules in it have hooks")
    case = _Case(module, experts, call)
    first = reasoned(lambda: _recorded(case, experts.own - 1, None, {}), _NO_RUN)
    if isinstance(first, NotLifted) and case.choices > 1:
        case = replace(case, alone=False)
    beyond, last = _beyond(case)

    def prove(sizes: Mapping[int, int]) -> None:
        body = _recorded(case, experts.own - 1, torch.double, sizes)
        exact = LiftedForward(idle(body), experts.own, beyond and idle(_recorded(case, experts.own, torch.double, sizes)))
        own = range(experts.own)
        pools = [(6, own[: max(2, len(own) - 1)]), (5, own), (1, own), (40, own[:1])]
        if beyond is not None:
            pools += [(7, range(last + 1)), (3, range(experts.own, last + 1))]
        for seed, (tokens, pool) in enumerate(pools):
            _prove(case, exact, tokens, pool, seed, sizes)

    body = proven(lambda sizes: _recorded(case, experts.own - 1, None, sizes), prove, _small(case))
    return LiftedForward(body, experts.own, beyond)


def _small(case: _Case) -> dict[int, int]:
    """Small sizes in place of the large ones of the module's parameters."""
    experts, width = case.experts, case.call.leaves[case.call.rows].shape[-1]
    tensors = [*case.module.parameters(), *case.module.buffers()]
    if not experts.joined:
        return reduced(tensors, width, kept=(experts.own, experts.total))
    apart = [torch.empty(experts.own, t.shape[0] // experts.own, *t.shape[1:], device="meta") for t in tensors if t.dim()]
    sizes = reduced(apart, width, kept=(experts.own, experts.total))
    whole = {t.shape[0]: experts.own * sizes.get(t.shape[0] // experts.own, 0) for t in tensors if t.dim()}
    fits = all(whole.values()) and not (whole.keys() & sizes.keys() or {*whole.values()} & {*sizes.values()})
    return sizes | whole if fits else {}


def _beyond(case: _Case) -> tuple[Body | None, int]:
    """What experts without parameters compute, if there are such, and the last one that is known."""
    own, total = case.experts.own, case.experts.total
    if case.call.weights is None:
        return None, own - 1
    last = total - 1 if total > own else own + 1
    found = [reasoned(lambda e=e: _recorded(case, e, None, {}), "") for e in (own, last)]  # type: ignore[misc]
    if isinstance(found[0], Body):
        return found[0], last if isinstance(found[1], Body) else own
    if total > own:
        raise NotLifted("its stacks differ in length, and what it computes for an expert that is in only some of them is not known")
    return None, own - 1


def _recorded(case: _Case, chosen: int, dtype: torch.dtype | None, sizes: Mapping[int, int]) -> Body:
    """What the module computes for rows of one expert. Raises NotLifted; if it reads parameters where `chosen` has none, too."""
    double = stand_in(
        case.module, torch.Generator().manual_seed(0), dtype=dtype, without=("forward",), sizes=sizes, hollow=True, dropping=drop
    )
    tensors = {**dict(double.named_parameters()), **dict(double.named_buffers())}
    rows, experts = case.call.leaves[case.call.rows], case.experts
    width = sizes.get(rows.shape[-1], rows.shape[-1])

    def one(x: Tensor) -> Tensor:
        return _call(double, case.call, _routed_to(case, x, chosen, dtype))

    before, reason = settings(double), NotLifted("it has no stacked parameters")
    for least in (1, 2):
        stacks = experts.stacks(tensors, least)
        shared = {name: t for name, t in tensors.items() if name not in stacks}
        given = {"joined" if experts.joined else "stacks": stacks, "shared": shared}
        try:
            body = record(one, width, dtype or rows.dtype, **given, expert=chosen, experts=experts.own)
        except NotLifted as error:
            reason = error
            continue
        refuse_changes(before, settings(double), "it sets")
        read = read_by(body)
        if chosen < experts.own:
            longer = [name for name in stacks if name in read and len(stacks[name]) > experts.own and not experts.joined]
            return _narrowed(body, longer, experts.own)
        if not read & stacks.keys():
            return body
        reason = NotLifted("it has more experts than one of its stacks")
    raise reason


def _narrowed(body: Body, names: Sequence[str], own: int) -> Body:
    """The body that reads only the first parts of stacks that are too long."""
    operands = [body.operands[name] for name in names]
    return replace(body, steps=(*(BodyStep(torch.narrow, (Ref(i), 0, 0, own), {}, (i,)) for i in operands), *body.steps))


def _call(double: nn.Module, call: ExpertsCall, changed: Mapping[int, Any]) -> Tensor:
    """The result for rows [n, width], [n, ...]; the module may take and give them with more dims before."""
    more = call.leaves[call.rows].dim() - 2
    rows = changed[call.rows]
    args, kwargs = call.with_leaves({**changed, call.rows: rows.reshape(*(1,) * more, *rows.shape)} if more else changed)
    result: Any = double(*args, **kwargs)
    if more and (not isinstance(result, Tensor) or result.shape[:-1] != (*(1,) * more, rows.shape[0])):
        raise NotLifted("its result is not of the shape of the hidden states it is given")
    return result.reshape(rows.shape[0], -1) if more else result


def _routed_to(case: _Case, x: Tensor, expert: int, dtype: torch.dtype | None) -> dict[int, Any]:
    """The arguments of a call that sends every row to one expert, with a weight of one; and to others that there must be, of zero."""
    count, call = x.shape[0], case.call
    index = call.leaves[call.index]
    if call.weights is None:
        sizes = torch.tensor([count if e == expert else 0 for e in range(case.experts.own)])
        return {call.rows: x, call.index: sizes.tolist() if isinstance(index, ShapeNumbers) else sizes.to(index.dtype)}
    others = [] if case.alone else [e for e in range(case.experts.own) if e != expert][: case.choices - 1]
    chosen = torch.tensor([expert, *others]).expand(count, -1).to(index.dtype)
    weights = call.leaves[call.weights]
    dense = weights.shape[1] != index.shape[1]
    ones = torch.zeros(count, weights.shape[1] if dense else chosen.shape[1], dtype=dtype or weights.dtype)
    ones[:, expert if dense else 0] = 1
    return {call.rows: x, call.index: chosen.clone(), call.weights: ones}


def _chosen(case: _Case, tokens: int, pool: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random experts of `pool` for every token, each at most once; where there are too few, others fill up if they must."""
    given = torch.tensor(pool)
    others = torch.tensor([e for e in range(case.experts.own) if e not in pool], dtype=torch.int64)
    choices = min(case.choices, len(pool)) if case.alone else case.choices

    def row() -> Tensor:
        mixed = [some[torch.randperm(len(some), generator=generator)] for some in (given, others)]
        return torch.cat(mixed)[:choices]

    return torch.stack([row() for _ in range(tokens)])


def _prove(case: _Case, exact: LiftedForward, tokens: int, pool: Sequence[int], seed: int, sizes: Mapping[int, int]) -> None:
    """Raise NotLifted unless the lifted forward gives the module's values and gradients, on `tokens` routed to the experts in `pool`."""
    generator, call = torch.Generator().manual_seed(seed), case.call
    dropped: Counter[nn.Module] = Counter()

    def noted(module: nn.Module, p: float, x: Tensor) -> Tensor:
        dropped[module] += x.numel() // x.shape[-1]
        return x

    double = stand_in(case.module, generator, dtype=torch.double, without=("forward",), sizes=sizes, dropping=noted)
    rows, index = call.leaves[call.rows], call.leaves[call.index]
    x = filled(torch.empty(tokens, sizes.get(rows.shape[-1], rows.shape[-1])), generator, torch.double).requires_grad_()
    wanted = [x, *(p for p in double.parameters() if p.requires_grad and p.numel() <= LARGE)]
    if call.weights is None:
        counts = torch.bincount(torch.randint(len(pool), (tokens,), generator=generator), minlength=case.experts.own)
        changed = {call.rows: x, call.index: counts.tolist() if isinstance(index, ShapeNumbers) else counts.to(index.dtype)}
        ours = ExpertsCall(
            call.spec, tuple({**dict(enumerate(call.leaves)), call.rows: x, call.index: counts}.values()), call.rows, call.index, None
        )
    else:
        chosen = _chosen(case, tokens, pool, generator)
        weights = torch.rand(chosen.shape, generator=generator, dtype=torch.double) ** 8  # some close to zero
        if call.leaves[call.weights].shape[1] != index.shape[1]:
            weights = torch.zeros(tokens, call.leaves[call.weights].shape[1], dtype=torch.double).scatter(1, chosen, weights)
        weights.requires_grad_()
        wanted.append(weights)
        changed = {call.rows: x, call.index: chosen.to(index.dtype), call.weights: weights}
        leaves = tuple({**dict(enumerate(call.leaves)), **changed}.values())
        ours = ExpertsCall(call.spec, leaves, call.rows, call.index, call.weights)
    before = {name: b.clone() for name, b in double.named_buffers()}
    theirs = _call(double, call, changed)
    changed_buffers = any(not torch.equal(b, before[name]) for name, b in double.named_buffers())
    found = run(double, exact, ours)
    tolerance = 1e-4 if exact.body.narrows else 1e-9
    if changed_buffers:
        raise NotLifted("it changes its buffers")
    of_rows = tokens if call.weights is None else ours.leaves[call.index].numel()
    if dropped and (exact.beyond is not None or any(n != of_rows for n in dropped.values())):
        raise NotLifted("it drops elements at random, of others than the rows that its experts are given")
    if not isinstance(theirs, Tensor) or not close([found], [theirs], tolerance):
        raise NotLifted("lifted from one expert, it gave other values than its forward on random routings")
    if not close(derivatives([found], wanted), derivatives([theirs], wanted), tolerance):
        raise NotLifted("lifted from one expert, it gave other gradients than its forward on random routings")
