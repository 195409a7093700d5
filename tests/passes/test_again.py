"""What is joined to be computed again, and what is not; steps of models against one device."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.graph.facts import Facts, Info, set_facts
from meshpar.ops import again
from meshpar.passes import order
from meshpar.passes.again import ComputeAgain
from meshpar.proof.static.expanded import expanded
from tests.models import text, tiny

aten = torch.ops.aten


class Made(fx.Graph):
    """A graph whose values are all [2, 8] float32, of one block."""

    def add(self, target: Any, *args: Any, block: str | None = "block", trained: bool = True) -> fx.Node:
        node = self.placeholder(target) if isinstance(target, str) else self.call_function(target, args)
        return set_facts(node, Facts(Info((2, 8), torch.float32, trained), region=block))


def targets(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def gated(*, outside: bool = False, block: str = "block") -> Made:
    """A product, a gate, another product; perhaps somebody else reads the gate."""
    graph = Made()
    x, up, w = graph.add("x"), graph.add("up"), graph.add("w")
    a = graph.add(aten.mm.default, x, w)
    s = graph.add(aten.silu.default, a, block=block)
    y = graph.add(aten.mul.Tensor, s, up)
    z = graph.add(aten.mm.default, y, w)
    graph.output((z, s) if outside else (z,))
    return graph


def test_before_and_after() -> None:
    graph = ComputeAgain(least_bytes=64)(gated())
    graph.lint()
    assert targets(graph) == ["mm.default", "computed", "mm.default"]
    assert targets(expanded(graph)) == targets(gated())


def test_one_value_in_two_places_is_taken_apart() -> None:
    """A later pass may find that two operands are one."""
    graph = ComputeAgain(least_bytes=64)(gated())
    computed = next(n for n in graph.nodes if n.target is again.computed)
    computed.args = (computed.args[0], *[computed.args[1]] * (len(computed.args) - 1))
    assert targets(expanded(graph)) == targets(gated())


@pytest.mark.parametrize("kind", [{"outside": True}, {"block": "other"}])
def test_what_is_read_elsewhere_stays(kind: dict[str, Any]) -> None:
    assert targets(ComputeAgain(least_bytes=1)(gated(**kind))) == targets(gated())


def test_small_gains_are_left() -> None:
    assert targets(ComputeAgain(least_bytes=65)(gated())) == targets(gated()), "64 bytes of silu(a)"


def test_a_sum_is_no_gain() -> None:
    """Nothing is kept of x + y: computing it again would keep both."""
    graph = Made()
    x, y = graph.add(aten.relu.default, graph.add("x"), block=None), graph.add(aten.relu.default, graph.add("y"), block=None)
    total = graph.add(aten.add.Tensor, x, y)
    graph.output((graph.add(aten.sin.default, total),))
    before = targets(graph)
    assert targets(ComputeAgain(least_bytes=1)(graph)) == before


def test_one_of_several_results() -> None:
    """What a call gives beside others is a value of its own; parts of a split are not."""
    graph = Made()
    info = Info((2, 8), torch.float32, True)
    several = set_facts(graph.call_function(aten.native_layer_norm.default, (graph.add("x"),)), Facts((info, info), region="block"))
    a, b = (graph.add(operator.getitem, several, at) for at in (0, 1))
    graph.output((graph.add(aten.mm.default, graph.add(aten.mul.Tensor, graph.add(aten.silu.default, a), b), a),))
    assert targets(ComputeAgain(least_bytes=64)(graph)) == ["native_layer_norm.default", "getitem", "getitem", "computed", "mm.default"]


def test_turned_by_constants() -> None:
    """q * cos + rotated(q) * sin keeps neither q nor anything of it."""
    graph = Made()
    q, cos, sin = graph.add("q"), graph.add("cos", trained=False), graph.add("sin", trained=False)
    turned = graph.add(aten.add.Tensor, graph.add(aten.mul.Tensor, q, cos), graph.add(aten.mul.Tensor, graph.add(aten.neg.default, q), sin))
    graph.output((graph.add(aten.mm.default, turned, q),))
    before = targets(graph)
    assert targets(ComputeAgain(least_bytes=1)(graph)) == before


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("name", "mesh", "config"), [("llama", "tp=2", {"sequence_parallel": True}), ("gpt2", "dp=2", {})])
def test_steps_of_models(monkeypatch: pytest.MonkeyPatch, name: str, mesh: str, config: dict[str, Any]) -> None:
    warnings.filterwarnings("error", message="the static check")
    monkeypatch.setattr(order, "ComputeAgain", lambda: ComputeAgain(least_bytes=1))
    found = mp.verify(tiny(name), mesh, text(), config=mp.ParallelConfig(**config))
    assert max(d.largest for d in found.differences) < 1e-9
    with mp.simulate(2):
        grid = mp.make_mesh(mesh)
        pm = mp.parallelize(tiny(name), grid, example=mp.local_batch(text(), grid), config=mp.ParallelConfig(**config))
        blocks = [n for n in pm._first.graph.nodes if n.target is again.computed]
    assert len(blocks) >= 2, "activations of two layers"
