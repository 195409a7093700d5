"""Experts kept as a list of modules, and a loop over them in their owner's forward: the loop is replaced, everything else runs as written.

    for i, expert in enumerate(self.experts):              x, offsets, perm = dispatch(hidden, index, E)
        token, slot = where(index == i)             ->     out += combine(body(x, offsets, stacked parameters), perm, weights)
        out[token] += weights[token, slot, None] * expert(hidden[token])

Nothing is matched against known ways to write the loop. A double of the owner runs on a few random tokens with simple functions in place
of its experts (`expert_doubles`); the statements that called them are located in its source (`expert_loops`); and among the local variables
at that point those are looked for that would make the formula on the right give the values the loop left behind (`expert_forms`). What is
found is proven on other random inputs, all values and gradients of the owner's forward, before it is used. Experts' parameters keep their
names: the graph stacks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import at_hints, pytree
from meshpar.capture.experts.body import Body, NotLifted, idle, refuse_changes
from meshpar.capture.experts.lists.doubles import Case, Double, Trial, members_of, type_of
from meshpar.capture.experts.lists.forms import Form, Probe, Result, Sum, forms
from meshpar.capture.experts.lists.loops import UNFIT, Loop, calling, loops, replaced
from meshpar.capture.experts.proofs import attempt, proven, reasoned
from meshpar.capture.experts.record import drop, record
from meshpar.capture.stand_in import LARGE, alike, close, derivatives, hooked, reduced, settings, stand_in


def experts_in(owner: nn.Module) -> tuple[str, ...]:
    """The paths from `owner` to lists that may be of experts ("" for itself): equal members, each small."""
    if type(owner).forward is nn.Module.forward:
        return ()
    children = [("", owner), *owner.named_children()]
    return tuple(
        name for name, child in children if isinstance(child, nn.ModuleList | nn.ModuleDict) and _may_be_experts(members_of(child))
    )


def _may_be_experts(members: Sequence[nn.Module]) -> bool:
    return len(members) > 1 and 0 < len([*members[0].parameters()]) <= _TENSORS and len({type(member) for member in members}) == 1


_TENSORS = 16
"""Modules with more parameters than this are layers, not experts: trying them would only take time."""


@dataclass(frozen=True)
class LiftedLoop:
    """Everything there is to know about the loop of an owner."""

    container: str
    loop: Loop
    form: Form
    results: tuple[Result, ...]
    body: Body
    left: tuple[str, ...] = ()
    """Other lists of the owner that could have been lifted."""


@dataclass
class Lists:
    """What was learnt about lists of experts during one capture."""

    learnt: list[tuple[nn.Module, Any, LiftedLoop | NotLifted]] = field(default_factory=list)

    def lifted(self, owner: nn.Module, containers: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LiftedLoop | NotLifted:
        """The loop of `owner` over one of its lists, lifted and proven; or why there is none."""
        signature = _signature(args, kwargs)
        for other, called, known in self.learnt:
            if called == signature and (other is owner or alike(other, owner)):
                return known
        found: list[LiftedLoop | NotLifted] = []
        for container in containers:
            case = Case(owner, container, *at_hints((args, kwargs)))
            found.append(attempt(lambda case=case: _learn(case), "it does not run on a few random tokens"))  # type: ignore[misc]
        lifted = [one for one in found if isinstance(one, LiftedLoop)]
        best: LiftedLoop | NotLifted
        if lifted:
            best = replace(lifted[0], left=tuple(one.container for one in lifted[1:]))
        else:
            best = next((one for one in found if isinstance(one, NotLifted) and one.like_experts), found[0])
        self.learnt.append((owner, signature, best))
        return best


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, [(leaf.dtype, leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]


def run(owner: nn.Module, lifted: LiftedLoop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The owner's forward, with the lifted form in place of its loop."""
    members = members_of(owner.get_submodule(lifted.container))

    def body(x: Tensor, offsets: Tensor) -> Tensor:
        tensors = [_tensors(member) for member in members]
        return lifted.body(x, offsets, {name: torch.stack([own[name] for own in tensors]) for name in lifted.body.operands})

    total = Sum(lifted.form, lifted.results, len(members), body)
    function = replaced(lifted.loop, [result.name for result in lifted.results], total)
    return calling(owner, lifted.loop, function, args, kwargs)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


