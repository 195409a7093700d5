"""What a node costs: floating-point operations and bytes moved, from the shapes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

import meshpar.ops.experts  # noqa: F401  (registers meshpar::grouped_mm)
from meshpar.graph.facts import infos_of
from meshpar.ops import context, halo, ring

aten = torch.ops.aten


def flops(node: fx.Node) -> float:
    """Floating-point operations of one node, forward: two per multiply-add of matrix products, attention and convolutions, else 0.

    Attention counts every pair of positions, masked or not.
    """
    count = _FLOPS.get(node.target) if node.op == "call_function" else None
    return float(count(node)) if count else 0.0


def nbytes(node: fx.Node) -> float:
    """Bytes one node reads and writes, forward: its operands and its results, once each; 0 for a view."""
    if node.op != "call_function" or node.target in _FREE:
        return 0.0
    return float(sum(_bytes(source) for source in node.all_input_nodes) + _bytes(node))


def _bytes(node: fx.Node) -> int:
    return sum(i.nbytes for i in infos_of(node) if i is not None)


def _shape(value: Any) -> tuple[int, ...]:
    return next(i for i in infos_of(value) if i is not None).shape


def _product(operand: int) -> Callable[[fx.Node], int]:
    """A matrix product: every element of the result sums over the last dim of `args[operand]`."""
    return lambda node: 2 * prod(_shape(node)) * (_shape(node.args[operand]) or (1,))[-1]


def _convolution(node: fx.Node) -> int:
    weight = _shape(node.args[1])
    return 2 * prod(_shape(node)) * prod(weight[1:])


def _transposed_convolution(node: fx.Node) -> int:
    weight = _shape(node.args[1])
    return 2 * prod(_shape(node.args[0])) * prod(weight[1:])


def _any_convolution(node: fx.Node) -> int:
    return _transposed_convolution(node) if node.args[6] else _convolution(node)


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(part) for part in node.args[:3])
    pairs = prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def _windowed_attention(node: fx.Node) -> int:
    """Of each query with as many keys as its window has."""
    query, value = _shape(node.args[0]), _shape(node.args[2])
    return 2 * prod(query[:-1]) * int(node.kwargs["window"]) * (query[-1] + value[-1])  # type: ignore[arg-type]


_FLOPS: Mapping[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _product(0),
    aten.matmul.default: _product(0),
    aten.mm.default: _product(0),
    aten.bmm.default: _product(0),
    aten.mv.default: _product(0),
    aten.dot.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    aten.addbmm.default: _product(1),
    aten.scaled_dot_product_attention.default: _attention,
    context.causal_attention: _attention,
    **dict.fromkeys((halo.windowed_attention, halo.halo_attention), _windowed_attention),
    ring.ring_attention: lambda node: _attention(node) * int(node.kwargs["size"]),  # type: ignore[arg-type]
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.convolution.default: _any_convolution,
    torch.ops.meshpar.grouped_mm.default: _product(0),
}

_FREE = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.detach.default,
        aten.alias.default,
        aten.diagonal.default,
        aten.unfold.default,
    }
)
"""Views: they move nothing. (A reshape that must copy is rare, and its bytes are those of its neighbour.)"""
