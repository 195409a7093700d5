"""Rules: what operators allow, as functions of a call. Which operator obeys which is said in its row of `graph.operators`.

Most are one line of notation (see `notation`) plus the sets of operands in which the operator is linear. Those below depend on arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from meshpar.graph.flops import spelled
from meshpar.graph.op import Op
from meshpar.sharding.notation import Dim, Dims, Signature, bind
from meshpar.sharding.views import Rule, fixed_dims, named, sizes_of


def row(text: str, *, linear: Iterable[Iterable[int]] = (), gathers: Iterable[str] = (), counts: Iterable[tuple[int, str]] = ()) -> Rule:
    """A rule written in the notation."""
    linear, counts = tuple(tuple(g) for g in linear), tuple(counts)

    def rule(op: Op) -> Signature | None:
        outs = [o.shape for o in op.outs if o is not None]
        try:
            return bind(text, op.shapes, outs, linear=linear, gathers=gathers, counts=counts)
        except ValueError:
            return None

    return rule


def pointwise(op: Op) -> Signature:
    """Dims aligned from the right; a dim of size 1 against a larger one is broadcast. (The example of `type_as` may have more dims.)"""
    out = op.out.shape
    names = named("d", out)
    inputs = []
    for shape in op.shapes:
        shift = len(out) - len(shape)
        inputs.append(tuple(names[i + shift] if i + shift >= 0 and n == out[i + shift] else () for i, n in enumerate(shape)))
    return Signature(tuple(inputs), (names,) * len(op.outs), sizes_of("d", out))


def elementwise(linear: Linear) -> Rule:
    """As `pointwise`, linear in the sets of operands that `linear` says."""
    return lambda op: replace(pointwise(op), linear=tuple(frozenset(group) for group in linear(op)))


def pointwise_or(rule: Rule) -> Rule:
    """`pointwise` in the forms that carry torch's tag (`max` of two tensors), else `rule` (`max` along a dim)."""
    return lambda op: pointwise(op) if torch.Tag.pointwise in getattr(op.node.target, "tags", ()) else rule(op)


def uncut(op: Op) -> Signature:
    """Results like the operands, none of which may be cut: what lies before and after is."""
    names = tuple(named(f"d{i}_", shape) for i, shape in enumerate(op.shapes))
    sizes = {name: n for i, shape in enumerate(op.shapes) for name, n in sizes_of(f"d{i}_", shape).items()}
    return Signature(names, names, sizes, frozenset(sizes))


Linear = Callable[[Op], list[set[int]]]
"""Sets of operands in which a call is linear."""


def nowhere(op: Op) -> list[set[int]]:
    return []


def jointly(op: Op) -> list[set[int]]:
    """x + y, of two tensors: a number added to a pending sum would be added by every rank."""
    tensors = [a for a in ("self", "other") if isinstance(op.arguments.get(a), torch.fx.Node)]
    return [set(range(len(op.infos)))] if len(tensors) == 2 else []


def each(op: Op) -> list[set[int]]:
    """x * y: in x and in y, unless they are the same."""
    return [{i} for i in range(len(op.infos))] if op.node.args[0] is not op.node.args[-1] else []


def first(op: Op) -> list[set[int]]:
    return [{0}]


def quotient(op: Op) -> list[set[int]]:
    """x / y: in x, unless it is rounded."""
    return [{0}] if isinstance(op.arguments.get("self"), torch.fx.Node) and op.arguments.get("rounding_mode") is None else []


def widened(op: Op) -> list[set[int]]:
    return [{0}] if _widens(op) else []


def choice(op: Op) -> list[set[int]]:
    """where(mask, x, y): in x and y together."""
    return [{1, 2}] if len(op.infos) == 3 else []


def _widens(op: Op) -> bool:
    """A pending sum may be cast only where the cast loses nothing."""
    a, b = op.infos[0].dtype, op.out.dtype
    return a == b or (b.is_floating_point and b.itemsize >= a.itemsize) or (not a.is_floating_point and b.itemsize > a.itemsize)


def reduction(op: Op) -> Signature:
    """Reduced dims are needed whole."""
    found = counted(op)
    return replace(found, fixed=frozenset(f"d{i}" for i in op.dims()))


def summed(op: Op) -> Signature:
    """Sums and means: linear, and a pending sum where a summed dim is sharded."""
    return replace(counted(op), linear=(frozenset({0}),))


def counted(op: Op) -> Signature:
    """Sums of something made of each element: a pending sum where a summed dim is sharded."""
    shape = op.infos[0].shape
    gone = set(op.dims())
    base = named("d", shape)
    keep = op.out.shape
    kept = tuple(base[i] if i not in gone else () for i in range(len(shape)))
    out: Dims = kept if len(keep) == len(shape) else tuple(d for i, d in enumerate(kept) if i not in gone)
    return Signature((base,), (out,) * len(op.outs), sizes_of("d", shape))


along_dim = fixed_dims(lambda op: [op.dim()], linear=False)
"""softmax and cumulative operators: along one dim, which is needed whole."""


def cumulated(op: Op) -> Signature:
    """A cumulative operator of a part of a dim, which an outer axis cut."""
    shape, dim = op.infos[0].shape, op.node.args[3]
    base = named("d", shape)
    return Signature(
        (base,), (base,), sizes_of("d", shape), frozenset({f"d{dim}"}), (frozenset({0}),) if op.node.args[1] == "cumsum" else ()
    )


def matmul(op: Op) -> Signature | None:
    a, b = len(op.infos[0].shape), len(op.infos[1].shape)
    left = {1: "k"}.get(a, "... i k")
    right = {1: "k", 2: "k j"}.get(b, "... k j")
    out = " ".join(["..."] * (a > 2 or b > 2) + ["i"] * (a > 1) + ["j"] * (b > 1))
    return row(f"{left if a != 2 else 'i k'}, {right} -> {out}", linear=((0,), (1,)))(op)


