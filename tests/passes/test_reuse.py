"""All-reduces in place: only what nothing else reads, and the same numbers on real ranks, under every kind of recompute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.ops import collectives
from meshpar.passes.reuse import Reuse
from tests.models import plain, text, tiny
from tests.passes.graphs import info, put
from tests.pool import Pool

aten = torch.ops.aten
AXIS = {"group": "tp", "size": 2, "rank": 0}


def call(graph: fx.Graph, target: Any, *args: Any, region: str | None = "block") -> fx.Node:
    node = put(graph, "call_function", target, args, info(4, 4), region=region)
    node.kwargs = AXIS if target in (collectives.p_to_i, collectives.i_to_r) else {}
    return node


def marked(graph: fx.Graph, *outputs: fx.Node, **options: bool) -> list[bool]:
    """Of every conversion in order, whether it may reuse memory."""
    graph.output(outputs)
    graph = Reuse(**options)(graph)
    graph.lint()
    return [bool(n.kwargs.get("reuse")) for n in graph.nodes if n.target in (collectives.p_to_i, collectives.i_to_r)]


def start() -> tuple[fx.Graph, fx.Node, fx.Node]:
    graph = fx.Graph()
    return graph, put(graph, "placeholder", "x", (), info(4, 4)), put(graph, "get_attr", "w", (), info(4, 4))


def test_a_product_that_only_its_sum_reads() -> None:
    graph, x, w = start()
    total = call(graph, collectives.p_to_i, call(graph, aten.linear.default, x, w))
    assert marked(graph, total) == [True]


def test_products_whose_results_recompute_keeps() -> None:
    graph, x, w = start()
    total = call(graph, collectives.p_to_i, call(graph, aten.linear.default, x, w))
    assert marked(graph, total, results=False) == [False]


def test_a_product_that_something_else_reads() -> None:
    graph, x, w = start()
    product = call(graph, aten.linear.default, x, w)
    assert marked(graph, call(graph, collectives.p_to_i, product), call(graph, aten.relu.default, product)) == [False]


def test_a_product_of_another_block() -> None:
    graph, x, w = start()
    product = call(graph, aten.linear.default, x, w, region="before")
    assert marked(graph, call(graph, collectives.p_to_i, product)) == [False]


def test_what_is_no_product() -> None:
    graph, x, _ = start()
    assert (
        marked(graph, call(graph, collectives.p_to_i, call(graph, aten.relu.default, x)), call(graph, collectives.p_to_i, x)) == [False] * 2
    )


def test_gradients_of_products_alone() -> None:
    graph, x, w = start()
    r = call(graph, collectives.i_to_r, x)
    seen = call(graph, aten.transpose.int, r, 0, 1)
    assert marked(graph, call(graph, aten.linear.default, r, w), call(graph, aten.mm.default, seen, w)) == [True]


@pytest.mark.parametrize(
    ("target", "args"),
    [(aten.slice.Tensor, (0, 0, 2)), (aten.squeeze.dims, ([0],)), (aten.expand.default, ([4, 4],)), (aten.select.int, (0, 1))],
    ids=str,
)
def test_gradients_through_any_view(target: Any, args: tuple[Any, ...]) -> None:
    """What is a view is said once: some passed here and others did not."""
    graph, x, w = start()
    seen = call(graph, target, call(graph, collectives.i_to_r, x), *args)
    assert marked(graph, call(graph, aten.linear.default, seen, w)) == [True]


@pytest.mark.parametrize(("target", "place"), [(aten.add.Tensor, 0), (aten.addmm.default, 0), (aten.linear.default, 2)])
def test_a_gradient_that_may_be_another_ones_too(target: Any, place: int) -> None:
    """The gradient of a sum goes to both summands as one tensor."""
    graph, x, w = start()
    r = call(graph, collectives.i_to_r, x)
    args: list[Any] = [x, w, w][: 2 if target is aten.add.Tensor else 3]
    args[place] = r
    assert marked(graph, call(graph, target, *args), call(graph, aten.linear.default, r, w)) == [False]


def test_a_value_that_leaves_the_graph_and_one_that_nothing_reads() -> None:
    graph, x, w = start()
    leaves, unread = call(graph, collectives.i_to_r, x), call(graph, collectives.i_to_r, x)
    assert marked(graph, leaves, call(graph, aten.linear.default, leaves, w)) == [False, False]
    assert not unread.users


def on_ranks(names: list[str], recompute: str) -> dict[str, tuple[int, str]]:
    """Per model, how many conversions reuse memory, and what verify has to say."""
    mesh = mp.make_mesh("tp=2")
    config = mp.ParallelConfig(sequence_parallel=False, recompute=recompute)  # type: ignore[arg-type]
    found = {}
    for name in names:
        model, batch = plain(name) if name.startswith("gpt_") else (tiny(name), text())
        report = mp.verify(model, mesh, batch, config=config)
        pm = mp.parallelize(model, mesh, example=batch, config=config)
        found[name] = pm.print_readable().count("reuse = True"), "" if report.ok else str(report)
    return found


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("recompute", "names"), [("none", ["falcon"]), ("selective", ["llama"])])
def test_on_real_ranks(gloo: Pool, recompute: str, names: list[str]) -> None:
    for result in gloo.run(on_ranks, names, recompute, world=2, timeout=240):
        for name, (count, failure) in result.items():
            assert not failure, (name, failure)
            assert count > 0, f"{name} reuses no memory: nothing was tested"
