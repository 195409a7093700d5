"""What a loop computes: among the local variables around it, those for which a weighted sum gives the values that the loop leaves behind.

    x, offsets, perm = dispatch(hidden, index, E)
    result = combine(body(x, offsets), perm, weights)           or result += ...

Candidates are all local tensors whose values could be the tokens, the chosen experts and the weights; what does not fit the values of one
of a few trial runs is dropped. A mask may stand in the place of the chosen experts: every step then checks that it marks no more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from meshpar.capture.experts.body import NotLifted
from meshpar.capture.experts.lists.doubles import Double, SeenCalls
from meshpar.capture.experts.lists.loops import Local, Loop, read_after, read_in, watched
from meshpar.capture.stand_in import close
from meshpar.ops.experts import combine, dispatch

Path = tuple[Any, ...]
"""A local variable, or an item of one."""


@dataclass(frozen=True, slots=True)
class Source:
    """A local variable, or an item of one, seen as a matrix with a row per token."""

    path: Path
    transposed: bool = False

    def read(self, local: Local, tokens: int) -> Tensor:
        value = _at(local, self.path)
        return value.reshape(-1, tokens).t() if self.transposed else value.reshape(tokens, -1)


@dataclass(frozen=True, slots=True)
class Form:
    """What the loop computes: sum over j of weights[:, j] * expert[index[:, j]](hidden)."""

    hidden: Path
    index: Source
    weights: Source | None
    most: int = 0
    """If not 0, `index` is a mask over the experts, for one or more choices of a token, that marks at most so many of them each time."""

    def rows(self, local: Local) -> Tensor:
        hidden: Tensor = _at(local, self.hidden)
        return hidden.reshape(-1, hidden.shape[-1])

    def routing(self, local: Local, tokens: int, experts: int) -> tuple[Tensor, Tensor | None]:
        """The chosen experts of every token, and their weights. Where a mask marks fewer, `experts` stands, with weight zero."""
        if self.most:
            return self._marked(local, tokens, experts)
        index = self.index.read(local, tokens)
        weights = None if self.weights is None else self.weights.read(local, tokens)
        if weights is not None and weights.shape != index.shape:
            weights = weights.gather(1, index.long())
        return index, weights

    def _marked(self, local: Local, tokens: int, experts: int) -> tuple[Tensor, Tensor]:
        marks = self.mask(local, tokens, experts)
        like = self.rows(local)
        found = marks.to(like.dtype).topk(self.most, -1)
        index, present = found.indices.flatten(1), found.values.flatten(1).detach()
        weights = None if self.weights is None else self.weights.read(local, tokens)
        if weights is None:
            weights = present
        elif weights.shape[1] == marks.shape[1]:
            weights = weights.unsqueeze(-1).expand(-1, -1, self.most).flatten(1) * present.to(weights.dtype)
        else:
            weights = weights.gather(1, index) * present.to(weights.dtype)
        return index.masked_fill(present == 0, experts), weights

    def mask(self, local: Local, tokens: int, experts: int) -> Tensor:
        """Which experts are marked, [T, slots, E]."""
        value = _at(local, self.index.path)
        value = value.reshape(experts, -1, tokens).permute(2, 1, 0) if self.index.transposed else value.reshape(tokens, -1, experts)
        return value != 0

    def fits(self, local: Local, experts: int) -> bool:
        """Whether the variables are there, in shapes that belong together."""
        hidden, index = _at(local, self.hidden), _at(local, self.index.path)
        if not isinstance(hidden, Tensor) or not isinstance(index, Tensor) or hidden.dim() < 2:
            return False
        tokens = hidden.shape[:-1].numel()
        if not (_marks if self.most else _chooses)(index, tokens, experts):
            return False
        if self.most and int(self.mask(local, tokens, experts).sum(-1).max()) > self.most:
            return False
        if self.weights is None:
            return True
        chosen: tuple[int, ...] = tuple(self.mask(local, tokens, experts).shape[:2]) if self.most else self.index.read(local, tokens).shape
        weights = _at(local, self.weights.path)
        return _weighs(weights, tokens) and self.weights.read(local, tokens).shape in (chosen, (tokens, experts))


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
class Sum:
    """Computes the form on the local variables at the loop."""

    form: Form
    results: tuple[Result, ...]
    experts: int
    body: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, local: Local) -> tuple[Tensor, ...]:
        hidden = self.form.rows(local)
        index, weights = self.form.routing(local, hidden.shape[0], self.experts)
        if self.form.most:
            self._check(local, hidden.shape[0])
        x, offsets, perm = dispatch(hidden, index, self.experts, self.form.most > 0)
        y = self.body(x, offsets)
        total = combine(y, perm, torch.ones_like(index, dtype=y.dtype) if weights is None else weights)
        return tuple(self._result(result, total, local) for result in self.results)

    def _check(self, local: Local, tokens: int) -> None:
        """The mask is one, and marks no more experts than in the trial runs."""
        most, value = self.form.most, _at(local, self.form.index.path)
        if value.dtype != torch.bool:
            whole = ((value == 0) | (value == 1)).all()
            torch.ops.meshpar.expect(whole, [1], " (whether a mask over the experts holds nothing but 0 and 1)")
        if most < self.experts:
            few = (self.form.mask(local, tokens, self.experts).sum(-1) <= most).all()
            torch.ops.meshpar.expect(few, [1], f" (whether a token has at most {most} of the experts that a mask marks)")

    def _result(self, result: Result, total: Tensor, local: Local) -> Tensor:
        if result.like is not None:
            total = total.reshape(*_at(local, result.like).shape[:-1], total.shape[-1])
        if result.added:
            total = local[result.name] + total
        return total if result.dtype in (None, torch.double) else total.to(result.dtype)


@dataclass
class Probe:
    """Takes down the local variables before and after the loop."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    """Names that are bound to another object after the loop."""
    times: int = 0
    calls: SeenCalls = field(default_factory=SeenCalls)
    _objects: dict[str, Any] = field(default_factory=dict)
    _drops: int = 0

    @staticmethod
    def of(double: Double, loop: Loop) -> Probe:
        """The variables in a run of `double`."""
        probe = Probe(calls=double.calls)
        double.run(loop, watched(loop, probe._enter, probe._leave))
        if probe.times != 1 or not probe.after:
            raise NotLifted("its loop runs several times in one forward")
        return probe

    def _enter(self, local: Local) -> None:
        self.times += 1
        self._drops = self.calls.drops
        self._objects = dict(local)
        self.before = {name: _frozen(value) for name, value in local.items()}

    def _leave(self, local: Local) -> None:
        if self.calls.drops != self._drops:
            raise NotLifted("its loop drops elements at random, beside calling its members")
        self.after = {name: _frozen(value) for name, value in local.items()}
        self.replaced = {name for name, value in local.items() if self._objects.get(name, _ABSENT) is not value}
        self._objects = {}

    def changed(self, name: str) -> bool:
        return name in self.replaced or name not in self.before or not _equal(self.before[name], self.after.get(name, _ABSENT))


_ABSENT = object()


def forms(loop: Loop, runs: Sequence[Double]) -> Iterator[tuple[Form, tuple[Result, ...]]]:
    """Every form, and what it leaves behind, that fits the values of all trial runs."""
    probes = [Probe.of(double, loop) for double in runs]
    names = _left(loop, probes)
    if not names:
        return
    read = read_in(loop)
    sources = sorted(_sources(probes[0].before), key=lambda path: path[0] not in read)
    for form in chain(_candidates(sources, probes[0].before, runs[0]), _by_mask(sources, probes, runs[0])):
        totals = _totals(form, probes, runs)
        results = [] if totals is None else [_result(name, form, probes, totals) for name in names]
        if results and None not in results:
            yield form, tuple(result for result in results if result is not None)


def _left(loop: Loop, probes: Sequence[Probe]) -> list[str]:
    """The variables that the loop changed and later statements read; none where they are not all tensors."""
    later = read_after(loop)
    changed = [name for name in probes[0].after if name in later and any(probe.changed(name) for probe in probes)]
    values = [probe.after.get(name) for name in changed for probe in probes]
    return changed if all(isinstance(value, Tensor) and value.is_floating_point() for value in values) else []


def _candidates(sources: Sequence[Path], local: Local, double: Double) -> Iterator[Form]:
    """The forms that local tensors could stand for, by their shapes and types."""
    for hidden, tokens, floating in _tokens(sources, local, double):
        whole = [p for p in sources if _chooses(_at(local, p), tokens, double.experts)]
        for index, turned in product(whole, (False, True)):
            yield Form(hidden, Source(index, turned), None)
            weighted = (Form(hidden, Source(index, turned), Source(w, other)) for w, other in product(floating, (False, True)))
            yield from (form for form in weighted if form.fits(local, double.experts))


def _by_mask(sources: Sequence[Path], probes: Sequence[Probe], double: Double) -> Iterator[Form]:
    """`_candidates` with a mask in place of an index."""
    local, experts = probes[0].before, double.experts
    for hidden, tokens, floating in _tokens(sources, local, double):
        for mask, turned in product([p for p in sources if _marks(_at(local, p), tokens, experts)], (False, True)):
            most = max(_most(Form(hidden, Source(mask, turned), None), probe.before, experts) for probe in probes)
            if most:
                plain = Form(hidden, Source(mask, turned), None, most)
                weighted = (Form(hidden, Source(mask, turned), Source(w, other), most) for w, other in product(floating, (False, True)))
                yield from (form for form in (plain, *weighted) if form.fits(local, experts))


def _tokens(sources: Sequence[Path], local: Local, double: Double) -> Iterator[tuple[Path, int, list[Path]]]:
    """What may hold a row per token as wide as the experts are given them, the number of tokens, and what may hold their weights."""
    widths = {width for _, width in double.calls.given}
    for hidden in sources:
        value = _at(local, hidden)
        if value.is_floating_point() and value.dim() >= 2 and value.shape[-1] in widths:
            tokens = value.shape[:-1].numel()
            yield hidden, tokens, [p for p in sources if _weighs(_at(local, p), tokens)]


def _most(form: Form, local: Local, experts: int) -> int:
    """How many experts a mask marks for a choice of a token, at most; 0 where there is none."""
    hidden, mask = _at(local, form.hidden), _at(local, form.index.path)
    if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not _marks(mask, hidden.shape[:-1].numel(), experts):
        return 0
    return int(form.mask(local, hidden.shape[:-1].numel(), experts).sum(-1).max())


def _totals(form: Form, probes: Sequence[Probe], runs: Sequence[Double]) -> list[Tensor] | None:
    """What the form computes in every run; None where it does not fit one."""
    totals = []
    for probe, double in zip(probes, runs, strict=True):
        if not form.fits(probe.before, double.experts):
            return None
        hidden = form.rows(probe.before)
        index, weights = form.routing(probe.before, hidden.shape[0], double.experts)
        with torch.no_grad():
            rows = double.chosen(hidden[:, None], index.clamp(max=double.experts - 1))
            totals.append(rows.sum(1) if weights is None else (rows * weights[..., None]).sum(1))
    return totals


def _result(name: str, form: Form, probes: Sequence[Probe], totals: Sequence[Tensor]) -> Result | None:
    """How the variable follows from what the form computes, if it does in every run."""
    ways: list[bool] = [False, True]
    likes: list[Path | None] = [(name,), form.hidden, *_sources(probes[0].before), None]
    for probe, total in zip(probes, totals, strict=True):
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


def _has_shape(like: Path | None, local: Local, value: Tensor) -> bool:
    if like is None:
        return value.dim() == 2
    other = _at(local, like)
    return isinstance(other, Tensor) and other.dim() == value.dim() and other.shape[:-1] == value.shape[:-1]


# ---- local variables ----------------------------------------------------------------------------------------------------------------


def _at(local: Local, path: Path) -> Any:
    """What is at `path`; None where nothing is."""
    value = local.get(path[0])
    for key in path[1:]:
        value = value[key] if isinstance(value, list | tuple) and key < len(value) else None
    return value


def _sources(local: Local) -> list[Path]:
    """The tensors among the variables and their items."""
    found: list[Path] = []
    for name, value in local.items():
        if isinstance(value, Tensor):
            found.append((name,))
        elif isinstance(value, list | tuple):
            found += [(name, i) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return found


def _chooses(value: Any, tokens: int, experts: int) -> bool:
    """Whether a tensor may hold numbers of experts, as many for every token."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return 0 < value.numel() <= tokens * experts and value.numel() % tokens == 0 and bool(((value >= 0) & (value < experts)).all())


def _marks(value: Any, tokens: int, experts: int) -> bool:
    """Whether a tensor may be a mask over the experts, one or more for every token."""
    if not isinstance(value, Tensor) or value.is_complex() or value.numel() == 0 or value.numel() % (tokens * experts):
        return False
    return value.numel() <= tokens * experts * experts and bool(((value == 0) | (value == 1)).all())


def _weighs(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0 and value.numel() % tokens == 0


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list) and len(value) <= 8:
        return [_frozen(item) for item in value]
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b
