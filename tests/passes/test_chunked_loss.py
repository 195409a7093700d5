"""Losses in chunks: what is rewritten, what is not, and steps of models against one device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.ops import chunked_loss
from meshpar.passes.chunked_loss import ChunkLoss
from meshpar.proof.static.expanded import expanded
from tests.models import text, tiny
from tests.pool import Pool

aten = torch.ops.aten


def graph_of(*, reader: bool = False) -> fx.Graph:
    """A product, its slice, a cast, one matrix, and the loss; perhaps another reader of the logits."""
    graph = fx.Graph()

    def made(node: fx.Node, dtype: torch.dtype, *shape: int) -> fx.Node:
        return set_facts(node, Facts(Info(shape, dtype, dtype != torch.int64)))

    x, target = made(graph.placeholder("x"), torch.bfloat16, 2, 8, 4), made(graph.placeholder("target"), torch.int64, 14)
    weight = made(graph.get_attr("weight"), torch.bfloat16, 16, 4)
    y = made(graph.call_function(aten.linear.default, (x, weight)), torch.bfloat16, 2, 8, 16)
    cut = made(graph.call_function(aten.slice.Tensor, (y, 1, 0, -1)), torch.bfloat16, 2, 7, 16)
    wide = made(graph.call_function(aten._to_copy.default, (cut,), {"dtype": torch.float32}), torch.float32, 2, 7, 16)
    rows = made(graph.call_function(aten.view.default, (wide, [-1, 16])), torch.float32, 14, 16)
    loss = made(graph.call_function(aten.cross_entropy_loss.default, (rows, target, None, 2)), torch.float32)
    graph.output((loss, y) if reader else (loss,))
    return graph


def targets(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def test_before_and_after() -> None:
    graph = ChunkLoss(5 * 16 * 4)(graph_of())
    graph.lint()
    assert targets(graph) == ["cross_entropy"]
    (loss,) = (n for n in graph.nodes if n.target is chunked_loss.cross_entropy)
    assert loss.args[5:7] == (5, torch.float32), "rows at a time, and what they are cast to"
    assert targets(expanded(graph)) == [name.replace("view", "reshape") for name in targets(graph_of())]


def test_what_else_is_read_is_there_at_once() -> None:
    before = targets(graph_of(reader=True))
    assert targets(ChunkLoss(1)(graph_of(reader=True))) == before


def verified(name: str, mesh: str, config: dict[str, Any]) -> tuple[float, bool]:
    """The largest difference from one device, and whether the loss of a step is in chunks."""
    warnings.filterwarnings("error", message="the static check")
    grid, config = mp.make_mesh(mesh), {"logits_bytes": 2000, **config}
    found = mp.verify(tiny(name), grid, text(), config=mp.ParallelConfig(**config))
    pm = mp.parallelize(tiny(name), grid, example=text(), config=mp.ParallelConfig(**config))
    program = pm._first
    graphs = [stage.graph for stage in program.stages] or [program.step.graph]
    return max(d.largest for d in found.differences), any(n.target is chunked_loss.cross_entropy for g in graphs for n in g.nodes)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("name", "mesh", "config"),
    [
        ("llama", "tp=2", {"sequence_parallel": True}),
        ("gpt2", "dp=2", {}),
        ("llama", "pp=2", {"microbatches": 2, "schedule": "zero-bubble"}),
    ],
)
def test_steps_of_models(gloo: Pool, name: str, mesh: str, config: dict[str, Any]) -> None:
    found = gloo.run(verified, name, mesh, config, world=2, timeout=180.0)
    assert max(worst for worst, _ in found) < 1e-9
    assert any(chunked for _, chunked in found)
