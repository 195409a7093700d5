"""The space in which the tensors of one rule of a key map meet: where each lies in it, and the change of order between its two sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from meshpar.checkpoint.format.boxes import Box
from meshpar.checkpoint.format.casts import castable
from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.move.transfer import Rearrange
from meshpar.checkpoint.names.matching import fill
from meshpar.checkpoint.names.rules import PAD, Rule, Term, show_axis
from meshpar.errors import ConfigError

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape)."""


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


def link_of(
    rule: Rule, bound: dict[str, str], members: dict[tuple[int, tuple[int, ...]], str], tensors: Tensors
) -> tuple[Link, dict[str, int]]:
    """One group of tensors, with the space, the places and the change of order worked out."""
    stacked = rule.stacked
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
    one = Place(fill(rule.whole.pattern, bound), (0,) * len(total), tuple(range(len(total))))
    many = tuple(place for place, _ in places)
    cast = _cast(rule, dtype)
    known = {k: v for k, v in sizes.items() if k not in stacked}
    if rule.merging:
        return Link(space, dtype, many, (one,), cast, change, source_padding=padding), known
    if change:
        change = opposite(change, space)
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
        raise ImpossibleError(f"{rule.text}: a dim of {length} does not fit {show_axis((kind, names))} with {shown or 'nothing known'}.")


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
    depth, concat, stacked = len(counts), _concat_dim(rule, rest), rule.stacked
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
            place = Place(fill(term.pattern, names), (*index, *corner), tuple(range(depth, depth + len(inner))))
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
            f"{rule.text}: {show_axis(('concat', names))} joins {len(real)} tensors, "
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
    split = [(name, sizes[name]) for name in rule.stacked]
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


def opposite(change: Rearrange, shape: tuple[int, ...]) -> Rearrange:
    split = tuple(change.split[k] for k in change.order)
    order = tuple(change.order.index(k) for k in range(len(change.order)))
    return Rearrange(split, order, shape)


def _cast(rule: Rule, dtype: str) -> str:
    if rule.cast is None:
        return dtype
    if dtype != rule.cast[0] or not castable(*rule.cast):
        raise ImpossibleError(f"{rule.text}: the tensor is {dtype}; only {rule.cast[0]} can be cast to {rule.cast[1]} by this rule.")
    return rule.cast[1]
