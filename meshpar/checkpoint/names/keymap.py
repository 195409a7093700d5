"""Key maps: how the tensors of one naming become those of another, written in einops' manner, invertible, proved before any I/O.

One rule per line; the first that matches a tensor counts, and what no rule matches keeps its name.

    model.{rest*} -> {rest*}                                                         rename
    {p*}.experts.{e}.{n*} [...] -> {p*}.experts.{n*} [e ...]                         stack: a number in the name becomes a dim
    {p*}.q.weight [q h] + {p*}.k.weight [k h] + {p*}.v.weight [v h] -> {p*}.qkv.weight [(q|k|v) h]          concatenate
    {p*}.gate [e f h] + {p*}.up [e f h] -> {p*}.gate_up [e (f|f) h]                  one name twice: equal sizes
    {p*}.c_fc.weight [i o] -> {p*}.fc.weight [o i]                                   transpose
    {p*}.qkv.weight [(three n d) h] -> {p*}.qkv.weight [(n three d) h] with three=3, n=8      reorder fused factors
    embed.weight [v h] -> embed.weight [(v|_) h] with _=13                           pad with zeros; backwards: check and drop them
    {p*}.scale -> {p*}.scale : F16 => F32                                            cast; backwards only if exact
    head.weight == embed.weight                                                      tied: stored once, checked equal

`{x}` matches one component of a name, `{x*}` any number of them. Either side may be the one with several
tensors, so each rule reads both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from meshpar.checkpoint.format.boxes import Box, find_flaw, whole
from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.names.matching import bind, fill, grouped, regex
from meshpar.checkpoint.names.rules import Rule, Term, inverted, parse, show
from meshpar.checkpoint.names.spaces import Link, Place, Tensors, link_of, opposite
from meshpar.errors import near


@dataclass(frozen=True, slots=True)
class Mapped:
    """A key map applied to a checkpoint: the links, the tensors that result, ties found, and the rules with all sizes filled in.

    Links that move a tensor as it is are `kept` instead, since there may be very many.
    """

    links: tuple[Link, ...]
    tensors: Tensors
    aliases: Mapping[str, str]
    rules: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)  # tied tensors that come back, and the target they equal
    kept: Mapping[str, str] = field(default_factory=dict)  # tensors that only change their names, perhaps: the new one, the old one

    @property
    def sources(self) -> dict[str, str]:
        """Of every tensor that results: the first one it is made of."""
        return {p.tensor: link.sources[0].tensor for link in self.links for p in link.targets} | dict(self.kept)


Resolved = tuple["Rule", dict[str, str], dict[str, int]]  # a rule, the names it was used on, the sizes found


def apply(rules: Sequence[Rule], tensors: Tensors) -> Mapped:
    """Work out what becomes of every tensor, and prove that the way back leads to the same tensors.

    Raises ImpossibleError when a rule matches nothing, a group of tensors is incomplete, sizes are unknown or do not fit, two tensors
    would get one name, or anything would be lost.
    """
    forward = _expand(rules, tensors)
    _check_links(forward, tensors)
    ties = parse(f"{alias} == {name}" for alias, name in forward.copies.items())
    back = _expand((*ties, *inverted(parse(forward.rules))), forward.tensors)
    _check_links(back, forward.tensors)
    if dict(back.tensors) != dict(tensors):
        wrong = sorted(set(back.tensors.items()) ^ set(tensors.items()))[:4]
        raise ImpossibleError(f"The key map cannot be undone: going back does not give the same tensors: {wrong}.")
    if not _reversed([link for link in forward.links if link.targets[0].tensor not in forward.copies], back.links):
        raise ImpossibleError("The key map cannot be undone: the way back places tensors elsewhere.")
    kept = {link.targets[0].tensor: link.sources[0].tensor for link in forward.links if _is_same(link)}
    return replace(forward, links=tuple(link for link in forward.links if not _is_same(link)), kept=kept)


def identity(tensors: Tensors) -> Mapped:
    """Every tensor as it is."""
    return Mapped((), dict(tensors), {}, (), kept={name: name for name in tensors})


def _is_same(link: Link) -> bool:
    """Whether a link only gives a tensor another name, or none."""
    places = {place[1:] for place in (*link.sources, *link.targets)}
    single = len(link.sources) == len(link.targets) == 1 and places == {_corner(len(link.shape))}
    return single and link.dtype == link.target_dtype and not (link.rearrange or link.source_padding or link.target_padding)


def _same(name: str, dtype: str, shape: tuple[int, ...]) -> Link:
    place = (Place(name, *_corner(len(shape))),)
    return Link(shape, dtype, place, place, dtype)


@lru_cache
def _corner(ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (0,) * ndim, tuple(range(ndim))


def _expand(rules: Sequence[Rule], tensors: Tensors) -> Mapped:
    groups, left = grouped(rules, tensors)
    links = {first: _same(first, *tensors[first]) for first in left}
    ties: dict[str, str] = {}
    resolved: list[list[Resolved]] = [[] for _ in rules]
    for index, bound, members in groups:
        rule = rules[index]
        if rule.tie:
            ties[fill(rule.parts[0].pattern, bound)] = fill(rule.whole.pattern, bound)
            resolved[index].append((rule, bound, {}))
            continue
        link, sizes = link_of(rule, bound, members, tensors)
        links[link.sources[0].tensor] = link
        resolved[index].append((rule, bound, sizes))
    ordered = [links[name] for name in tensors if name in links]
    out = _target_tensors(ordered, rules)
    copies: dict[str, str] = {}
    for alias, name in _copies(rules, tensors):
        if alias in out:
            raise ImpossibleError(f"{alias} should be tied to {name}, but exists by itself.")
        copies[alias] = _target_of(name, ordered)
        out[alias] = out[copies[alias]]
        ordered.append(_copy(alias, name, ordered))
    final_ties = {alias: _target_of(name, ordered) for alias, name in ties.items()}
    return Mapped(tuple(ordered), out, final_ties, tuple(_record(rules, resolved, final_ties, out)), copies)


def _copies(rules: Sequence[Rule], tensors: Tensors) -> list[tuple[str, str]]:
    """The tied tensors that come back, each with the stored tensor it is a copy of: rules of ties read backwards."""
    copies = []
    for rule in rules:
        if not rule.tie or rule.merging:
            continue
        hits = [(name, hit) for name in tensors if (hit := regex(rule.whole.pattern, ()).fullmatch(name))]
        if not hits:
            raise ImpossibleError(f"The rule {rule.text!r} matches nothing.{near(rule.whole.pattern, tensors)}")
        copies += [(fill(rule.parts[0].pattern, hit.groupdict()), name) for name, hit in hits]
    return copies


def _copy(alias: str, name: str, links: Sequence[Link]) -> Link:
    """The link of the stored tensor `name`, leading to `alias` instead."""
    target = _target_of(name, links)
    link = next(link for link in links if link.targets[0].tensor == target)
    return link._replace(targets=(link.targets[0]._replace(tensor=alias),))


def _target_of(name: str, links: Sequence[Link]) -> str:
    for link in links:
        if any(p.tensor == name for p in link.sources):
            if len(link.sources) == 1 and len(link.targets) == 1:
                return link.targets[0].tensor
            break
    raise ImpossibleError(f"{name} has a tied twin, but does not stay one whole tensor.")


def _target_tensors(links: Sequence[Link], rules: Sequence[Rule]) -> dict[str, tuple[str, tuple[int, ...]]]:
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for link in links:
        shape = link.rearrange.shape if link.rearrange else link.shape
        edges = _extents(link.targets, shape, link.target_padding)
        for place, size in zip(link.targets, edges, strict=True):
            if place.tensor in out:
                raise ImpossibleError(f"The key map gives two tensors the name {place.tensor}.")
            out[place.tensor] = (link.target_dtype, size)
    return out


def _extents(places: Sequence[Place], shape: tuple[int, ...], padding: Sequence[Box]) -> list[tuple[int, ...]]:
    """The shape of every tensor placed in a space: up to where the next one begins."""
    ends: dict[int, list[int]] = {}
    for dim in range(len(shape)):
        ends[dim] = sorted({p.offset[dim] for p in places} | {b.offset[dim] for b in padding} | {shape[dim]})
    return [tuple(next((e for e in ends[d] if e > p.offset[d]), shape[d]) - p.offset[d] for d in p.dims) for p in places]


def _check_links(mapped: Mapped, tensors: Tensors) -> None:
    """Every tensor used exactly once, and each side of every link tiled without gap or overlap."""
    seen: set[str] = set(mapped.aliases)
    for link in mapped.links:
        repeated = len(link.targets) == 1 and len(link.sources) == 1 and link.sources[0].tensor in seen
        boxes = [p.box(whole(tensors[p.tensor][1]), len(link.shape)) for p in link.sources]
        flaw = find_flaw(link.shape, [*boxes, *link.source_padding])
        if flaw:
            raise ImpossibleError(f"{link.sources[0].tensor} and its siblings leave a {flaw.kind} at {flaw.box} of {list(link.shape)}.")
        shape = link.rearrange.shape if link.rearrange else link.shape
        boxes = [p.box(whole(mapped.tensors[p.tensor][1]), len(shape)) for p in link.targets]
        flaw = find_flaw(shape, [*boxes, *link.target_padding])
        if flaw:
            raise ImpossibleError(f"{link.targets[0].tensor} and its siblings leave a {flaw.kind} at {flaw.box} of {list(shape)}.")
        if not repeated:
            seen.update(p.tensor for p in link.sources)
    lost = [name for name in tensors if name not in seen]
    if lost:
        raise ImpossibleError(f"The key map loses {', '.join(lost[:5])}.")


def _reversed(forward: Sequence[Link], back: Sequence[Link]) -> bool:
    """Whether each link has its mirror image among those of the way back."""
    mirror = {(frozenset(b.sources), frozenset(b.targets), b.shape, b.dtype, b.rearrange) for b in back}
    for f in forward:
        total = f.rearrange.shape if f.rearrange else f.shape
        change = opposite(f.rearrange, f.shape) if f.rearrange else None
        if (frozenset(f.targets), frozenset(f.sources), total, f.target_dtype, change) not in mirror:
            return False
    return True


def _record(rules: Sequence[Rule], resolved: Sequence[Sequence[Resolved]], ties: Mapping[str, str], out: Tensors) -> Iterable[str]:
    """The rules that lead back, read forwards: with their sizes, and where a pattern would take more than it gave, name by name.

    `model.{rest*} -> {rest*}` read backwards takes every name; then it is recorded as one line for each tensor it was used on. A tie is
    recorded with the name its tensor ends up with.
    """
    compact = [replace(rule, sizes=groups[0][2] if groups else {}) for rule, groups in zip(rules, resolved, strict=True)]
    plain = [(rule, groups) for rule, groups in zip(compact, resolved, strict=True) if not rule.tie]
    back, _ = grouped(tuple(rule.inverse() for rule, _ in plain), out, strict=False)
    for index, (rule, groups) in enumerate(plain):
        given = {fill(term.pattern, bound) for _, bound, _ in groups for term in rule.targets} if not _holed(rule) else None
        taken = {name for at, _, members in back if at == index for name in members.values()}
        if all(sizes == rule.sizes for _, _, sizes in groups) and (given is None or given == taken):
            yield show(rule)
            continue
        for _, bound, sizes in groups:
            parts = tuple(Term(bind(t.pattern, bound), t.axes) for t in rule.parts)
            yield show(replace(rule, parts=parts, whole=Term(bind(rule.whole.pattern, bound), rule.whole.axes), sizes=sizes))
    for alias, name in ties.items():
        yield f"{alias} == {name}"


def _holed(rule: Rule) -> bool:
    """Whether the targets of a rule have numbers of a stack in their names."""
    return bool(rule.stacked) and not rule.merging
