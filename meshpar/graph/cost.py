"""What a node costs: floating-point operations and bytes moved, from the shapes of a captured graph."""

from __future__ import annotations

from torch import fx

from meshpar.graph.facts import infos_of
from meshpar.graph.op import read
from meshpar.graph.operators import operator_of


def flops(node: fx.Node) -> float:
    """Floating-point operations of one node, forward: two per multiply-add of matrix products, attention and convolutions, else 0.

    Attention counts every pair of positions, masked or not.
    """
    count = operator_of(node.target).flops if node.op == "call_function" else None
    return float(count(read(node))) if count else 0.0


def nbytes(node: fx.Node) -> float:
    """Bytes one node reads and writes, forward: its operands and its results, once each; 0 for a view.

    Of a table that is looked up in, only the rows that are found: read, and written.
    """
    if node.op != "call_function" or (row := operator_of(node.target)).view:
        return 0.0
    return 2.0 * _bytes(node) if row.kind == "lookup" else float(sum(_bytes(source) for source in node.all_input_nodes) + _bytes(node))


def _bytes(node: fx.Node) -> int:
    return sum(i.nbytes for i in infos_of(node) if i is not None)
