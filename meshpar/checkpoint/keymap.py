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

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from meshpar.checkpoint.boxes import Box, find_flaw, whole
from meshpar.checkpoint.casts import castable
from meshpar.checkpoint.faults import ImpossibleError
from meshpar.checkpoint.files import ITEMSIZE
from meshpar.checkpoint.transfer import Rearrange
from meshpar.errors import ConfigError, near

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
PAD = "_"
STACK_EXPERTS = "{p*}.experts.{e}.{n*} [...] -> {p*}.experts.{n*} [e ...]"


class Place(NamedTuple):
    """Where a tensor lies in the space of a link: its corner, and which dims of the space are its own (the others have length 1)."""

    tensor: str
    offset: tuple[int, ...]
    dims: tuple[int, ...]

    def box(self, box: Box, ndim: int) -> Box:
        """A box of the tensor, as a box of the space."""
        if len(self.dims) == ndim and not any(self.offset):
            return box
        offset, size = list(self.offset), [1] * ndim
        for k, dim in enumerate(self.dims):
            offset[dim] += box.offset[k]
            size[dim] = box.size[k]
        return Box(tuple(offset), tuple(size))


class Link(NamedTuple):
    """Tensors on one side, tensors on the other, and the space in which they meet. Padding is the part of a space no tensor covers."""

    shape: tuple[int, ...]
    dtype: str
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]
    target_dtype: str
    rearrange: Rearrange | None = None
    source_padding: tuple[Box, ...] = ()
    target_padding: tuple[Box, ...] = ()
    exact: bool = True  # a cast must not change any value: key maps are bijections


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
Axis = tuple[str, tuple[str, ...]]  # ("name", (a,)), ("factors", (a, b)), ("concat", (q, k, v)), ("rest", ())


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor name pattern and its axes (None: all dims as they are)."""

    pattern: str
    axes: tuple[Axis, ...] | None


@dataclass(frozen=True, slots=True)
class Rule:
    """Several `parts` that make up one `whole`. `merging` tells which side the source is; `tie` marks `parts[0] == whole`."""

    parts: tuple[Term, ...]
    whole: Term
    merging: bool = True
    tie: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    cast: tuple[str, str] | None = None
    text: str = ""

    def inverse(self) -> Rule:
        return replace(self, merging=not self.merging, cast=self.cast[::-1] if self.cast else None, text=f"inverse of {self.text}")

    @property
    def sources(self) -> tuple[Term, ...]:
        return self.parts if self.merging else (self.whole,)

    @property
    def targets(self) -> tuple[Term, ...]:
        return (self.whole,) if self.merging else self.parts


def parse(lines: Iterable[str]) -> tuple[Rule, ...]:
    """Read rules, one a line; empty lines and lines that start with # are skipped. Raises ConfigError with the line at fault."""
    rules = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            rules.append(_parse_rule(text))
    return tuple(rules)