# ---- learning -------------------------------------------------------------------------------------------------------------------------

_TRIALS = (Trial((2, 3)), Trial((4, 2)), Trial((5, 1)))
_PROOFS = (
    Trial((2, 3)),
    Trial((1, 1)),
    Trial((3, 5), scale=20.0),  # weights close to zero: a loop may leave them out
    Trial((3, 2), twins=True),  # two routers choose the same expert: a loop may count it once
)
_WIDE_PROOFS = (Trial((2, 1)), Trial((1, 1)))
"""At the owner's own sizes, after all the others at small ones: the memory of a proof grows with tokens x experts x width."""


def _crowd(case: Case, width: int) -> Trial:
    """All tokens choose the same experts, as many as there are if memory allows: a loop may limit how many an expert takes."""
    affordable = _ELEMENTS // (len(case.members) * case.small(width))
    return Trial((4, max(12, min(case.tokens, _TOKENS, affordable) // 4)), spread=0.01)


_ELEMENTS, _TOKENS = 1 << 21, 1 << 10


@dataclass(frozen=True)
class _Proven:
    """A form that is proven, and in which shapes the experts get their rows: (dims, width)."""

    loop: Loop
    form: Form
    results: tuple[Result, ...]
    given: tuple[tuple[int, int], ...]


def _learn(case: Case) -> LiftedLoop:
    _check_members(case)
    member, given = case.members[0], case.rows_given()
    recorded = reasoned(lambda: _recorded(member, given, None, {}), "one of its members does not run on a few random rows")
    width = recorded.width if isinstance(recorded, Body) else given

    def found_in(case: Case) -> _Proven:
        runs = []
        for seed, trial in enumerate(_TRIALS):  # one after another: most owners that are none fail the first, and a double has a size
            runs.append(case.double(width, trial, seed))
            runs[-1].run()
        if isinstance(recorded, NotLifted):
            raise recorded
        return _first_proven(case, width, runs)

    found: _Proven | None = None
    small = replace(case, sizes=reduced([*case.owner.parameters(), *case.owner.buffers()], given, kept=(len(case.members),)))
    if small.sizes:
        tried = reasoned(lambda: found_in(small), "it does not run at other sizes")
        if isinstance(tried, _Proven) and _proven(case, width, tried, _WIDE_PROOFS):
            found = tried
        elif isinstance(tried, NotLifted) and not tried.like_experts:
            raise tried
    found = found or found_in(case)
    for _, rows in found.given:
        if rows not in (given, small.small(given)):
            raise NotLifted("its members get rows of several widths")
    assert isinstance(recorded, Body)
    body = _body(member, given, recorded, sorted({dims for dims, _ in found.given}))
    return LiftedLoop(case.container, found.loop, found.form, _typed(case, width, found), body)


def _check_members(case: Case) -> None:
    members = case.members
    if not all(alike(members[0], member) for member in members[1:]):
        side_by_side = reasoned(lambda: case.double(case.rows_given(), _TRIALS[0], 0).run(), "it does not run with others")
        raise NotLifted("its members are not alike", like_experts=not isinstance(side_by_side, NotLifted))
    if any(hooked(module) for member in members for module in member.modules()):
        raise NotLifted("its members have hooks")
    if case.container and hooked(case.owner.get_submodule(case.container)):
        raise NotLifted("its list of experts has hooks", like_experts=False)


def _first_proven(case: Case, width: int, runs: Sequence[Double]) -> _Proven:
    """The first form that is proven, of all that fit the runs."""
    chains = [chain for double in runs for chain in double.calls.chains]
    given = tuple(sorted(set().union(*(double.calls.given for double in runs))))
    unfit = NotLifted(UNFIT)
    if not chains:
        raise NotLifted("its members are not called on these inputs", like_experts=False)
    for loop in loops(case.owner, chains):
        try:
            for form, results in forms(loop, runs):
                found = _Proven(loop, form, results, given)
                if _proven(case, width, found, (*_PROOFS, _crowd(case, width))):
                    return found
        except NotLifted as error:
            unfit = error
    raise unfit


def _proven(case: Case, width: int, found: _Proven, trials: Sequence[Trial]) -> bool:
    """Whether the owner's forward with the form in place of the loop gives the same values and gradients."""
    for seed, trial in enumerate(trials, 10):
        theirs, their_slopes = _outcome(case.double(width, trial, seed), None)
        ours, our_slopes = _outcome(case.double(width, trial, seed), found)
        if len(ours) != len(theirs) or not close(ours, theirs, 1e-6) or not close(our_slopes, their_slopes, 1e-6):
            return False
    return True


def _outcome(double: Double, found: _Proven | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the forward returns and leaves in its module, and the derivatives of that; `found`: in place of the loop."""
    if found is None:
        outputs = double.run()
    else:
        total = Sum(found.form, found.results, double.experts, double.body)
        outputs = double.run(found.loop, replaced(found.loop, [r.name for r in found.results], total))
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise NotLifted("it returns no tensor")
    values = [*tensors, *double.left_behind()]
    return [value.detach() for value in values], derivatives(values, double.wanted())


def _typed(case: Case, width: int, found: _Proven) -> tuple[Result, ...]:
    """The results with the types that the loop leaves them in, when the owner runs in its own types."""
    try:
        probe = Probe.of(case.double(width, _TRIALS[0], 0, None), found.loop)
    except NotImplementedError:  # the CPU lacks an operator for one of its types: results keep the type they are computed in
        return found.results
    return tuple(replace(result, dtype=probe.after[result.name].dtype) for result in found.results)


# ---- one member -----------------------------------------------------------------------------------------------------------------------


def _body(member: nn.Module, width: int, recorded: Body, dims: Sequence[int]) -> Body:
    """The forward of one expert, lifted; proven against it on rows with as many dims as the loop gives it."""

    def prove(sizes: Mapping[int, int]) -> None:
        exact = idle(_recorded(member, width, torch.double, sizes))
        for rank in dims:
            _prove(member, exact, rank, sizes.get(width, width), sizes)

    sizes = reduced([*member.parameters(), *member.buffers()], width)
    return proven(lambda sizes: _recorded(member, width, None, sizes) if sizes else recorded, prove, sizes)


def _recorded(member: nn.Module, width: int, dtype: torch.dtype | None, sizes: Mapping[int, int]) -> Body:
    double = stand_in(member, torch.Generator().manual_seed(0), dtype=dtype, sizes=sizes, without=("forward",), hollow=True, dropping=drop)
    each = {**dict(double.named_parameters()), **dict(double.named_buffers())}
    before = settings(double)
    body = record(lambda x: double(x), sizes.get(width, width), dtype or type_of(member), each=each)
    refuse_changes(before, settings(double), "one of its members sets")
    return body


def _prove(member: nn.Module, exact: Body, rank: int, width: int, sizes: Mapping[int, int]) -> None:
    """Raise NotLifted unless the lifted body gives the values and gradients of a few doubles of the member."""
    generator = torch.Generator().manual_seed(1)
    tolerance = 1e-4 if exact.narrows else 1e-9

    def double() -> nn.Module:
        return stand_in(member, generator, dtype=torch.double, sizes=sizes, without=("forward",))

    first = double()
    large = any(p.numel() > LARGE for p in first.parameters())
    doubles = [first] if large else [first, double(), double()]
    rows = torch.randn(*(2 for _ in range(rank - 1)), width, generator=generator, dtype=torch.double).requires_grad_()
    flat = rows.reshape(-1, width)
    tensors = [{**dict(d.named_parameters()), **dict(d.named_buffers())} for d in doubles]
    stacks = {name: t.unsqueeze(0) if large else torch.stack([own[name] for own in tensors]) for name, t in tensors[0].items()}
    offsets = torch.arange(1, len(doubles) + 1, dtype=torch.int32) * flat.shape[0]
    ours = exact(flat.repeat(len(doubles), 1), offsets, stacks)
    theirs = torch.cat([one(rows).reshape(-1, ours.shape[1]) for one in doubles])
    wanted = [rows, *(p for one in doubles for p in one.parameters() if p.requires_grad and p.numel() <= LARGE)]
    if not close([ours], [theirs], tolerance):
        raise NotLifted("one of its members, lifted, gave other values than its forward")
    if not close(derivatives([ours], wanted), derivatives([theirs], wanted), tolerance):
        raise NotLifted("one of its members, lifted, gave other gradients than its forward")
