"""Values that are cut over a data axis: which of them are a rank's own samples."""

from __future__ import annotations

import torch
from torch import fx

from meshpar.compile.samples import of_own_samples
from meshpar.plan import AxisPlan, NodePlan
from meshpar.sharding.types import I, Shard, Type

ROWS, COLUMNS = Shard(0, 1, ((4, 1),)), Shard(1, 1, ((4, 1),))


def outputs(*calls: tuple[Type, Type, Type | None]) -> tuple[bool, ...]:
    """A chain of calls on a batch that is cut by rows: for each the type it uses, that of its result, and that in which it is handed on."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    nodes = {"x": NodePlan((), (ROWS,), "input")}
    for use, out, handed in calls:
        value = graph.call_function(torch.relu, (value,))
        nodes[value.name] = NodePlan((use,), (out,), "", (handed,) if handed else ())
    graph.output((value,))
    use, out, handed = calls[-1]
    return of_own_samples(graph, AxisPlan("dp", 2, nodes, (handed or out,)))


def test_what_follows_the_samples_is_of_samples() -> None:
    assert outputs((ROWS, ROWS, None)) == (True,)
    assert outputs((ROWS, COLUMNS, None), (COLUMNS, COLUMNS, None)) == (True,)  # transposed: its columns are the samples


def test_what_was_gathered_or_exchanged_is_not() -> None:
    assert outputs((I, ROWS, None)) == (False,)
    assert outputs((ROWS, ROWS, None), (COLUMNS, COLUMNS, None)) == (False,)  # features of all samples
    assert outputs((ROWS, ROWS, COLUMNS)) == (False,)
    assert outputs((I, COLUMNS, None), (COLUMNS, COLUMNS, None)) == (False,)
    assert outputs((ROWS, I, None)) == (False,)
