"""Experts kept as a list of modules, and a loop over them in their owner's forward: the loop is replaced, everything else runs as written.

    for i, expert in enumerate(self.experts):              x, offsets, perm = dispatch(hidden, index, E)
        token, slot = where(index == i)             ->     out += combine(body(x, offsets, stacked parameters), perm, weights)
        out[token] += weights[token, slot, None] * expert(hidden[token])

Nothing is matched against known ways to write the loop. A double of the owner runs on a few random tokens with simple functions in place
of its experts; the statements that called them are located in its source; and among the local variables at that point those are looked
for that would make the formula on the right give the values the loop left behind. What is found is proven on other random inputs, all
values and gradients of the owner's forward, before it is used. Experts' parameters keep their names: the graph stacks them.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from meshpar._torch import pytree
from meshpar.capture import expert_body
from meshpar.capture.expert_body import Body, NotLifted
from meshpar.capture.stand_in import LARGE, alike, aside, close, derivatives, filled, stand_in
from meshpar.ops.experts import combine, dispatch, row_expert

Path = tuple[Any, ...]


def experts_in(owner: nn.Module) -> str | None:
    """The path from `owner` to its list of experts ("" for itself), if one of its children may be one: equal members, each small."""
    own_forward = type(owner).forward is not nn.Module.forward
    if not own_forward:
        return None
    found = [
        name
        for name, child in [("", owner), *owner.named_children()]
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and _may_be_experts([*child.children()])
    ]
    return found[0] if len(found) == 1 else None


def _may_be_experts(members: Sequence[nn.Module]) -> bool:
    return len(members) > 1 and 0 < len([*members[0].parameters()]) <= _TENSORS and len({type(member) for member in members}) == 1


_TENSORS = 16
"""Modules with more parameters than this are layers, not experts: trying them would only take time."""


@dataclass(frozen=True, slots=True)
class Source:
    """A local variable, or an item of one, seen as a matrix with a row per token."""

    path: Path
    transposed: bool = False

    def read(self, local: Mapping[str, Any], tokens: int | None = None) -> Tensor:
        value: Any = local[self.path[0]]
        for key in self.path[1:]:
            value = value[key]
        if tokens is None:
            return value.reshape(-1, value.shape[-1])
        return value.reshape(-1, tokens).t() if self.transposed else value.reshape(tokens, -1)


@dataclass(frozen=True, slots=True)
class Form:
    """What the loop computes: sum over j of weights[:, j] * expert[index[:, j]](hidden)."""

    hidden: Source
    index: Source
    weights: Source | None


@dataclass(frozen=True, slots=True)
class Result:
    """A variable the loop leaves behind."""

    name: str
    added: bool
    """Whether the sum comes on top of what the variable held before."""
    like: Path | None
    """A variable whose shape, but for the last dim, the result has; None for one row per token."""
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Loop:
    """Where the loop is: a function of the owner, a list of statements in it, and which of them."""

    function: str
    lines: tuple[int, ...]
    extension: int


@dataclass(frozen=True)
class Lifted:
    """Everything there is to know about the loop of an owner."""

    loop: Loop
    form: Form
    results: tuple[Result, ...]
    body: Body


@dataclass
class Lists:
    """What was learnt about lists of experts during one capture."""

    learnt: list[tuple[nn.Module, Any, Lifted | NotLifted]] = field(default_factory=list)

    def lifted(self, owner: nn.Module, container: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lifted | NotLifted:
        """The loop of `owner`, lifted and proven; or why it is not."""
        signature = _signature(args, kwargs)
        for other, called, known in self.learnt:
            if called == signature and (other is owner or alike(other, owner)):
                return known
        try:
            found: Lifted | NotLifted = aside(lambda: _learn(owner, container, args, kwargs))
        except NotLifted as error:
            found = error
        except Exception as error:  # whatever it is, the owner does not run on other inputs
            first = next(iter(str(error).splitlines()), "")[:160]
            found = NotLifted(f"it does not run on a few random tokens by itself ({type(error).__name__}: {first})")
        self.learnt.append((owner, signature, found))
        return found


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, [(leaf.dtype, leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]


def run(owner: nn.Module, container: str, lifted: Lifted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The owner's forward, with the lifted form in place of its loop."""
    members = [*owner.get_submodule(container).children()]

    def body(x: Tensor, offsets: Tensor) -> Tensor:
        names = [*dict(members[0].named_parameters()), *dict(members[0].named_buffers())]
        stacks = {name: torch.stack([_tensor(member, name) for member in members]) for name in names}
        return lifted.body(x, offsets, stacks)

    replaced = _rebuilt(owner, lifted.loop, _Replaced(lifted.form, lifted.results, len(members), body))
    return _calling(owner, lifted.loop.function, replaced, args, kwargs)


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def _calling(owner: nn.Module, function: str, replaced: Any, args: Any, kwargs: Any) -> Any:
    """Call the owner's own forward while one of its functions is another."""
    bound = types.MethodType(replaced, owner)
    before = owner.__dict__.get(function, _ABSENT)
    owner.__dict__[function] = bound
    try:
        return bound(*args, **kwargs) if function == "forward" else type(owner).forward(owner, *args, **kwargs)
    finally:
        if before is _ABSENT:
            owner.__dict__.pop(function, None)
        else:
            owner.__dict__[function] = before


