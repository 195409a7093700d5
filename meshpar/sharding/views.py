"""How a shard travels through operators that only rearrange: reshape, transpose, split, cat, slice, expand and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from meshpar.graph.op import Op
from meshpar.sharding.notation import Dim, Dims, Signature

Rule = Callable[[Op], "Signature | None"]


def named(prefix: str, shape: Sequence[int]) -> Dims:
    """One name per dim, none for dims of size 1."""
    return tuple(((f"{prefix}{i}",),) if n > 1 else () for i, n in enumerate(shape))


def sizes_of(prefix: str, shape: Sequence[int]) -> dict[str, int]:
    """The sizes that go with `named`."""
    return {f"{prefix}{i}": n for i, n in enumerate(shape) if n > 1}


def signature(op: Op, inputs: Sequence[Dims], outputs: Sequence[Dims], sizes: dict[str, int], fixed: Sequence[str] = ()) -> Signature:
    """A signature of a rearranging operator: linear in all its operands at once."""
    return Signature(tuple(inputs), tuple(outputs), sizes, frozenset(fixed), (frozenset(range(len(inputs))),))


def reshape_dims(before: Sequence[int], after: Sequence[int]) -> tuple[Dims, Dims, dict[str, int], list[str]]:
    """Name the common factors of two shapes of one tensor.

    >>> reshape_dims((4, 64), (4, 8, 8))[:2]
    (((('0',),), (('1', '2'),)), ((('0',),), (('1',),), (('2',),)))
    """
    sizes: dict[str, int] = {}
    fixed: list[str] = []
    left: list[list[str]] = [[] for _ in before]
    right: list[list[str]] = [[] for _ in after]
    i = j = 0
    a, b = (before[0] if before else 1), (after[0] if after else 1)
    while i < len(before) and j < len(after):
        if a == 1:
            i += 1
            a = before[i] if i < len(before) else 1
            continue
        if b == 1:
            j += 1
            b = after[j] if j < len(after) else 1
            continue
        common = min(a, b) if max(a, b) % min(a, b) == 0 else 0
        name = str(len(sizes))
        if not common:
            return _opaque(before, after, left, right, i, j, sizes, fixed)
        sizes[name] = common
        left[i].append(name)
        right[j].append(name)
        a, b = a // common, b // common
    return tuple(_product(n) for n in left), tuple(_product(n) for n in right), sizes, fixed


def _opaque(
    before: Sequence[int],
    after: Sequence[int],
    left: list[list[str]],
    right: list[list[str]],
    i: int,
    j: int,
    sizes: dict[str, int],
    fixed: list[str],
) -> tuple[Dims, Dims, dict[str, int], list[str]]:
    """From here on the shapes share no factor: only what was named before `i` and `j` is carried."""

    def trim(names: list[list[str]], shape: Sequence[int], at: int, side: str) -> Dims:
        dims: list[Dim] = []
        for k, (group, size) in enumerate(zip(names, shape, strict=True)):
            rest = size
            for name in group:
                rest //= sizes[name]
            if rest > 1:
                name = f"{side}{k}"
                sizes[name] = rest
                fixed.append(name)
                group = [*group, name]
            dims.append(_product(group))
        return tuple(dims)

    return trim(left, before, i, "l"), trim(right, after, j, "r"), sizes, fixed


def _product(names: Sequence[str]) -> Dim:
    return (tuple(names),) if names else ()


def reshape(op: Op) -> Signature | None:
    if not all(op.infos[0].shape) or not all(op.out.shape) or op.infos[0].dtype != op.out.dtype:
        return None  # empty, or the bits read as another type
    before, after, sizes, fixed = reshape_dims(op.infos[0].shape, op.out.shape)
    return signature(op, [before], [after], sizes, fixed)


def permuted(order: Callable[[Op], Sequence[int]]) -> Rule:
    def rule(op: Op) -> Signature:
        shape = op.infos[0].shape
        dims = named("d", shape)
        return signature(op, [dims], [tuple(dims[d] for d in order(op))], sizes_of("d", shape))

    return rule


def _transpose(op: Op) -> list[int]:
    order = list(range(len(op.infos[0].shape)))
    a, b = (op.dim(name) for name in op.arguments if name != "self")
    order[a], order[b] = order[b], order[a]
    return order


def _last_two(op: Op) -> list[int]:
    rank = len(op.infos[0].shape)
    return [*range(rank - 2), rank - 1, rank - 2]


def _permute(op: Op) -> list[int]:
    rank = len(op.infos[0].shape)
    return [int(d) % rank for d in op.arguments["dims"]]


def _movedim(op: Op) -> list[int]:
    rank = len(op.infos[0].shape)

    def listed(name: str) -> list[int]:
        given = op.arguments[name]
        return [int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])]

    source, target = listed("source"), listed("destination")
    order = [-1] * rank
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(d for d in range(rank) if d not in source)
    return [next(rest) if d < 0 else d for d in order]


def expand(op: Op) -> Signature:
    before, after = op.infos[0].shape, op.out.shape
    out = named("d", after)
    shift = len(after) - len(before)
    inputs = tuple(out[i + shift] if n == after[i + shift] else () for i, n in enumerate(before))
    return signature(op, [inputs], [out], sizes_of("d", after))


def split(op: Op) -> Signature:
    """split, chunk and friends: the dim becomes a row of segments, one per result."""
    dim, shape = op.dim(), op.infos[0].shape
    base, sizes = named("d", shape), sizes_of("d", shape)
    names = [f"s{k}" for k in range(len(op.outs))]
    widths = [o.shape[dim] for o in op.outs if o is not None]
    sizes.update({n: w for n, w in zip(names, widths, strict=True) if w > 1})
    fixed = [n for n, w in zip(names, widths, strict=True) if w > 1] if any(w <= 1 for w in widths) else []
    return _segmented(op, base, dim, names, widths, sizes, fixed, joined_is_input=True)


def cat(op: Op) -> Signature | None:
    shape = op.out.shape
    dim = op.arguments.get("dim", 0)
    dim = int(dim) % max(1, len(shape))
    if any(len(i.shape) != len(shape) for i in op.infos):
        return None
    base, sizes = named("d", shape), sizes_of("d", shape)
    names = [f"s{k}" for k in range(len(op.infos))]
    widths = [i.shape[dim] for i in op.infos]
    sizes.update({n: w for n, w in zip(names, widths, strict=True) if w > 1})
    fixed = [n for n, w in zip(names, widths, strict=True) if w > 1] if any(w <= 1 for w in widths) else []
    return _segmented(op, base, dim, names, widths, sizes, fixed, joined_is_input=False)


def _segmented(
    op: Op, base: Dims, dim: int, names: list[str], widths: list[int], sizes: dict[str, int], fixed: list[str], *, joined_is_input: bool
) -> Signature:
    if any(w <= 1 for w in widths):
        # A part of one row has no name; then the whole dim is one thing that cannot be cut.
        sizes[f"d{dim}"] = sum(widths)
        whole: Dims = tuple(((f"d{dim}",),) if i == dim else d for i, d in enumerate(base))
        fixed = [*fixed, f"d{dim}"]
    else:
        sizes.pop(f"d{dim}", None)
        whole = tuple(tuple((n,) for n in names) if i == dim else d for i, d in enumerate(base))
    parts = [tuple((((n,),) if w > 1 else ()) if i == dim else d for i, d in enumerate(base)) for n, w in zip(names, widths, strict=True)]
    return signature(op, [whole], parts, sizes, fixed) if joined_is_input else signature(op, parts, [whole], sizes, fixed)


def slice_(op: Op) -> Signature:
    """A slice is the middle one of three segments; with a step, or around a single element, the dim cannot be cut."""
    dim, shape = op.dim(), op.infos[0].shape
    base, sizes = named("d", shape), sizes_of("d", shape)
    width = op.out.shape[dim]
    if width == shape[dim]:
        return signature(op, [base], [base], sizes)
    bounds = slice_bounds(op)
    if bounds is None or width <= 1:
        out = tuple((((f"o{i}",),) if width > 1 else ()) if i == dim else d for i, d in enumerate(base))
        sizes.update({f"o{dim}": width} if width > 1 else {})
        return signature(op, [base], [out], sizes, [f"d{dim}", f"o{dim}"])
    pieces = [("before", bounds[0]), ("middle", width), ("after", shape[dim] - bounds[1])]
    pieces = [(n, w) for n, w in pieces if w]
    if any(w == 1 for _, w in pieces):
        out = tuple(((f"o{i}",),) if i == dim else d for i, d in enumerate(base))
        return signature(op, [base], [out], {**sizes, f"o{dim}": width}, [f"d{dim}", f"o{dim}"])
    sizes.pop(f"d{dim}")
    sizes.update(dict(pieces))
    whole = tuple(tuple((n,) for n, _ in pieces) if i == dim else d for i, d in enumerate(base))
    out = tuple((("middle",),) if i == dim else d for i, d in enumerate(base))
    return signature(op, [whole], [out], sizes)


def slice_bounds(op: Op) -> tuple[int, int] | None:
    """Start and stop of a slice with step 1, counted from the front."""
    if op.arguments.get("step", 1) != 1:
        return None
    size = op.infos[0].shape[op.dim()]
    start, stop, _ = slice(op.arguments.get("start"), op.arguments.get("end"), 1).indices(size)
    return start, max(start, stop)


def fixed_dims(dims: Callable[[Op], Sequence[int]], *, keep: bool = True, linear: bool = True) -> Rule:
    """Same shape in and out, some dims uncuttable (flip, roll, cumsum); `keep=False`: those dims vanish (select)."""

    def rule(op: Op) -> Signature:
        shape = op.infos[0].shape
        base = named("d", shape)
        gone = set(dims(op))
        out = tuple(d for i, d in enumerate(base) if keep or i not in gone)
        found = signature(op, [base], [out] * len(op.outs), sizes_of("d", shape), [f"d{i}" for i in gone])
        return found if linear else replace(found, linear=())

    return rule


def squeeze(op: Op) -> Signature:
    before, after = op.infos[0].shape, op.out.shape
    names = [d for d in named("d", before) if d]
    it = iter(names)
    return signature(op, [named("d", before)], [tuple(next(it) if n > 1 else () for n in after)], sizes_of("d", before))


def stack(op: Op) -> Signature:
    dim = int(op.arguments.get("dim", 0)) % len(op.out.shape)
    shape = op.infos[0].shape
    base = named("d", shape)
    new: Dim = (("new",),) if len(op.infos) > 1 else ()
    out = (*base[:dim], new, *base[dim:])
    return signature(op, [base] * len(op.infos), [out], {**sizes_of("d", shape), "new": len(op.infos)}, ["new"])


def repeat(op: Op) -> Signature | None:
    """Tiling: a dim that is tiled becomes (tiles, dim)."""
    before, after = op.infos[0].shape, op.out.shape
    before = (1,) * (len(after) - len(before)) + tuple(before)
    inputs: list[Dim] = []
    out: list[Dim] = []
    sizes: dict[str, int] = {}
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        sizes.update({f"d{i}": a, f"t{i}": b // max(a, 1)})
        inputs.append(((f"d{i}",),) if a > 1 else ())
        names = tuple(n for n in (f"t{i}", f"d{i}") if sizes[n] > 1)
        out.append((names,) if names else ())
    shift = len(after) - len(op.infos[0].shape)
    return signature(op, [tuple(inputs[shift:])], [tuple(out)], {n: s for n, s in sizes.items() if s > 1})


def repeat_interleave(op: Op) -> Signature | None:
    if "self" not in op.arguments or op.arguments.get("dim") is None or not isinstance(op.arguments.get("repeats"), int):
        return None
    dim, shape = op.dim(), op.infos[0].shape
    base, sizes, times = named("d", shape), sizes_of("d", shape), int(op.arguments["repeats"])
    if times == 1:
        return signature(op, [base], [base], sizes)
    inner = tuple(n for n in (f"d{dim}", "copy") if n == "copy" or shape[dim] > 1)
    out = tuple((inner,) if i == dim else d for i, d in enumerate(base))
    return signature(op, [base], [out], {**sizes, "copy": times})


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), reshape),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeeze),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), permuted(_transpose)),
    **dict.fromkeys(("mT", "adjoint", "mH"), permuted(_last_two)),
    **dict.fromkeys(("t", "numpy_T"), permuted(lambda op: list(range(len(op.infos[0].shape)))[::-1])),
    "permute": permuted(_permute),
    "movedim": permuted(_movedim),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), lambda op: expand(op) if len(op.infos) == 1 else None),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy"), split),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    "slice": slice_,
    "select": fixed_dims(lambda op: [op.dim()], keep=False),
    **dict.fromkeys(("unbind", "unbind_copy"), fixed_dims(lambda op: [op.dim()], keep=False)),
    "flip": fixed_dims(lambda op: op.dims("dims")),
    "roll": fixed_dims(lambda op: op.dims("dims")),
    **dict.fromkeys(
        ("cumsum", "tril", "triu"),
        fixed_dims(lambda op: [op.dim()] if "dim" in op.arguments else [-1 % len(op.out.shape), -2 % len(op.out.shape)]),
    ),
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("alias", "detach", "contiguous", "lift_fresh_copy"), fixed_dims(lambda op: ())),
}
"""The rules of operators that only rearrange; the rest of what is known of these is in `graph.operators`."""