def inverted(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules that lead back."""
    return tuple(rule.inverse() for rule in rules)


def show(rule: Rule) -> str:
    """The text of a rule, in the direction it is meant, sizes included."""
    if rule.tie:
        return f"{_show_term(rule.parts[0])} == {_show_term(rule.whole)}"
    left, right = (" + ".join(map(_show_term, side)) for side in (rule.sources, rule.targets))
    cast = f" : {rule.cast[0]} => {rule.cast[1]}" if rule.cast else ""
    sizes = " with " + ", ".join(f"{k}={v}" for k, v in sorted(rule.sizes.items())) if rule.sizes else ""
    return f"{left} -> {right}{cast}{sizes}"


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
    groups, left = _groups(rules, tensors)
    links = {first: _same(first, *tensors[first]) for first in left}
    ties: dict[str, str] = {}
    resolved: list[list[Resolved]] = [[] for _ in rules]
    for index, bound, members in groups:
        rule = rules[index]
        if rule.tie:
            ties[_fill(rule.parts[0].pattern, bound)] = _fill(rule.whole.pattern, bound)
            resolved[index].append((rule, bound, {}))
            continue
        link, sizes = _link(rule, bound, members, tensors)
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
        hits = [(name, hit) for name in tensors if (hit := _regex(rule.whole.pattern, ()).fullmatch(name))]
        if not hits:
            raise ImpossibleError(f"The rule {rule.text!r} matches nothing.{near(rule.whole.pattern, tensors)}")
        copies += [(_fill(rule.parts[0].pattern, hit.groupdict()), name) for name, hit in hits]
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


def _groups(
    rules: Sequence[Rule], tensors: Tensors, *, strict: bool = True
) -> tuple[list[tuple[int, dict[str, str], dict[tuple[int, tuple[int, ...]], str]]], list[str]]:
    """For every rule, the sets of tensors it takes together; and the tensors that no rule takes."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], dict[tuple[int, tuple[int, ...]], str]] = {}
    used, left = [False] * len(rules), []
    stacked = [_stacked(rule) for rule in rules]
    literal, patterns = _by_name(rules)
    for name in tensors:
        for index in sorted([*literal.get(name, ()), *patterns]):
            rule = rules[index]
            hit = None if rule.tie and not rule.merging else _match(rule, stacked[index], name)
            if hit is None or (rule.tie and _fill(rule.whole.pattern, hit[1]) not in tensors):
                continue
            used[index] = True
            part, bound, place = hit
            key = (index, tuple(sorted(bound.items())))
            if (part, place) in found.setdefault(key, {}):
                raise ImpossibleError(f"{rule.text}: {name} and {found[key][part, place]} would be the same part.")
            found[key][part, place] = name
            break
        else:
            left.append(name)
    idle = [rule for rule, hit in zip(rules, used, strict=True) if not hit and not (rule.tie and not rule.merging)]
    if idle and strict:
        wanted = idle[0].sources[0].pattern
        raise ImpossibleError(f"The rule {idle[0].text!r} matches nothing.{near(wanted, tensors)}")
    return [(index, dict(bound), members) for (index, bound), members in found.items()], left


def _by_name(rules: Sequence[Rule]) -> tuple[dict[str, list[int]], list[int]]:
    """Rules that name their sources outright, by name, since there may be as many as tensors; and the others."""
    literal: dict[str, list[int]] = {}
    patterns = []
    for index, rule in enumerate(rules):
        if any("{" in term.pattern for term in rule.sources):
            patterns.append(index)
        else:
            for name in {term.pattern for term in rule.sources}:
                literal.setdefault(name, []).append(index)
    return literal, patterns


def _stacked(rule: Rule) -> tuple[str, ...]:
    """The axes of the whole that are numbers in the names of the parts, in the order of the whole."""
    if rule.whole.axes is None:
        return ()
    in_names = set(re.findall(r"\{(\w+)\}", rule.parts[0].pattern)) - set(re.findall(r"\{(\w+)\}", rule.whole.pattern))
    return tuple(names[0] for kind, names in rule.whole.axes if kind == "name" and names[0] in in_names)


def _match(rule: Rule, stacked: tuple[str, ...], name: str) -> tuple[int, dict[str, str], tuple[int, ...]] | None:
    for part, term in enumerate(rule.sources):
        hit = _regex(term.pattern, stacked).fullmatch(name)
        if hit:
            bound = dict(hit.groupdict())
            place = tuple(int(bound.pop(axis)) for axis in stacked if axis in bound)
            return part, bound, place
    return None


@lru_cache(maxsize=512)
def _regex(pattern: str, stacked: tuple[str, ...]) -> re.Pattern[str]:
    out, seen = "", set()
    for text, name, star in re.findall(r"([^{}]+)|\{(\w+)(\*?)\}", pattern):
        if text:
            out += re.escape(text)
        elif name in seen:
            out += f"(?P={name})"
        else:
            seen.add(name)
            out += f"(?P<{name}>{r'0|[1-9][0-9]{0,8}' if name in stacked else '.+' if star else '[^.]+'})"
    return re.compile(out)


def _fill(pattern: str, bound: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: bound[m.group(1)], pattern)


def _link(
    rule: Rule, bound: dict[str, str], members: dict[tuple[int, tuple[int, ...]], str], tensors: Tensors
) -> tuple[Link, dict[str, int]]:
    """One group of tensors, with the space, the places and the change of order worked out."""
    stacked = _stacked(rule)
    rows = [tensors[name] for name in members.values()]
    dtype = rows[0][0]
    if any(row[0] != dtype for row in rows):
        raise ImpossibleError(f"{rule.text}: {', '.join(sorted(members.values())[:4])} differ in dtype.")
    counts: tuple[int, ...]
    if rule.merging:
        counts = _counts(rule, members, len(stacked))
        shapes = [tensors[members[part, (0,) * len(stacked)]][1] for part in range(len(rule.parts))]
        rest = _rest(rule.parts[0], shapes[0])
        sizes = _sizes(rule, [(term, shape) for term, shape in zip(rule.parts, shapes, strict=True)])
        sizes |= dict(zip(stacked, counts, strict=True))
    else:
        (name,) = members.values()
        rest = _rest(rule.whole, tensors[name][1])
        sizes = _sizes(rule, [(rule.whole, tensors[name][1])])
        counts = tuple(sizes[axis] for axis in stacked)
        shapes = [_shape(term, sizes, rest) for term in rule.parts]
    space, places, padding = _places(rule, bound, counts, shapes, sizes, rest)
    if rule.merging:
        for place, (part, _) in places:
            if tensors[place.tensor][1] != shapes[part]:
                raise ImpossibleError(
                    f"{rule.text}: {place.tensor} is {list(tensors[place.tensor][1])}, its siblings are {list(shapes[part])}."
                )
    change = _rearrangement(rule, space, sizes, rest, len(stacked))
    total = change.shape if change else space
    one = Place(_fill(rule.whole.pattern, bound), (0,) * len(total), tuple(range(len(total))))
    many = tuple(place for place, _ in places)
    cast = _cast(rule, dtype)
    known = {k: v for k, v in sizes.items() if k not in stacked}
    if rule.merging:
        return Link(space, dtype, many, (one,), cast, change, source_padding=padding), known
    if change:
        change = _opposite(change, space)
    return Link(total, dtype, (one,), many, cast, change, target_padding=padding), known


def _counts(rule: Rule, members: Mapping[tuple[int, tuple[int, ...]], str], depth: int) -> tuple[int, ...]:
    counts = tuple(1 + max(place[d] for _, place in members) for d in range(depth))
    if len(members) != len(rule.parts) * prod(counts):
        have = ", ".join(sorted(members.values())[:6])
        raise ImpossibleError(f"{rule.text}: {len(members)} of {len(rule.parts) * prod(counts)} tensors are there, e.g. {have}.")
    return counts


def _rest(term: Term, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims that `...` stands for."""
    if term.axes is None:
        return shape
    at = next((k for k, (kind, _) in enumerate(term.axes) if kind == "rest"), None)
    if at is None:
        return ()
    return shape[at : len(shape) - (len(term.axes) - at - 1)]


def _sizes(rule: Rule, known: Sequence[tuple[Term, tuple[int, ...]]]) -> dict[str, int]:
    """The length of every axis, from the shapes at hand and from `with`."""
    sizes = dict(rule.sizes)
    for term, shape in known:
        if term.axes is None:
            continue
        has_rest = any(kind == "rest" for kind, _ in term.axes)
        if len(term.axes) - has_rest > len(shape) or (not has_rest and len(term.axes) != len(shape)):
            raise ImpossibleError(
                f"{rule.text}: {term.pattern} has {len(term.axes) - has_rest} axes in the rule and {len(shape)} dims in the file."
            )
        at = 0
        for kind, names in term.axes:
            if kind == "rest":
                at += len(shape) - (len(term.axes) - 1)
                continue
            _solve(rule, kind, names, shape[at], sizes)
            at += 1
    return sizes


def _solve(rule: Rule, kind: str, names: tuple[str, ...], length: int, sizes: dict[str, int]) -> None:
    """Find the one unknown of an axis: in a product for factors, in a sum for a concatenation (a repeated name counts as often)."""
    unknown = sorted({n for n in names if n not in sizes})
    told = f"{rule.text}: the sizes of {', '.join(unknown)} are not known from the shapes; add `with {unknown[0] if unknown else ''}=N`."
    if len(unknown) > 1:
        raise ImpossibleError(told)
    if kind == "concat":
        rest, times = length - sum(sizes[n] for n in names if n in sizes), sum(n in unknown for n in names)
        if unknown and rest >= 0 and rest % times == 0:
            sizes[unknown[0]] = rest // times
            return
        fits = not unknown and rest == 0
    else:
        base = prod(sizes[n] for n in names if n in sizes)
        if unknown and base and length % base == 0 and names.count(unknown[0]) == 1:
            sizes[unknown[0]] = length // base
            return
        fits = not unknown and base == length
    if not fits:
        shown = ", ".join(f"{n}={sizes[n]}" for n in dict.fromkeys(names) if n in sizes)
        raise ImpossibleError(f"{rule.text}: a dim of {length} does not fit {_show_axis((kind, names))} with {shown or 'nothing known'}.")


def _shape(term: Term, sizes: Mapping[str, int], rest: tuple[int, ...]) -> tuple[int, ...]:
    if term.axes is None:
        return rest
    out: list[int] = []
    for kind, names in term.axes:
        if kind == "rest":
            out += rest
        else:
            missing = [n for n in names if n not in sizes]
            if missing:
                raise ImpossibleError(f"{term.pattern}: the size of {', '.join(missing)} is unknown; add `with {missing[0]}=N`.")
            out.append(sum(sizes[n] for n in names) if kind == "concat" else prod(sizes[n] for n in names))
    return tuple(out)


def _places(
    rule: Rule,
    bound: dict[str, str],
    counts: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]],
    sizes: Mapping[str, int],
    rest: tuple[int, ...],
) -> tuple[tuple[int, ...], list[tuple[Place, tuple[int, tuple[int, ...]]]], tuple[Box, ...]]:
    """The space [stacked axes, dims of a part, the concatenated one added up], each part's place in it, and what padding covers."""
    depth, concat, stacked = len(counts), _concat_dim(rule, rest), _stacked(rule)
    starts, length = _concat_starts(rule, sizes)
    inner = list(shapes[0])
    if concat is not None:
        inner[concat[0]] = length
    space = (*counts, *inner)
    places = []
    for part, term in enumerate(rule.parts):
        corner = [0] * len(inner)
        if concat is not None:
            corner[concat[0]] = starts[part]
        for index in _indices(counts):
            names = bound | {axis: str(i) for axis, i in zip(stacked, index, strict=True)}
            place = Place(_fill(term.pattern, names), (*index, *corner), tuple(range(depth, depth + len(inner))))
            places.append((place, (part, index)))
    padding: tuple[Box, ...] = ()
    if concat is not None and len(starts) < len(concat[1]):
        first = [0] * len(space)
        size = list(space)
        dim = depth + concat[0]
        covered = starts[-1] + sizes[[n for n in concat[1] if n != PAD][-1]]
        first[dim], size[dim] = covered, length - covered
        padding = (Box(tuple(first), tuple(size)),) if size[dim] else ()
    return space, places, padding


def _indices(counts: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    index: list[tuple[int, ...]] = [()]
    for count in counts:
        index = [(*head, i) for head in index for i in range(count)]
    return index


def _concat_dim(rule: Rule, rest: tuple[int, ...]) -> tuple[int, tuple[str, ...]] | None:
    """The dim of the parts along which they are concatenated, and the names that follow each other there."""
    axes = rule.whole.axes or ()
    names = next((names for kind, names in axes if kind == "concat"), None)
    if names is None:
        if len(rule.parts) > 1:
            raise ConfigError(f"{rule.text}: several tensors become one, so an axis must say how: (a|b).")
        return None
    real = [n for n in names if n != PAD]
    if len(real) != len(rule.parts) or PAD in names[:-1]:
        raise ConfigError(
            f"{rule.text}: {_show_axis(('concat', names))} joins {len(real)} tensors, "
            f"the other side has {len(rule.parts)}; padding comes last."
        )
    at = 0
    for kind, own in rule.parts[0].axes or ():
        if kind == "name" and own[0] == real[0]:
            break
        at += len(rest) if kind == "rest" else 1
    else:
        raise ConfigError(f"{rule.text}: the axis {real[0]} is not one of {rule.parts[0].pattern}.")
    return at, names


def _concat_starts(rule: Rule, sizes: Mapping[str, int]) -> tuple[list[int], int]:
    names = next((names for kind, names in rule.whole.axes or () if kind == "concat"), ())
    starts, at = [], 0
    for name in names:
        if name != PAD:
            starts.append(at)
        if name not in sizes:
            raise ImpossibleError(f"{rule.text}: the size of {name} is unknown; add `with {name}=N`.")
        at += sizes[name]
    return starts or [0], at


def _rearrangement(rule: Rule, space: tuple[int, ...], sizes: Mapping[str, int], rest: tuple[int, ...], depth: int) -> Rearrange | None:
    """The way from the space to the whole tensor, or None if they are the same."""
    if rule.whole.axes is None or rule.parts[0].axes is None:
        return None
    split = [(name, sizes[name]) for name in _stacked(rule)]
    inner = iter(space[depth:])
    concat = next((names for kind, names in rule.whole.axes if kind == "concat"), ())
    for kind, names in rule.parts[0].axes:
        if kind == "rest":
            split += [(f"...{k}", next(inner)) for k in range(len(rest))]
        elif kind == "name":
            split.append(("|" if names[0] in concat and names[0] == concat[0] else names[0], next(inner)))
        else:
            next(inner)
            split += [(n, sizes[n]) for n in names]
    wanted: list[str] = []
    shape: list[int] = []
    for kind, names in rule.whole.axes:
        own = [f"...{k}" for k in range(len(rest))] if kind == "rest" else ["|"] if kind == "concat" else list(names)
        wanted += own
        lengths = dict(split)
        missing = [n for n in own if n not in lengths]
        if missing:
            raise ConfigError(f"{rule.text}: the axis {missing[0]} is only on one side.")
        shape += [lengths[n] for n in own] if kind == "rest" else [prod(lengths[n] for n in own)]
    have = [name for name, _ in split]
    if sorted(have) != sorted(wanted):
        raise ConfigError(f"{rule.text}: the axes {', '.join(sorted(set(have) ^ set(wanted)))} are only on one side.")
    order = tuple(have.index(name) for name in wanted)
    if order == tuple(range(len(order))) and tuple(shape) == space:
        return None
    return Rearrange(tuple(n for _, n in split), order, tuple(shape))


def _opposite(change: Rearrange, shape: tuple[int, ...]) -> Rearrange:
    split = tuple(change.split[k] for k in change.order)
    order = tuple(change.order.index(k) for k in range(len(change.order)))
    return Rearrange(split, order, shape)


def _cast(rule: Rule, dtype: str) -> str:
    if rule.cast is None:
        return dtype
    if dtype != rule.cast[0] or not castable(*rule.cast):
        raise ImpossibleError(f"{rule.text}: the tensor is {dtype}; only {rule.cast[0]} can be cast to {rule.cast[1]} by this rule.")
    return rule.cast[1]


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
        change = _opposite(f.rearrange, f.shape) if f.rearrange else None
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
    back, _ = _groups(tuple(rule.inverse() for rule, _ in plain), out, strict=False)
    for index, (rule, groups) in enumerate(plain):
        given = {_fill(term.pattern, bound) for _, bound, _ in groups for term in rule.targets} if not _holed(rule) else None
        taken = {name for at, _, members in back if at == index for name in members.values()}
        if all(sizes == rule.sizes for _, _, sizes in groups) and (given is None or given == taken):
            yield show(rule)
            continue
        for _, bound, sizes in groups:
            parts = tuple(Term(_bind(t.pattern, bound), t.axes) for t in rule.parts)
            yield show(replace(rule, parts=parts, whole=Term(_bind(rule.whole.pattern, bound), rule.whole.axes), sizes=sizes))
    for alias, name in ties.items():
        yield f"{alias} == {name}"


def _holed(rule: Rule) -> bool:
    """Whether the targets of a rule have numbers of a stack in their names."""
    return bool(_stacked(rule)) and not rule.merging


def _bind(pattern: str, bound: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: bound.get(m.group(1), m.group(0)), pattern)


_TERM = re.compile(r"\s*([^\s\[\]]+)\s*(?:\[([^\]]*)\])?\s*")
_AXIS = re.compile(r"\s*(?:(\.\.\.)|\(([^()]*)\)|(\w+))\s*")


def _parse_rule(text: str) -> Rule:
    if "==" in text:
        left, _, right = text.partition("==")
        return Rule((_parse_term(left, text),), _parse_term(right, text), tie=True, text=text)
    body, _, tail = text.partition(" with ")
    body, _, cast = body.partition(" : ")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise ConfigError(f"Key map rule {text!r}: expected `source -> target` or `alias == tensor`.")
    sources = tuple(_parse_term(t, text) for t in left.split(" + "))
    targets = tuple(_parse_term(t, text) for t in right.split(" + "))
    if len(sources) > 1 and len(targets) > 1:
        raise ConfigError(f"Key map rule {text!r}: one side must be a single tensor.")
    merging = len(targets) == 1 and not (len(sources) == 1 and _wholer(sources[0], targets[0]))
    parts, one = (sources, targets[0]) if merging else (targets, sources[0])
    rule = Rule(parts, one, merging, False, _parse_sizes(tail, text), _parse_cast(cast, text), text)
    _check_rule(rule)
    return rule


def _wholer(source: Term, target: Term) -> bool:
    """Whether a one-to-one rule splits: its source has the padding, or an axis that is a number in the target's name."""
    if any(kind == "concat" for kind, _ in source.axes or ()):
        return True
    numbers = set(re.findall(r"\{(\w+)\}", target.pattern)) - set(re.findall(r"\{(\w+)\}", source.pattern))
    return any(kind == "name" and names[0] in numbers for kind, names in source.axes or ())


def _check_rule(rule: Rule) -> None:
    """Every hole of a name must be known from the other side, whichever way the rule is read."""
    stacked = set(_stacked(rule))
    sides = [set(re.findall(r"\{(\w+)\*?\}", term.pattern)) for term in rule.parts]
    whole_holes = set(re.findall(r"\{(\w+)\*?\}", rule.whole.pattern))
    for holes in sides:
        if holes - stacked != whole_holes:
            odd = ", ".join(sorted((holes - stacked) ^ whole_holes))
            raise ConfigError(f"Key map rule {rule.text!r}: {{{odd}}} is only on one side, so the rule cannot be undone.")
    if any((term.axes is None) != (rule.whole.axes is None) for term in rule.parts):
        raise ConfigError(f"Key map rule {rule.text!r}: give the axes on both sides, or on none.")


def _parse_term(text: str, rule: str) -> Term:
    hit = _TERM.fullmatch(text)
    if not hit:
        raise ConfigError(f"Key map rule {rule!r}: {text.strip()!r} is not `name` or `name [axes]`.")
    return Term(hit.group(1), None if hit.group(2) is None else tuple(_parse_axes(hit.group(2), rule)))


def _parse_axes(text: str, rule: str) -> Iterable[Axis]:
    at = 0
    while at < len(text):
        hit = _AXIS.match(text, at)
        if not hit or hit.end() == at:
            raise ConfigError(f"Key map rule {rule!r}: {text[at:]!r} is not an axis list like `e (q|k) ...`.")
        rest, group, name = hit.groups()
        if rest:
            yield "rest", ()
        elif name:
            yield "name", (name,)
        else:
            concat = "|" in group
            names = tuple(n.strip() for n in (group.split("|") if concat else group.split()))
            if not names or any(not n.isidentifier() for n in names):
                raise ConfigError(f"Key map rule {rule!r}: ({group}) should be names, (a b) or (a|b).")
            yield ("concat" if concat else "factors"), names
        at = hit.end()


def _parse_sizes(text: str, rule: str) -> dict[str, int]:
    sizes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"Key map rule {rule!r}: `with` expects name=N, found {item!r}.")
        sizes[name.strip()] = int(value)
    return sizes


def _parse_cast(text: str, rule: str) -> tuple[str, str] | None:
    if not text.strip():
        return None
    source, _, target = (part.strip() for part in text.partition("=>"))
    if source not in ITEMSIZE or target not in ITEMSIZE or not castable(source, target):
        raise ConfigError(f"Key map rule {rule!r}: a cast reads `: F16 => F32`.")
    return source, target


def _show_term(term: Term) -> str:
    return term.pattern if term.axes is None else f"{term.pattern} [{' '.join(map(_show_axis, term.axes))}]"


def _show_axis(axis: Axis) -> str:
    kind, names = axis
    return {"rest": "...", "name": " ".join(names), "factors": f"({' '.join(names)})", "concat": f"({'|'.join(names)})"}[kind]


def matches(rule: Rule, name: str) -> bool:
    """Whether a rule takes a tensor of this name."""
    return _match(rule, _stacked(rule), name) is not None