_ABSENT = object()


# ---- learning: a double of the owner, with simple functions for experts -------------------------------------------------------------


@dataclass
class _Calls:
    """What the simple experts saw."""

    owner: Any = None
    chains: list[tuple[tuple[Any, int], ...]] = field(default_factory=list)
    """For every call, the functions of the owner that were running, outermost first, and the line each was at."""
    given: set[tuple[int, int]] = field(default_factory=set)
    made: list[Tensor] = field(default_factory=list)


class _Simple(nn.Module):
    """An expert that is a nonlinear function of each row with random parameters of its own."""

    def __init__(self, width: int, generator: torch.Generator, calls: _Calls) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width, generator=generator, dtype=torch.double))
        self.shift = nn.Parameter(torch.randn(width, generator=generator, dtype=torch.double))
        self.calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise NotLifted("its members are called with more than one tensor", like_experts=False)
        x = args[0]
        if len(self.calls.made) == 1 and x.requires_grad and _depends(x, self.calls.made[0]):
            raise NotLifted("its members run one after another", like_experts=False)
        self._note(x)
        result = _simple(x, self.scale, self.shift)
        self.calls.made.append(result)
        return result

    def _note(self, x: Tensor) -> None:
        chain: list[tuple[Any, int]] = []
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            own = code.co_argcount > 0 and not code.co_name.startswith("<") and frame.f_locals.get(code.co_varnames[0]) is self.calls.owner
            if own and code is _code(getattr(type(self.calls.owner), code.co_name, None)) and not _inherited(code):
                chain.append((code, frame.f_lineno))
            frame = frame.f_back  # type: ignore[assignment]
        self.calls.chains.append(tuple(reversed(chain)))
        self.calls.given.add((x.dim(), x.shape[-1]))


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _inherited(code: Any) -> bool:
    return code is _code(getattr(nn.Module, code.co_name, None))


def _depends(x: Tensor, source: Tensor) -> bool:
    return source.requires_grad and torch.autograd.grad(x.sum(), source, retain_graph=True, allow_unused=True)[0] is not None