def added(sum_: str, product: str) -> Rule:
    """A matrix product with something added to it, which is broadcast from the right."""

    def rule(op: Op) -> Signature | None:
        names = sum_.split()
        return row(f"{' '.join(names[len(names) - len(op.shapes[0]) :])}, {product}", linear=((0, 1), (0, 2)))(op)

    return rule


def einsum(op: Op) -> Signature | None:
    left, arrow, out = str(op.arguments["equation"]).replace(" ", "").partition("->")
    if not arrow:
        return None
    terms = [" ".join(spelled(term, len(shape))) for term, shape in zip([*left.split(","), out], [*op.shapes, op.out.shape], strict=True)]
    return row(f"{', '.join(terms[:-1])} -> {terms[-1]}", linear=tuple((i,) for i in range(len(op.infos))))(op)


def by_position(op: Op) -> bool:
    """Whether a convolution along one dim is a product at every position by itself."""
    stride, padding = (op.arguments.get(name) for name in ("stride", "padding"))
    plain = [list(value) if isinstance(value, (list, tuple)) else value for value in (stride, padding)]
    return op.infos[1].shape[2:] == (1,) and plain[0] in ([1], 1) and plain[1] in ([0], 0)


def grouped_mm(op: Op) -> Signature | None:
    """Rows that a dispatch sorted: a rank's tokens have its rows, and the ends of every expert's rows add up.

    Of rows that a model sorted itself a rank's part may be of some experts only, and their ends are those of all: they are needed whole.
    """
    if not op.infos[0].rows:
        return row("[n] i, [x] i o, [x] -> [n] o", linear=((0,), (1,)))(op)
    return row("n i, [x] i o, [x] -> n o", linear=((0,), (1,)), counts=((2, "n"),))(op)


def row_expert(op: Op) -> Signature | None:
    rest = " ".join(f"[d{i}]" for i in range(len(op.infos[0].shape) - 1))
    return row(f"n {rest}, [x] -> n", counts=((1, "n"),))(op)


def created(op: Op) -> Signature:
    """Operators that make a tensor of one value from a shape alone can make any part of it."""
    shape = op.out.shape
    inputs = [tuple(() for _ in i.shape) if len(i.shape) != len(shape) or i.shape != shape else named("d", shape) for i in op.infos]
    return Signature(tuple(inputs), (named("d", shape),), sizes_of("d", shape))


def whole(op: Op) -> Signature:
    """Operators that look at all of a value, and give none of it back."""
    names = [named(f"v{i}_", shape) for i, shape in enumerate(op.shapes)]
    sizes = {name: n for i, shape in enumerate(op.shapes) for name, n in sizes_of(f"v{i}_", shape).items()}
    return Signature(tuple(names), tuple(tuple(() for _ in o.shape) for o in op.outs if o is not None), sizes, frozenset(sizes))


def collective(op: Op) -> Signature:
    """A conversion on another axis, already written out. It moves dims whole; one that it cuts or joins evenly can be cut inside of a part.

    heads [8 4] on 2 ranks   s_to_s   [4 8]       the 4 heads that stay here may be cut again, and the 8 before it alike: 2 of each 4
    """
    plain = _evenly(op)
    shapes = [i.shape for i in op.infos]
    inputs, outs, sizes, fixed = [], [], {}, []
    for k, shape in enumerate(shapes):
        out = op.outs[min(k, len(op.outs) - 1)]
        assert out is not None
        sizes.update({f"d{k}_{i}": min(n, m) for i, (n, m) in enumerate(zip(shape, out.shape, strict=True))})
        sizes.update({f"n{k}_{i}": m for i, m in enumerate(out.shape)} | {f"c{k}_{i}": n for i, n in plain.items()})
        before: list[Dim] = []
        after: list[Dim] = []
        for i, (n, m) in enumerate(zip(shape, out.shape, strict=True)):
            own = (f"d{k}_{i}",)
            parts = (f"c{k}_{i}", *own)
            if i in plain and min(n, m) > 1:
                fixed.append(parts[0])
                before.append((parts if n > m else own,))
                after.append((parts if m > n else own,))
            elif i in plain or n != m or i in _dims_of(op):
                sizes[own[0]] = n
                fixed += [own[0], f"n{k}_{i}"]
                before.append((own,) if n > 1 else ())
                after.append(((f"n{k}_{i}",),) if m > 1 else ())
            else:
                before.append((own,) if n > 1 else ())
                after.append((own,) if n > 1 else ())
        inputs.append(tuple(before))
        outs.append(tuple(after))
    return Signature(tuple(inputs), tuple(outs[: len(op.outs)]), sizes, frozenset(fixed), (frozenset(range(len(shapes))),))


def _layouts(op: Op) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """(dim, repeat, segments) of the shard before a conversion, of the one after it, or of both."""
    args = op.node.args[1:] if len(op.infos) == 1 else ()
    return [args[at : at + 3] for at in range(0, len(args), 3)]  # type: ignore[misc]


def _dims_of(op: Op) -> set[int]:
    return {dim for dim, _, _ in _layouts(op)}


def _evenly(op: Op) -> dict[int, int]:
    """Dims that a conversion cuts or joins in as many contiguous parts as there are ranks -> how many."""
    found = {}
    for dim, repeat, segments in _layouts(op):
        size = int(op.arguments["size"])
        if repeat == 1 and len(segments) == 1 and segments[0][0] % size == 0 and op.infos[0].shape[dim] != op.out.shape[dim]:
            found[dim] = size
    return found
