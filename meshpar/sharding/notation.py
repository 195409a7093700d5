"""The notation of the rules: what an operator allows, written as einops would write it.

    "... i, o i, o -> ... o"

Operands left of the arrow, results right of it. A name shared between operands must be sharded together; a name missing from the results is
contracted, so that sharding it leaves a pending sum; a `[bracketed]` name cannot be sharded; `(a b)` is one dim that is the product of two;
`...` stands for any leading dims, counted from the last one as in broadcasting. A dim of size 1 where another operand has more is
broadcast: it carries no name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

Dim = tuple[tuple[str, ...], ...]
"""One dim as a row of segments, each a product of names.

(("n",),) is plain, (("b", "s"),) composite, (("q",), ("k",)) segmented, () unnamed.
"""
Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Signature:
    """An operator bound to shapes: the dims of every operand and result in terms of names that only mean something within the operator."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int]
    fixed: frozenset[str] = frozenset()
    """Names that cannot be sharded."""
    linear: tuple[frozenset[int], ...] = ()
    """Sets of operands in which the operator is linear jointly: all of them partial gives partial results."""
    summed: frozenset[int] | None = None
    """Results that become partial when a contracted name is sharded (None: all)."""
    counts: tuple[tuple[int, str], ...] = ()
    """Operands that count (say where parts end) along a name: pending sums where that is cut."""
    gathers: frozenset[str] = frozenset()
    """Names whose sharding the operator settles with collectives of its own, so that its results are invariant, not partial."""

    def group(self, name: str) -> frozenset[str]:
        """The names that have to be sharded together with `name`: its fellow segments, in whatever dims they meet."""
        rows = [dim for dims in (*self.inputs, *self.outputs) for dim in dims if len(dim) > 1]
        found, before = {name}, 0
        while before < len(found):
            before = len(found)
            for row in rows:
                if any(n in found for segment in row for n in segment):
                    found.update(segment[0] for segment in row if len(segment) == 1)
        return frozenset(found)


_Term = tuple[tuple[str, ...], ...]
"""One operand as written: the names of each dim, more than one for a product, still in brackets where they are fixed."""

_TOKEN = re.compile(r"\.\.\.|\[?\w+\]?|\(|\)")


@cache
def _parse(text: str) -> tuple[tuple[_Term, ...], tuple[_Term, ...]]:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"rule {text!r} has no '->'")
    return _terms(left, text), _terms(right, text)


def _terms(side: str, text: str) -> tuple[_Term, ...]:
    return tuple(_term(part, text) for part in side.split(","))


def _term(part: str, text: str) -> _Term:
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in _TOKEN.findall(part):
        if token == "(":
            group = []
        elif token == ")":
            if group is None:
                raise ValueError(f"rule {text!r} closes a bracket that is not open")
            dims.append(tuple(group))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    if group is not None:
        raise ValueError(f"rule {text!r} leaves a bracket open")
    return tuple(dims)


def bind(
    text: str,
    shapes: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    *,
    linear: Iterable[Iterable[int]] = (),
    gathers: Iterable[str] = (),
    counts: Iterable[tuple[int, str]] = (),
    known: Mapping[str, int] | None = None,
) -> Signature:
    """Bind a rule to the shapes of its operands and results. Operands beyond the shapes given (an absent bias) are left out.

    Raises ValueError when the shapes do not fit the rule.

    >>> bind("... i, o i -> ... o", [(2, 3, 8), (16, 8)], [(2, 3, 16)]).outputs
    (((('.1',),), (('.0',),), (('o',),)),)
    """
    left, right = _parse(text)
    if len(shapes) > len(left):
        raise ValueError(f"rule {text!r} has {len(left)} operands, not {len(shapes)}")
    sizes: dict[str, int] = dict(known or {})
    fixed: set[str] = set()
    terms = [(t, s) for t, s in zip(left, shapes, strict=False)] + [(t, s) for t, s in zip(right, outputs, strict=False)]
    spelled = [_spell(term, len(shape)) for term, shape in terms]
    for names, (_, shape) in zip(spelled, terms, strict=True):
        for dim, size in zip(names, shape, strict=True):
            if len(dim) == 1 and size > 1:
                name = _strip(dim[0], fixed)
                if sizes.setdefault(name, size) != size:
                    raise ValueError(f"rule {text!r}: {name} is {sizes[name]} and {size}")
    for names, (_, shape) in zip(spelled, terms, strict=True):
        for dim, size in zip(names, shape, strict=True):
            if len(dim) > 1:
                _bind_product(text, [_strip(n, fixed) for n in dim], size, sizes)
    dims = [
        tuple(_dim(d, size, sizes, fixed) for d, size in zip(names, shape, strict=True))
        for names, (_, shape) in zip(spelled, terms, strict=True)
    ]
    return Signature(
        tuple(dims[: len(shapes)]),
        tuple(dims[len(shapes) :]),
        sizes,
        frozenset(fixed),
        tuple(frozenset(g) & frozenset(range(len(shapes))) for g in linear if frozenset(g) & frozenset(range(len(shapes)))),
        counts=tuple(counts),
        gathers=frozenset(gathers),
    )


def _spell(term: _Term, rank: int) -> _Term:
    """The term for a tensor of `rank` dims: `...` written out as (.1, .0), the last of them .0 whatever the rank."""
    if ("...",) not in term:
        if len(term) != rank:
            raise ValueError(f"{term} does not fit a tensor of {rank} dims")
        return term
    at, more = term.index(("...",)), rank - len(term) + 1
    if more < 0:
        raise ValueError(f"{term} does not fit a tensor of {rank} dims")
    return term[:at] + tuple((f".{i}",) for i in reversed(range(more))) + term[at + 1 :]


def _strip(name: str, fixed: set[str]) -> str:
    if name.startswith("["):
        name = name[1:-1]
        fixed.add(name)
    return name


def _bind_product(text: str, names: Sequence[str], size: int, sizes: dict[str, int]) -> None:
    known, unknown = 1, [n for n in names if n not in sizes]
    for name in names:
        known *= sizes.get(name, 1)
    if len(unknown) > 1 or size % known or (not unknown and known != size):
        raise ValueError(f"rule {text!r}: cannot read a dim of {size} as ({' '.join(names)}) with {sizes}")
    for name in unknown:
        sizes[name] = size // known


def _dim(names: tuple[str, ...], size: int, sizes: Mapping[str, int], fixed: set[str]) -> Dim:
    plain = [_strip(n, fixed) for n in names]
    if size == 1:
        return ()
    return (tuple(n for n in plain if sizes[n] > 1),)
