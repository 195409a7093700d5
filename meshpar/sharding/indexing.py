"""Rules of operators that find, put and count by an index."""

from __future__ import annotations

import torch

from meshpar.graph.op import Op
from meshpar.sharding.notation import Dims, Signature
from meshpar.sharding.rules import row
from meshpar.sharding.views import named, sizes_of


def embedding(op: Op) -> Signature | None:
    """Gradients scaled by how often an id occurs need all ids and the whole table."""
    return None if op.arguments["scale_grad_by_freq"] else row("v c, ... -> ... c")(op)


def index(op: Op) -> Signature | None:
    """`x[:, i, j]`: the dims without an index keep their names, the indexed ones are needed whole."""
    given = [a for a in op.arguments["indices"]]
    places = [i for i, a in enumerate(given) if a is not None]
    if not places or places != list(range(places[0], places[-1] + 1)) or any(i.dtype == torch.bool for i in op.infos[1 : 1 + len(places)]):
        return None
    shape = op.infos[0].shape
    rank = max(len(i.shape) for i in op.infos[1 : 1 + len(places)])
    new = op.out.shape[places[0] : places[0] + rank]
    base, at = named("d", shape), named("n", new)
    out = (*base[: places[0]], *at, *base[places[-1] + 1 :])
    indices = [tuple(at[rank - len(i.shape) + k] if n > 1 else () for k, n in enumerate(i.shape)) for i in op.infos[1 : 1 + len(places)]]
    values = [out[len(out) - len(i.shape) :] for i in op.infos[1 + len(places) :]]
    if values:
        return None
    fixed = [f"d{i}" for i in places]
    return Signature((base, *indices), (out,), {**sizes_of("d", shape), **sizes_of("n", new)}, frozenset(fixed), (frozenset({0}),))


def index_select(op: Op) -> Signature:
    dim, shape = op.dim(), op.infos[0].shape
    base = named("d", shape)
    out = tuple(((("n",),) if op.out.shape[dim] > 1 else ()) if i == dim else d for i, d in enumerate(base))
    lookup = ((("n",),) if op.infos[1].shape and op.infos[1].shape[0] > 1 else (),) if op.infos[1].shape else ()
    return Signature((base, lookup), (out,), {**sizes_of("d", shape), "n": op.out.shape[dim]}, frozenset({f"d{dim}"}), (frozenset({0}),))


def gather(op: Op) -> Signature | None:
    """gather and take_along_dim: other dims may be cut where index and source have the same size."""
    if op.arguments["dim"] is None:
        return None
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    base = tuple(
        d if i != dim and shape[i] == other[i] else ((f"x{i}",),) if n > 1 else () for i, (d, n) in enumerate(zip(named("d", shape), shape))
    )
    out = tuple(((f"d{i}",),) if n > 1 and i != dim and shape[i] == n else ((f"n{i}",),) if n > 1 else () for i, n in enumerate(other))
    sizes = {**sizes_of("d", shape), **sizes_of("x", shape), **sizes_of("n", other)}
    fixed = frozenset(n for n in sizes if n[0] in "xn")
    return Signature((base, out), (out,), sizes, fixed, (frozenset({0}),))


def scatter(op: Op) -> Signature | None:
    dim, shape, other = op.dim(), op.infos[0].shape, op.infos[1].shape
    if any(shape[i] != other[i] for i in range(len(shape)) if i != dim) or len(op.infos) > 3:
        return None
    base = named("d", shape)
    at = tuple((((f"n{i}",),) if n > 1 else ()) if i == dim else base[i] for i, n in enumerate(other))
    inputs = [base, at, *([at] if len(op.infos) > 2 else [])]
    linear = (frozenset({0, 2}),) if op.name == "scatter_add" else ()
    return Signature(tuple(inputs), (base,), {**sizes_of("d", shape), f"n{dim}": other[dim]}, frozenset({f"d{dim}", f"n{dim}"}), linear)


def index_add(op: Op) -> Signature:
    """Rows added to a tensor at places along one dim, which is needed whole."""
    dim, shape = op.dim(), op.infos[0].shape
    base, count = named("d", shape), op.infos[2].shape[dim] if shape else 1
    rows = (("n",),) if count > 1 else ()
    inputs = (base, (rows,) if op.shapes[1] else (), (*base[:dim], rows, *base[dim + 1 :]))
    return Signature(inputs, (base,), {**sizes_of("d", shape), "n": count}, frozenset({f"d{dim}", "n"}), (frozenset({0, 2}),))


def differences(op: Op) -> Signature:
    """diff: along one dim, which is needed whole, as is what is put before and after."""
    dim, shape = op.dim(), op.infos[0].shape
    base = named("d", shape)

    def along(prefix: str, n: int) -> Dims:
        return (*base[:dim], ((f"{prefix}{dim}",),) if n > 1 else (), *base[dim + 1 :])

    inputs = [base, *(along(f"x{i}_", other[dim]) for i, other in enumerate(op.shapes[1:]))]
    sizes = {**sizes_of("d", shape), f"n{dim}": op.out.shape[dim]}
    sizes |= {f"x{i}_{dim}": other[dim] for i, other in enumerate(op.shapes[1:])}
    cut = frozenset(name for name in sizes if name[0] in "xn" or name == f"d{dim}")
    return Signature(tuple(inputs), (along("n", op.out.shape[dim]),), sizes, cut)


def written(op: Op) -> Signature:
    """slice_scatter, select_scatter: one tensor with a part of one dim, which is needed whole, replaced by another."""
    dim, shape = op.dim(), op.infos[0].shape
    base, part = named("d", shape), op.infos[1].shape
    new = (((f"n{dim}",),) if part[dim] > 1 else ()) if len(part) == len(shape) else None
    source = (*base[:dim], *([new] if new is not None else []), *base[dim + 1 :])
    sizes = sizes_of("d", shape) | ({f"n{dim}": part[dim]} if new else {})
    return Signature((base, source), (base,), sizes, frozenset({f"d{dim}", f"n{dim}"}), (frozenset({0, 1}),))


def one_hot(op: Op) -> Signature:
    shape = op.infos[0].shape
    base = named("d", shape)
    return Signature((base,), ((*base, (("classes",),)),), {**sizes_of("d", shape), "classes": op.out.shape[-1]}, frozenset({"classes"}))


def searched(op: Op) -> Signature:
    """topk, sort, argsort: along one dim, which is needed whole."""
    shape = op.infos[0].shape
    dim = op.dim() if "dim" in op.arguments else len(shape) - 1
    base = named("d", shape)
    new = op.out.shape[dim]
    out = tuple((((f"n{i}",),) if new > 1 else ()) if i == dim else d for i, d in enumerate(base))
    return Signature((base,), (out,) * len(op.outs), {**sizes_of("d", shape), f"n{dim}": new}, frozenset({f"d{dim}", f"n{dim}"}))
