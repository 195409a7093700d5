"""Weight gradients beside collectives: the same bits, computed between the start of the collective and its end, and proved."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import meshpar as mp
from meshpar.graph.facts import Change, Facts, Info, info_of, set_facts
from meshpar.ops import collectives, primitives, products
from meshpar.passes import order
from meshpar.passes.products import HideGradientSums
from meshpar.proof.static import beside
from meshpar.proof.static.report import Contradiction
from meshpar.sharding.types import I, R
from meshpar.simulate import local_tensors, simulate
from tests.models import text, tiny

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have small messages."""
    monkeypatch.setattr(order, "HideGradientSums", partial(HideGradientSums, least_bytes=0))


def step(name: str, mesh: str, dtype: torch.dtype, **config: Any) -> tuple[list[Tensor], str, list[tuple[str, str, float]]]:
    """What every simulated rank has of every gradient, the code, and what is sent."""
    torch.manual_seed(0)
    model = tiny(name).to(dtype)
    with simulate(4 if "," in mesh else 2):
        pm = mp.parallelize(model, mp.make_mesh(mesh), example=text(), config=mp.ParallelConfig(**config))
        pm.train_step(**text())
        found = [g for p in pm.parameters() for g in local_tensors(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).values()]
        return found, pm.print_readable(), sorted((c.kind, c.phase, c.nbytes) for c in pm.comms())


CASES = [
    ("llama", "tp=2", torch.bfloat16, {"recompute": "full"}),
    ("llama", "tp=2", torch.float32, {"recompute": "selective", "sequence_parallel": False}),
    ("gpt2", "dp=2,tp=2", torch.float32, {"sequence_parallel": False}),
    ("mixtral", "ep=2,tp=2", torch.float32, {}),
]


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("error:the static check")
@pytest.mark.parametrize(("name", "mesh", "dtype", "config"), CASES)
def test_gradients_are_the_same_bits_and_no_more_is_sent(name: str, mesh: str, dtype: torch.dtype, config: dict[str, Any]) -> None:
    hidden, code, sent = step(name, mesh, dtype, **config)
    plain, before, before_sent = step(name, mesh, dtype, overlap_tensor_parallel=False, **config)
    assert "products" in code and "products" not in before
    assert sent == before_sent
    assert all(torch.equal(a, b) for a, b in zip(hidden, plain, strict=True))


def test_weight_gradients_are_computed_while_the_sum_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    begin, run = primitives.begin, products.Beside.run

    def started(op: Any, *args: Any) -> Any:
        finish = begin(op, *args)
        ran.append("start")
        return lambda: ran.append("finish") or finish()

    monkeypatch.setattr(primitives, "begin", started)
    monkeypatch.setattr(products.Beside, "run", lambda self, count: ran.append(f"{len(self.work)} of {count}") or run(self, count))
    x, weights = torch.randn(4, 3, requires_grad=True), tuple(torch.randn(5, 3, requires_grad=True) for _ in range(2))
    with simulate(2):
        group = mp.make_mesh("tp=2").get_group("tp").group_name
        later = products.beside()
        y = products.i_to_r(x, later, weights, group=group, size=2, rank=-1)
        z = sum(products.linear(y, w, None, later, i).sum() for i, w in enumerate(weights))
        z.backward()
    assert ran == ["start", "2 of 2", "finish"]
    assert all(w.grad is not None for w in weights)


def graph_of(block: str | None = "block") -> tuple[fx.Graph, list[fx.Node]]:
    """norm, conversion, two products of one value, and one of theirs."""
    graph = fx.Graph()

    def made(node: fx.Node, *shape: int, region: str | None = block, **known: Any) -> fx.Node:
        return set_facts(node, Facts(Info(shape, torch.float32, True), region=region, **known))

    x = made(graph.placeholder("x"), 4, 8, region=None)
    wa, wb, wd = (made(graph.get_attr(name), *shape) for name, shape in (("a", (6, 8)), ("b", (6, 8)), ("d", (8, 6))))
    change = summed(x)
    y = made(graph.call_function(collectives.i_to_r, (x,), {"group": "0", "size": 2, "rank": 0}), 4, 8, conversion=change)
    a = made(graph.call_function(aten.linear.default, (y, wa)), 4, 6)
    b = made(graph.call_function(aten.linear.default, (y, wb)), 4, 6)
    c = made(graph.call_function(aten.mul.Tensor, (a, b)), 4, 6)
    d = made(graph.call_function(aten.linear.default, (c, wd)), 4, 8)
    graph.output((d,))
    return graph, [y, a, b, d]


def summed(x: fx.Node) -> Change:
    return Change("tp", 2, I, R, info_of(x))


def test_all_products_of_a_block_behind_one_conversion_leave_their_gradients_to_it() -> None:
    graph, (y, a, b, d) = graph_of()
    HideGradientSums(least_bytes=0)(graph)
    graph.lint()
    assert y.target is products.i_to_r
    assert [w.target for w in y.args[2]] == ["d", "b", "a"]  # type: ignore[union-attr]
    assert [(n.target, n.args[-1]) for n in (a, b, d)] == [(products.linear, 2), (products.linear, 1), (products.linear, 0)]
    for node in (a, b, d):
        beside.check(node)


def test_small_messages_are_left_alone() -> None:
    graph, nodes = graph_of()
    HideGradientSums(least_bytes=4 * 8 * 4 + 1)(graph)
    assert nodes[0].target is collectives.i_to_r


def test_a_product_of_another_block_is_left_alone() -> None:
    graph, (_, a, b, d) = graph_of()
    for node in (b, d):
        set_facts(node, Facts(Info((4, 6), torch.float32, True), region="other"))
    HideGradientSums(least_bytes=0)(graph)
    assert [n.target for n in (a, b, d)] == [products.linear, aten.linear.default, aten.linear.default]


@pytest.mark.parametrize("fault", ["number", "weight", "owner", "way"])
def test_the_static_proof_finds_gradients_that_are_left_to_nobody(fault: str) -> None:
    graph, (y, a, _, _) = graph_of()
    HideGradientSums(least_bytes=0)(graph)
    if fault == "number":
        a.args = (*a.args[:-1], 1)
    elif fault == "weight":
        y.args = (*y.args[:2], y.args[2][::-1])  # type: ignore[index]
    elif fault == "owner":
        y.args, y.target = y.args[:1], collectives.i_to_r
    else:
        a.args = (y.args[0], *a.args[1:])
    with pytest.raises(Contradiction, match="the gradient of its weight"):
        beside.check(a)
