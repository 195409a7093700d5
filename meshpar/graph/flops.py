"""Floating-point operations of one call, forward: two per multiply-add. What a row of the table of operators says of its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from meshpar.graph.facts import info_of
from meshpar.graph.op import Op

Flops = Callable[[Op], float]


def product(factor: int = 0) -> Flops:
    """A matrix product: every element of the result sums over the last dim of operand `factor`."""
    return lambda op: 2 * prod(op.out.shape) * (op.shapes[factor] or (1,))[-1]


def products(op: Op) -> float:
    """Several products of one value. (A last result may be that value itself.)"""
    weights: Any = op.node.args[1]
    return sum(2 * prod(out.shape) * op.shapes[0][-1] for out, _ in zip(op.outs, weights) if out is not None)


def reduced_product(op: Op) -> float:
    """A product of which a rank gets its rows of the sum: it computes all of them."""
    return 2 * prod(op.shapes[0]) * op.shapes[1][0]


def through_experts(op: Op) -> float:
    """The products of every row with a matrix of its expert."""
    return _of_rows(op, op.shapes[0][0], op.node.args[1:])


def on_gathered_tokens(op: Op) -> float:
    """The same of the rows of every token of all ranks, one for each of its choices."""
    index: Any = op.node.args[2]
    return _of_rows(op, prod(info_of(index).shape), (None, None, *op.node.args[5:]))


def _of_rows(op: Op, rows: int, known: Sequence[Any]) -> float:
    """`known`: what steps read, by number."""
    steps: Any = op.node.args[0]
    matrices = [known[int(args[1][1:])] for name, args, _ in steps if name.startswith("meshpar.grouped_mm.")]
    return 2 * rows * sum(prod(info_of(matrix).shape[1:]) for matrix in matrices)


def einsum(op: Op) -> float:
    """Every combination of indices once, whatever is done first."""
    sizes: dict[str, int] = {}
    for term, shape in zip(str(op.arguments["equation"]).replace(" ", "").partition("->")[0].split(","), op.shapes, strict=True):
        for name, n in zip(spelled(term, len(shape)), shape, strict=True):
            sizes[name] = max(n, sizes.get(name, 1))
    return 2 * prod(sizes.values())


def spelled(term: str, rank: int) -> list[str]:
    """A term of an einsum, letter by letter; the dims of "..." are counted from the right."""
    before, dots, after = term.partition("...")
    more = rank - len(before) - len(after)
    return [*before, *(f"dots{more - i}" for i in range(more if dots else 0)), *after]


def bilinear(op: Op) -> float:
    """`x1 W x2` for every element of the result."""
    return 2 * prod(op.out.shape) * prod(op.shapes[2][1:])


def convolution(op: Op) -> float:
    """Every element of the result sums over a window; of a transposed one, every element of the operand is spread over it."""
    return _spread(op) if op.arguments.get("transposed") else 2 * prod(op.out.shape) * _window(op.shapes)


def transposed_convolution(op: Op) -> float:
    return _spread(op)


def _spread(op: Op) -> float:
    return 2 * prod(op.shapes[0]) * _window(op.shapes)


def _window(shapes: Sequence[Sequence[int]]) -> int:
    return prod(shapes[1][1:])


def attention(op: Op) -> float:
    """Every pair of positions, masked or not."""
    query, key, value = op.shapes[:3]
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def windowed_attention(op: Op) -> float:
    """Of each query with as many keys as its window has, or all."""
    query, key, value = op.shapes[:3]
    window = op.arguments.get("window")
    return 2 * prod(query[:-1]) * int(key[-2] if window is None else window) * (query[-1] + value[-1])


def ring_attention(op: Op) -> float:
    """Each query meets the keys of every rank."""
    return attention(op) * int(op.arguments["size"])