def _simple(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wave = torch.sin(x)
    return (wave if wave.shape[-1] == scale.shape[-1] else wave.mean(-1, keepdim=True)) * scale + shift


@dataclass(frozen=True)
class _Double:
    """A double of the owner whose experts are simple."""

    owner: nn.Module
    experts: tuple[_Simple, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: _Calls

    def run(self, function: str | None = None, replaced: Any = None) -> Any:
        torch.manual_seed(0)
        self.calls.made.clear()
        if function is None:
            return self.owner(*self.args, **self.kwargs)
        return _calling(self.owner, function, replaced, self.args, self.kwargs)

    def body(self, x: Tensor, offsets: Tensor) -> Tensor:
        expert = row_expert(x, offsets)
        scale, shift = (torch.stack([getattr(e, n) for e in self.experts])[expert] for n in ("scale", "shift"))
        return _simple(x, scale, shift)

    def of_all(self, hidden: Tensor) -> Tensor:
        return torch.stack([_simple(hidden, e.scale, e.shift) for e in self.experts])

    def wanted(self) -> list[Tensor]:
        inputs = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return inputs + [p for p in self.owner.parameters() if p.requires_grad and p.numel() <= LARGE]

    def left_behind(self) -> list[Tensor]:
        """Tensors that a forward keeps in its module: buffers and plain attributes."""
        found = []
        for module in self.owner.modules():
            found += [value for value in module.__dict__.values() if isinstance(value, Tensor)]
            found += [value for value in module._buffers.values() if value is not None]
        return found


def _double(owner: nn.Module, container: str, width: int, trial: Trial, seed: int, args: Any, kwargs: Any, dtype: Any) -> _Double:
    generator = torch.Generator().manual_seed(seed)
    calls = _Calls()
    members = [*owner.get_submodule(container).children()]
    experts = tuple(_Simple(width, generator, calls) for _ in members)
    if dtype is None:
        kind = next((p.dtype for p in members[0].parameters() if p.is_floating_point()), torch.float32)
        experts = tuple(e.to(kind) for e in experts)
    instead = {id(member): simple for member, simple in zip(members, experts, strict=True)}
    double = stand_in(owner, generator, dtype=dtype, instead=instead, without=("forward",))
    calls.owner = double
    small_args, small_kwargs = _small(args, kwargs, trial, len(members), generator, dtype)
    return _Double(double, experts, small_args, small_kwargs, calls)


def _small(
    args: Any, kwargs: Any, trial: Trial, experts: int, generator: torch.Generator, dtype: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the same form with few tokens: equal sizes stay equal, the last dim of a floating tensor stays."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise NotLifted("it is called without a tensor", like_experts=False)
    rows = [t for t in tensors if t.is_floating_point() and t.dim() > 1]
    lead = [int(n) for t in rows or tensors for n in (t.shape[:-1] if rows else t.shape) if n > 1]
    smaller = {n: trial.sizes[i % len(trial.sizes)] for i, n in enumerate(dict.fromkeys(lead))}

    def shrink(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kept = leaf.dim() - 1 if rows and leaf.dim() > 1 else leaf.dim()
        shape = tuple(smaller.get(int(n), int(n)) if d < kept else int(n) for d, n in enumerate(leaf.shape))
        if not leaf.is_floating_point():
            return _whole(shape, leaf.dtype, experts, trial, generator)
        made = filled(torch.empty(shape, dtype=leaf.dtype, device="meta"), generator, dtype)
        if len(shape) > 1:
            made = made * (trial.scale * shape[-1] ** 0.5)
            made = made * trial.spread + made.reshape(-1, shape[-1])[:1] * (1 - trial.spread)
        return made.detach().requires_grad_()

    return pytree.tree_unflatten([shrink(leaf) for leaf in leaves], spec)


def _whole(shape: tuple[int, ...], dtype: torch.dtype, experts: int, trial: Trial, generator: torch.Generator) -> Tensor:
    """Random numbers that may be an index of experts: those of a row differ, where there are enough."""
    if dtype == torch.bool or not shape or shape[-1] > experts:
        return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randint(experts, shape, generator=generator).to(dtype)
    order = torch.rand(*shape[:-1], experts, generator=generator).argsort(-1)[..., : shape[-1]].to(dtype)
    return order if trial.spread == 1.0 else order.reshape(-1, shape[-1])[:1].expand(shape).clone()


@dataclass(frozen=True, slots=True)
class Trial:
    """Small random inputs: their sizes, their scale, and how far tokens differ from each other."""

    sizes: tuple[int, ...]
    scale: float = 1.0
    spread: float = 1.0


_TRIALS = (Trial((2, 3)), Trial((3, 2)), Trial((5, 1)))
_PROOFS = (
    Trial((2, 3)),
    Trial((1, 1)),
    Trial((3, 5), scale=20.0),  # weights close to zero: a loop may leave them out
    Trial((4, 12), spread=0.01),  # all tokens choose the same experts: a loop may limit how many
)


def _learn(owner: nn.Module, container: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lifted:
    members = [*owner.get_submodule(container).children()]
    if not all(alike(members[0], member) for member in members[1:]):
        raise NotLifted("its members are not alike", like_experts=False)
    if any(member._forward_hooks or member._forward_pre_hooks for member in members):
        raise NotLifted("its members have forward hooks")
    width, given = _widths(owner, container, args, kwargs, members[0])
    runs = [_double(owner, container, width, trial, seed, args, kwargs, torch.double) for seed, trial in enumerate(_TRIALS)]
    for double in runs:
        double.run()
    dims = sorted(set().union(*(double.calls.given for double in runs)))
    body = _body(members[0], given, dims)
    unfit = NotLifted("what its loop computes is not a weighted sum over the experts that an index among its variables chooses")
    for loop in _loops([chain for double in runs for chain in double.calls.chains]):
        try:
            for form, results in _forms(owner, container, loop, runs):
                if _proven(owner, container, width, loop, form, results, args, kwargs):
                    return Lifted(loop, form, _typed(owner, container, width, loop, results, args, kwargs), body)
        except NotLifted as error:
            unfit = error
    raise unfit


def _loops(chains: Sequence[tuple[tuple[Any, int], ...]]) -> Iterator[Loop]:
    """Where the loop may be: in the outermost function of the owner first."""
    if not chains:
        raise NotLifted("its members are not called on these inputs", like_experts=False)
    for depth in range(min(map(len, chains))):
        codes = {chain[depth][0] for chain in chains}
        lines = tuple(sorted({chain[depth][1] for chain in chains}))
        if len(codes) == 1:
            yield from (Loop(codes.copy().pop().co_name, lines, extension) for extension in range(_EXTENSIONS))


_EXTENSIONS = 4
"""How many statements after the loop may belong to it."""


def _widths(owner: nn.Module, container: str, args: Any, kwargs: Any, member: nn.Module) -> tuple[int, int]:
    """The widths of an expert's result and of its input."""

    class Probe(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() == 0:
                raise NotLifted("its members are called with more than one tensor", like_experts=False)
            raise _Seen(args[0].shape[-1])

    generator = torch.Generator().manual_seed(0)
    members = [*owner.get_submodule(container).children()]
    double = stand_in(owner, generator, dtype=torch.double, instead={id(m): Probe() for m in members}, without=("forward",))
    small_args, small_kwargs = _small(args, kwargs, _TRIALS[0], len(members), generator, torch.double)
    try:
        double(*small_args, **small_kwargs)
    except _Seen as seen:
        given = seen.width
    else:
        raise NotLifted("its members are not called on these inputs", like_experts=False)
    expert = stand_in(member, generator, dtype=torch.double)
    result = expert(torch.randn(1, given, dtype=torch.double, generator=generator))
    if not isinstance(result, Tensor) or result.dim() != 2 or result.shape[0] != 1:
        raise NotLifted("its members do not return one row per row")
    return result.shape[1], given


class _Seen(Exception):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def _body(member: nn.Module, width: int, dims: Sequence[tuple[int, int]]) -> Body:
    """The forward of one expert, lifted; proven against it on rows in the shapes that the loop gives it."""

    def recorded(dtype: torch.dtype | None) -> Body:
        double = stand_in(member, torch.Generator().manual_seed(0), dtype=dtype)
        kind = dtype or next((p.dtype for p in member.parameters() if p.is_floating_point()), torch.float32)
        each = {**dict(double.named_parameters()), **dict(double.named_buffers())}
        return expert_body.record(lambda x: double(x), width, kind, each=each)

    exact = recorded(torch.double)
    generator = torch.Generator().manual_seed(1)
    tolerance = 1e-4 if exact.narrows else 1e-9
    large = any(p.numel() > LARGE for p in member.parameters())
    doubles = [stand_in(member, generator, dtype=torch.double) for _ in range(1 if large else 3)]
    for rank, given in dims:
        if given != width:
            raise NotLifted("its members get rows of several widths")
        rows = torch.randn(*(2 for _ in range(rank - 1)), width, generator=generator, dtype=torch.double).requires_grad_()
        theirs = [double(rows) for double in doubles]
        flat = rows.reshape(-1, width)
        tensors = [{**dict(d.named_parameters()), **dict(d.named_buffers())} for d in doubles]
        for pick in ((0,),) if large else ((0, 1, 2),):
            stacks = {name: _stacked([tensors[i][name] for i in pick]) for name in tensors[0]}
            offsets = torch.arange(1, len(pick) + 1, dtype=torch.int32) * flat.shape[0]
            ours = exact(flat.repeat(len(pick), 1), offsets, stacks)
            expected = torch.cat([theirs[i].reshape(-1, ours.shape[1]) for i in pick])
            wanted = [rows, *(p for i in pick for p in doubles[i].parameters() if p.requires_grad and p.numel() <= LARGE)]
            if not close([ours], [expected], tolerance):
                raise NotLifted("one of its members, lifted, gave other values than its forward")
            if not close(derivatives([ours], wanted), derivatives([expected], wanted), tolerance):
                raise NotLifted("one of its members, lifted, gave other gradients than its forward")
    return recorded(None)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]) if len(tensors) > 1 else tensors[0].unsqueeze(0)


# ---- finding the form ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """Takes down the local variables before and after the loop."""

    before: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    times: int = 0

    def enter(self, local: Mapping[str, Any]) -> None:
        self.times += 1
        self.objects = dict(local)
        self.before = {name: _frozen(value) for name, value in local.items()}

    def leave(self, local: Mapping[str, Any]) -> None:
        self.after = {name: _frozen(value) for name, value in local.items()}
        self.same = {name for name, value in local.items() if self.objects.get(name, _ABSENT) is value}


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list) and len(value) <= 8:
        return [_frozen(item) for item in value]
    return value


def _forms(owner: nn.Module, container: str, loop: Loop, runs: Sequence[_Double]) -> Iterator[tuple[Form, tuple[Result, ...]]]:
    """Every form, and what it leaves behind, that fits the values of all trial runs."""
    probes = []
    for double in runs:
        probe = _Probe()
        double.run(loop.function, _rebuilt(double.owner, loop, probe))
        if probe.times != 1 or not probe.after:
            raise NotLifted("its loop runs several times in one forward")
        probes.append(probe)
    names = _left(owner, loop, probes)
    if not names:
        return
    read = _read_in(owner, loop)
    sources = sorted(_sources(probes[0].before), key=lambda path: path[0] not in read)
    for hidden in sources:
        value = _at(probes[0].before, hidden)
        if not _is_rows(value, runs[0]):
            continue
        for form in _choices(hidden, sources, probes[0].before, runs[0]):
            results = tuple(_result(name, form, probes, runs) for name in names)
            if None not in results:
                yield form, results  # type: ignore[misc]


def _is_rows(value: Any, double: _Double) -> bool:
    widths = {width for _, width in double.calls.given}
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[-1] in widths


def _sources(local: Mapping[str, Any]) -> list[Path]:
    found: list[Path] = []
    for name, value in local.items():
        if isinstance(value, Tensor):
            found.append((name,))
        elif isinstance(value, list | tuple):
            found += [(name, i) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return found


def _at(local: Mapping[str, Any], path: Path) -> Any:
    value = local[path[0]]
    for key in path[1:]:
        value = value[key]
    return value


def _choices(hidden: Path, sources: Sequence[Path], local: Mapping[str, Any], double: _Double) -> Iterator[Form]:
    tokens = Source(hidden).read(local).shape[0]
    whole = [p for p in sources if _chooses(_at(local, p), tokens, len(double.experts))]
    floating = [p for p in sources if _weighs(_at(local, p), tokens)]
    for index, turned in product(whole, (False, True)):
        chosen = Source(index, turned).read(local, tokens)
        yield Form(Source(hidden), Source(index, turned), None)
        for weights in floating:
            for other in (False, True):
                w = Source(weights, other).read(local, tokens)
                if w.shape == chosen.shape or w.shape == (tokens, len(double.experts)):
                    yield Form(Source(hidden), Source(index, turned), Source(weights, other))


def _chooses(value: Tensor, tokens: int, experts: int) -> bool:
    whole = not value.is_floating_point() and value.dtype != torch.bool and not value.is_complex()
    return (
        whole and 0 < value.numel() <= tokens * experts and value.numel() % tokens == 0 and bool(((value >= 0) & (value < experts)).all())
    )


def _weighs(value: Tensor, tokens: int) -> bool:
    return value.is_floating_point() and value.numel() > 0 and value.numel() % tokens == 0


def _left(owner: nn.Module, loop: Loop, probes: Sequence[_Probe]) -> list[str] | None:
    """The variables that the loop changed and later statements read; None where they are not all tensors."""
    read_later = _read_after(owner, loop)
    changed: list[str] = []
    for name in probes[0].after:
        if name in read_later and any(_changed(name, probe) for probe in probes):
            changed.append(name)
    if not all(isinstance(probe.after.get(name), Tensor) and probe.after[name].is_floating_point() for name in changed for probe in probes):
        return None
    return changed


def _changed(name: str, probe: _Probe) -> bool:
    if name not in probe.before or name not in probe.after:
        return True
    before, after = probe.before[name], probe.after[name]
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return name not in probe.same or not torch.equal(before, after)
    return name not in probe.same or (isinstance(before, list) and not _equal(before, after))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


def _result(name: str, form: Form, probes: Sequence[_Probe], runs: Sequence[_Double]) -> Result | None:
    """How the variable follows from the form, if it does in every run."""
    ways: list[bool] = [False, True]
    likes: list[Path | None] = [(name,), form.hidden.path, *[p for p in _sources(probes[0].before)], None]
    for probe, double in zip(probes, runs, strict=True):
        total = _weighted(form, probe.before, double)
        if total is None:
            return None
        after, before = probe.after[name], probe.before.get(name)
        if after.numel() != total.numel() or after.shape[-1] != total.shape[-1]:
            return None
        flat = after.reshape(total.shape)
        added = before.reshape(total.shape) if isinstance(before, Tensor) and before.shape == after.shape else None
        fits = {False: close([total], [flat], 1e-9), True: added is not None and close([total + added], [flat], 1e-9)}
        ways = [way for way in ways if fits[way]]
        likes = [like for like in likes if _has_shape(like, probe.before, after)]
        if not ways or not likes:
            return None
    return Result(name, ways[0], likes[0])


def _has_shape(like: Path | None, local: Mapping[str, Any], value: Tensor) -> bool:
    if like is None:
        return value.dim() == 2
    try:
        other = _at(local, like)
    except (KeyError, IndexError, TypeError):
        return False
    return isinstance(other, Tensor) and other.dim() == value.dim() and other.shape[:-1] == value.shape[:-1]


def _weighted(form: Form, local: Mapping[str, Any], double: _Double) -> Tensor | None:
    try:
        hidden = form.hidden.read(local)
        index = form.index.read(local, hidden.shape[0])
        weights = None if form.weights is None else form.weights.read(local, hidden.shape[0])
        if index.shape[0] != hidden.shape[0] or not _chooses(index, hidden.shape[0], len(double.experts)):
            return None
        if weights is not None and weights.shape != index.shape:
            weights = weights.gather(1, index)
        with torch.no_grad():
            rows = double.of_all(hidden)[index, torch.arange(hidden.shape[0])[:, None]]
            return rows.sum(1) if weights is None else (rows * weights[..., None]).sum(1)
    except (RuntimeError, KeyError, IndexError, TypeError):
        return None


def _proven(owner: Any, container: str, width: int, loop: Loop, form: Form, results: tuple[Result, ...], args: Any, kwargs: Any) -> bool:
    """Whether the owner's forward with the form in place of the loop gives the same values and gradients."""
    for seed, trial in enumerate(_PROOFS, 10):
        found = []
        for replaced in (False, True):
            double = _double(owner, container, width, trial, seed, args, kwargs, torch.double)
            function = _rebuilt(double.owner, loop, _Replaced(form, results, len(double.experts), double.body)) if replaced else None
            outputs = double.run(loop.function if replaced else None, function)
            tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
            if not tensors:
                raise NotLifted("it returns no tensor")
            values = [*tensors, *double.left_behind()]
            found.append(([v.detach() for v in values], derivatives(values, double.wanted())))
        (theirs, their_slopes), (ours, our_slopes) = found
        if len(ours) != len(theirs) or not close(ours, theirs, 1e-6) or not close(our_slopes, their_slopes, 1e-6):
            return False
    return True


def _typed(owner: Any, container: str, width: int, loop: Loop, results: tuple[Result, ...], args: Any, kwargs: Any) -> tuple[Result, ...]:
    """The results with the types that the loop leaves them in, when the owner runs in its own types."""
    try:
        double = _double(owner, container, width, _TRIALS[0], 0, args, kwargs, None)
        probe = _Probe()
        double.run(loop.function, _rebuilt(double.owner, loop, probe))
        return tuple(replace(result, dtype=probe.after[result.name].dtype) for result in results)
    except Exception:  # a type that the CPU lacks an operator for: the result keeps the type it is computed in
        return results


# ---- the owner's function, with the loop watched or replaced ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Replaced:
    """Computes the form on the local variables at the loop."""

    form: Form
    results: tuple[Result, ...]
    experts: int
    body: Callable[[Tensor, Tensor], Tensor]

    def compute(self, local: Mapping[str, Any]) -> tuple[Tensor, ...]:
        hidden = self.form.hidden.read(local)
        index = self.form.index.read(local, hidden.shape[0])
        x, offsets, perm = dispatch(hidden, index, self.experts)
        y = self.body(x, offsets)
        if self.form.weights is None:
            weights = y.new_ones(index.shape)
        else:
            weights = self.form.weights.read(local, hidden.shape[0])
            weights = weights if weights.shape == index.shape else weights.gather(1, index)
        total = combine(y, perm, weights)
        return tuple(self._result(result, total, local) for result in self.results)

    def _result(self, result: Result, total: Tensor, local: Mapping[str, Any]) -> Tensor:
        if result.like is not None:
            total = total.reshape(*_at(local, result.like).shape[:-1], total.shape[-1])
        if result.added:
            total = _at(local, (result.name,)) + total
        return total if result.dtype in (None, torch.double) else total.to(result.dtype)


@dataclass(frozen=True)
class _Found:
    """The statements of a loop in the source of its function."""

    body: list[ast.stmt]
    first: int
    last: int


def _function(owner: nn.Module, name: str) -> Any:
    function = getattr(type(owner), name, None)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise NotLifted(f"its {name} is decorated")
    return function


def _parsed(function: Any) -> tuple[ast.Module, ast.FunctionDef]:
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise NotLifted("its source is not to be had") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise NotLifted(f"its {function.__name__} is decorated")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    return tree, definition


def _located(definition: ast.FunctionDef, lines: Sequence[int]) -> list[ast.stmt]:
    """The innermost list of statements outside any loop that holds all `lines`."""
    body = definition.body
    while True:
        holding = [s for s in body if any(s.lineno <= line <= (s.end_lineno or s.lineno) for line in lines)]
        inner = _blocks(holding[0]) if len(holding) == 1 else []
        deeper = [b for b in inner if all(any(s.lineno <= line <= (s.end_lineno or s.lineno) for s in b) for line in lines)]
        if not deeper:
            return body
        body = deeper[0]


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    if isinstance(statement, ast.If):
        return [statement.body, statement.orelse]
    return [statement.body] if isinstance(statement, ast.With) else []


def _find(definition: ast.FunctionDef, loop: Loop) -> _Found:
    body = _located(definition, loop.lines)
    for position, statement in reversed([*enumerate(body)]):  # return value  ->  __returned = value; return __returned
        if isinstance(statement, ast.Return) and statement.value is not None:
            kept = ast.Assign([ast.Name(_RETURNED, ast.Store())], statement.value)
            body[position : position + 1] = [
                ast.copy_location(kept, statement),
                ast.copy_location(ast.Return(ast.Name(_RETURNED, ast.Load())), statement),
            ]
    ast.fix_missing_locations(definition)
    inside = [i for i, s in enumerate(body) if any(s.lineno <= line <= (s.end_lineno or s.lineno) for line in loop.lines)]
    inside = [i for i in inside if not isinstance(body[i], ast.Return)]
    last = inside[-1] + loop.extension
    if last >= len(body) or isinstance(body[last], ast.Return):
        raise NotLifted("what its loop computes is not a weighted sum over the experts that an index among its variables chooses")
    return _Found(body, inside[0], last)


_RETURNED, _SEAM, _VALUES = "_meshpar_returned", "_meshpar_seam", "_meshpar_values"


def _read_after(owner: nn.Module, loop: Loop) -> set[str]:
    _, definition = _parsed(_function(owner, loop.function))
    found = _find(definition, loop)
    end = found.body[found.last].end_lineno or 0
    later = {
        node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno > end
    }
    for statement in found.body[found.last + 1 :]:
        later |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return later


def _read_in(owner: nn.Module, loop: Loop) -> set[str]:
    """The variables that the statements of the loop read."""
    _, definition = _parsed(_function(owner, loop.function))
    found = _find(definition, loop)
    inside = [node for statement in found.body[found.first : found.last + 1] for node in ast.walk(statement)]
    return {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _rebuilt(owner: nn.Module, loop: Loop, seam: _Probe | _Replaced) -> Any:
    """The owner's function with its loop between `seam.enter` and `seam.leave`, or with `seam.compute` in its place."""
    function = _function(owner, loop.function)
    _, definition = _parsed(function)
    found = _find(definition, loop)
    where = found.body[found.first]
    statements = found.body[found.first : found.last + 1]
    if isinstance(seam, _Probe):
        made = [*ast.parse(f"{_SEAM}.enter(locals())").body, *statements, *ast.parse(f"{_SEAM}.leave(locals())").body]
    else:
        made = ast.parse(f"{_VALUES} = {_SEAM}.compute(locals())").body
        for position, result in enumerate(seam.results):
            made += ast.parse(f"{result.name} = {_VALUES}[{position}]").body
    for statement in made:
        if statement not in statements:
            for node in ast.walk(statement):
                ast.copy_location(node, where)
    found.body[found.first : found.last + 1] = made
    return _compiled(function, definition, seam)


def _compiled(function: Any, definition: ast.FunctionDef, seam: Any) -> Any:
    free = function.__code__.co_freevars
    definition = copy.deepcopy(definition)
    definition.args.defaults, definition.args.kw_defaults = [], [None for _ in definition.args.kwonlyargs]
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    factory = ast.parse(f"def _factory({', '.join([_SEAM, *free])}):\n    return {definition.name}").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, definition)
    names: dict[str, Any] = {}
    module = ast.fix_missing_locations(ast.Module([factory], []))
    exec(compile(module, inspect.getfile(function), "exec"), function.__globals__, names)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    made = names["_factory"](seam, *cells)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made
