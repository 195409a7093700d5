"""Experts beside the exchange of their rows: models on real ranks, what is sent, and what is left alone."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.compile.ledger import ledger
from meshpar.graph.facts import Exchange, Facts, Info, facts, info_of, set_facts
from meshpar.ops import again, expert_all_to_all
from meshpar.ops.expert_pieces import through_experts
from meshpar.passes import order
from meshpar.passes.experts_in_pieces import CutExpertsIntoPieces
from meshpar.proof.static.expanded import expanded
from meshpar.sharding.price import Price
from tests.models import text, tiny
from tests.pool import Pool

aten = torch.ops.aten


def verified(name: str, mesh: str, **config: Any) -> tuple[float, int, list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The largest difference from one device, the calls in pieces, and what is sent with them and without."""
    warnings.filterwarnings("error", message="the static check")
    real, grid, sent = order.CutExpertsIntoPieces, mp.make_mesh(mesh), []
    found = calls = None
    try:
        for least in (0, 2**60):
            order.CutExpertsIntoPieces = partial(CutExpertsIntoPieces, least_bytes=least)  # type: ignore[misc, assignment]
            pm = mp.parallelize(tiny(name), grid, example=text(), config=mp.ParallelConfig(**config))
            sent.append([(c.kind, c.axis, c.phase, c.nbytes, c.count) for c in pm.comms()])
            if calls is None:
                calls = pm.print_readable().count("through_experts(")
                found = mp.verify(tiny(name), grid, text(), config=mp.ParallelConfig(**config))
    finally:
        order.CutExpertsIntoPieces = real  # type: ignore[misc]
    assert found is not None
    assert calls is not None
    return max(d.largest for d in found.differences), calls, sorted(sent[0]), sorted(sent[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [("gpt_oss", "ep=2")])
def test_models(gloo: Pool, name: str, mesh: str) -> None:
    for worst, calls, cut, whole in gloo.run(verified, name, mesh, world=2, timeout=240.0):
        assert worst < 1e-9
        assert calls > 0
        assert cut == whole, "as many bytes, in the same phases"


ROWS = Info((8, 4), torch.float32, True)


def graph_of(change: Callable[[fx.Graph, dict[str, fx.Node]], None] | None = None) -> fx.Graph:
    """Rows are sent, go through a product, a gate and another product, and return."""
    graph, where, named = fx.Graph(), {"group": "0", "size": 2, "rank": 0}, dict[str, fx.Node]()

    def made(name: str, node: fx.Node, info: Any = ROWS, **known: Any) -> fx.Node:
        named[name] = set_facts(node, Facts(info, region="block", **known))
        return node

    number = partial(Info, dtype=torch.int64, requires_grad=False)
    ends = Info((4,), torch.int32, False)
    x, offsets = made("x", graph.placeholder("x")), made("offsets", graph.placeholder("offsets"), ends)
    w, v = (made(name, graph.get_attr(name), Info((2, 4, 4), torch.float32, True)) for name in "wv")
    infos = (ROWS, Info((2,), torch.int32, False), number((2, 3)), number((8,)), number((8,)))
    exchange = Exchange("ep", 2, ROWS)
    sent = made("sent", graph.call_function(expert_all_to_all.send_rows, (x, offsets), where), infos, exchange=exchange)
    rows, here, *route = (made(f"item{k}", graph.call_function(operator.getitem, (sent, k)), info) for k, info in enumerate(infos))
    up = made("up", graph.call_function(torch.ops.meshpar.grouped_mm.default, (rows, w, here)))
    gate = made("gate", graph.call_function(aten.silu.default, (up,)))
    h = made("h", graph.call_function(aten.mul.Tensor, (gate, up)))
    down = made("down", graph.call_function(torch.ops.meshpar.grouped_mm.default, (h, v, here)))
    y = made("y", graph.call_function(expert_all_to_all.return_rows, (down, *route), where), exchange=exchange)
    graph.output((y,))
    if change is not None:
        change(graph, named)
    return graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_before_and_after() -> None:
    graph = CutExpertsIntoPieces(least_bytes=0)(graph_of())
    assert targets(graph) == [through_experts]
    (call,) = (node for node in graph.nodes if node.op == "call_function")
    assert [step[0] for step in call.args[0]] == [
        *("meshpar.grouped_mm.default", "aten.silu.default", "aten.mul.Tensor", "meshpar.grouped_mm.default"),
    ]
    assert [n.name for n in call.args[1:]] == ["x", "offsets", "w", "v"]


def test_a_proof_reads_what_it_was() -> None:
    graph = graph_of()
    before = [(node.target, facts(node).info, facts(node).exchange) for node in graph.nodes if node.op == "call_function"]
    again_ = expanded(CutExpertsIntoPieces(least_bytes=0)(graph))
    assert [(node.target, facts(node).info, facts(node).exchange) for node in again_.nodes if node.op == "call_function"] == before


def test_cheap_operators_among_them_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshpar.passes import experts_in_pieces

    monkeypatch.setattr(experts_in_pieces, "ComputeAgain", partial(experts_in_pieces.ComputeAgain, least_bytes=1))
    graph = CutExpertsIntoPieces(least_bytes=0)(graph_of())
    (call,) = (node for node in graph.nodes if node.op == "call_function")
    assert [step[0] for step in call.args[0]][1] == "meshpar.ops.again.computed"
    assert targets(expanded(graph)) == targets(graph_of()) and again.computed not in targets(expanded(graph))


def test_the_ledger_and_what_is_waited_for() -> None:
    whole, cut = graph_of(), CutExpertsIntoPieces(least_bytes=0)(graph_of())
    slow, fast = (Price(flops=flops, latency=0.0) for flops in (1e3, 1e30))
    for price in (slow, fast):
        sent = [[(c.kind, c.phase, c.nbytes, c.seconds) for c in ledger(graph, price)] for graph in (whole, cut)]
        assert sorted(sent[0]) == sorted(sent[1])
    rows = [c for c in ledger(cut, slow) if c.node != "numbers of rows"]
    assert len(rows) == 4 and all(c.exposed == 0 for c in rows)
    assert all(c.exposed == c.seconds for c in [*ledger(cut, fast), *ledger(whole, slow)])
    assert [c.exposed == c.seconds for c in ledger(cut, slow) if c.node == "numbers of rows"] == [True]


def _call(
    graph: fx.Graph, named: dict[str, fx.Node], target: Any, args: tuple[Any, ...], info: Info = ROWS, region: str = "block"
) -> fx.Node:
    with graph.inserting_before(named["down"]):
        return set_facts(graph.call_function(target, args), Facts(info, region=region))


def _in_between(
    target: Any, *more: Any, info: Info = ROWS, region: str = "block", **kwargs: Any
) -> Callable[[fx.Graph, dict[str, fx.Node]], None]:
    """One call more, of the gated rows."""

    def change(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        new = _call(graph, named, target, (named["h"], *more), info, region)
        new.kwargs = kwargs
        named["down"].replace_input_with(named["h"], new)

    return change


def _with_a_row(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    """A value that each row has its own of, from elsewhere."""
    new = _call(graph, named, aten.add.Tensor, (named["h"], named["x"]))
    named["down"].replace_input_with(named["h"], new)


def _read_outside(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    with graph.inserting_before(named["y"]):
        new = set_facts(graph.call_function(aten.sum.default, (named["h"],)), Facts(Info((), torch.float32, True), region="block"))
    graph.output_node().args = ((named["y"], new),)


def _ends_read_outside(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    graph.output_node().args = ((named["y"], named["item1"]),)


def _dropping(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    for name in ("sent", "y"):
        named[name].kwargs = {**named[name].kwargs, "dropping": True}


@pytest.mark.parametrize(
    "change",
    [
        _in_between(aten.cumsum.default, 0),
        _in_between(aten.softmax.int, 0),
        _in_between(aten.flip.default, [0]),
        _in_between(aten.slice.Tensor, 0, 0, 8),
        _in_between(aten.tril.default),
        _in_between(aten.roll.default, [1], [0]),
        _in_between(aten.mean.dim, [0], True),
        _in_between(aten.dropout.default, 0.5, True),
        _in_between(aten.silu.default, region="elsewhere"),
        _with_a_row,
        _read_outside,
        _ends_read_outside,
        _dropping,
    ],
)
def test_what_is_left_alone(change: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> None:
    graph = graph_of(change)
    before = targets(graph)
    assert targets(CutExpertsIntoPieces(least_bytes=0)(graph)) == before


@pytest.mark.parametrize(
    "change",
    [
        _in_between(aten.slice.Tensor, 1, 0, 4),
        _in_between(aten.slice.Tensor, -1, 0, 4),
        _in_between(aten.clone.default),
        _in_between(aten.add.Tensor, 1.0),
    ],
)
def test_what_is_not(change: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> None:
    assert targets(CutExpertsIntoPieces(least_bytes=0)(graph_of(change))) == [through_experts]


def test_few_rows_are_left_alone() -> None:
    graph = graph_of()
    assert info_of(next(n for n in graph.nodes if n.name == "x")).nbytes == 128
    assert targets(CutExpertsIntoPieces(least_bytes=129)(graph)) == targets(graph_of())
    assert targets(CutExpertsIntoPieces(least_bytes=128)(graph)) == [through_experts]
