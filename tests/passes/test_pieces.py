"""Products in pieces beside their own collectives: the values of one device, over real ranks, in fewer calls, and proved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.compile.programs import Programs
from meshpar.dry_run.rehearsal import absent
from meshpar.graph.facts import Change, Facts, Info, facts, set_facts
from meshpar.ops import collectives, pieces
from meshpar.passes import order
from meshpar.passes.pieces import CutIntoPieces
from meshpar.passes.products import HideGradientSums
from meshpar.proof.static.expanded import expanded, separated
from meshpar.sharding.price import Price
from meshpar.sharding.types import P, R, plain
from tests.models import text, tiny
from tests.pool import Pool

aten = torch.ops.aten


@contextmanager
def small_pieces() -> Iterator[None]:
    """Inside, what is small is cut into pieces too."""
    real = order.CutIntoPieces, order.HideGradientSums
    order.CutIntoPieces = partial(CutIntoPieces, least_bytes=0)  # type: ignore[misc, assignment]
    order.HideGradientSums = partial(HideGradientSums, least_bytes=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        order.CutIntoPieces, order.HideGradientSums = real  # type: ignore[misc]


def verified(name: str, mesh: str, **config: Any) -> tuple[float, list[str], list[tuple[str, str]]]:
    """The largest difference from one device, the calls in pieces, and what is sent."""
    warnings.filterwarnings("error", message="the static check")
    with small_pieces():
        grid = mp.make_mesh(mesh)
        found = mp.verify(tiny(name), grid, text(), config=mp.ParallelConfig(**config))
        pm = mp.parallelize(tiny(name), grid, example=text(), config=mp.ParallelConfig(**config))
        called = [word for word in ("gathered", "scattered", "reduced") if f"pieces_{word}(" in pm.print_readable()]
        return max(d.largest for d in found.differences), called, [(c.kind, c.phase) for c in pm.comms() if c.region.endswith("layers.0")]


def test_a_cut_sequence(gloo: Pool) -> None:
    for worst, called, sent in gloo.run(verified, "llama", "tp=2", world=2, timeout=180.0, sequence_parallel=True):
        assert worst < 1e-9
        assert called == ["gathered", "scattered"]
        assert sent.count(("all_gather", "backward")) == 4, "two of products, two again for weights"
        assert sent.count(("all_gather", "forward")) == sent.count(("reduce_scatter", "backward")) == 2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_rows_and_experts(gloo: Pool, name: str) -> None:
    """Products of rows; a router and a dispatch of what is gathered."""
    for worst, called, _ in gloo.run(verified, name, "tp=2", world=2, timeout=180.0, sequence_parallel=True):
        assert worst < 1e-9 and "gathered" in called


def test_a_whole_sequence(gloo: Pool) -> None:
    for worst, called, sent in gloo.run(verified, "llama", "tp=2", world=2, timeout=180.0, sequence_parallel=False):
        assert worst < 1e-9
        assert called == ["reduced"]
        assert sent.count(("all_reduce", "forward")) == sent.count(("all_reduce", "backward")) == 2


def test_blocks_that_are_computed_again_gather_no_third_time(gloo: Pool) -> None:
    for worst, called, _ in gloo.run(verified, "llama", "tp=2", world=2, timeout=180.0, sequence_parallel=True, recompute="selective"):
        assert worst < 1e-9 and not called


def graph_of() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """s_to_r, two products, and one that is summed and cut."""
    graph, where = fx.Graph(), {"group": "0", "size": 2, "rank": 0}
    cut, whole = plain(1, 8), Info((1, 8, 4), torch.float32, True)

    def made(node: fx.Node, *shape: int, **known: Any) -> fx.Node:
        return set_facts(node, Facts(Info(shape, torch.float32, True), region="block", **known))

    x = made(graph.placeholder("x"), 1, 4, 4)
    weights = [made(graph.get_attr(name), 4, 4) for name in "abc"]
    layout = (cut.dim, cut.repeat, cut.segments)
    y = made(graph.call_function(collectives.s_to_r, (x, *layout), where), 1, 8, 4, conversion=Change("tp", 2, cut, R, whole))
    a, b = (made(graph.call_function(aten.linear.default, (y, w)), 1, 8, 4) for w in weights[:2])
    c = made(graph.call_function(aten.mul.Tensor, (a, b)), 1, 8, 4)
    d = made(graph.call_function(aten.linear.default, (c, weights[2])), 1, 8, 4)
    z = made(graph.call_function(collectives.p_to_s, (d, *layout), where), 1, 4, 4, conversion=Change("tp", 2, P, cut, whole))
    graph.output((z,))
    return graph, y, z


def targets(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def test_before_and_after() -> None:
    graph, _, z = graph_of()
    CutIntoPieces(least_bytes=0)(graph)
    graph.lint()
    assert targets(graph) == ["gathered", "getitem", "getitem", "mul.Tensor", "scattered"]
    HideGradientSums(least_bytes=0)(graph)
    graph.lint()
    gathered = next(n for n in graph.nodes if n.target is pieces.gathered)
    assert [w.target for w in gathered.args[-1]] == ["c"] and z.args[-2:] == (gathered.args[-2], 0)
    assert targets(expanded(graph)) == ["beside", "convert", "linear.default", "linear.default", "mul.Tensor", "linear", "p_to_s"]
    assert targets(separated(graph)) == ["s_to_r", "linear.default", "linear.default", "mul.Tensor", "linear.default", "p_to_s"]


def test_products_of_rows() -> None:
    """addmm of a view, as a product whose weight is turned."""
    graph, y, _ = graph_of()
    (first, _), info = list(y.users), Info((8, 4), torch.float32, True)
    with graph.inserting_before(first):
        rows = set_facts(graph.call_function(aten.view.default, (y, [-1, 4])), Facts(info, region="block"))
        bias = set_facts(graph.get_attr("e"), Facts(Info((4,), torch.float32, True), region="block"))
        product = graph.call_function(aten.addmm.default, (bias, rows, first.args[1]))
        set_facts(product, Facts(info, region="block"))
        again = set_facts(graph.call_function(aten.view.default, (product, [1, 8, 4])), facts(first))
    first.replace_all_uses_with(again)
    graph.erase_node(first)
    CutIntoPieces(least_bytes=0)(graph)
    graph.lint()
    assert targets(graph) == ["t.default", "gathered", "getitem", "reshape.default", "getitem", "view.default", "mul.Tensor", "scattered"]


def test_rows_in_another_order_are_gathered_as_before() -> None:
    """The rows of a turned value are those of it, but not where they were."""
    graph, y, _ = graph_of()
    first, info = next(iter(y.users)), Info((8, 4), torch.float32, True)
    with graph.inserting_before(first):
        turned = set_facts(graph.call_function(aten.transpose.int, (y, 0, 1)), Facts(Info((8, 1, 4), torch.float32, True), region="block"))
        rows = set_facts(graph.call_function(aten.reshape.default, (turned, [-1, 4])), Facts(info, region="block"))
        product = set_facts(graph.call_function(aten.linear.default, (rows, first.args[1])), Facts(info, region="block"))
        again = set_facts(graph.call_function(aten.view.default, (product, [1, 8, 4])), facts(first))
    first.replace_all_uses_with(again)
    graph.erase_node(first)
    CutIntoPieces(least_bytes=0)(graph)
    assert targets(graph)[:4] == ["s_to_r", "transpose.int", "reshape.default", "linear.default"]


def test_rows_are_proved_as_rows() -> None:
    """A gate reads the rows of what the perceptron beside it reads."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate, self.up, self.down = (make(8, 8) for make in (lambda n, _: torch.nn.LayerNorm(n), *[torch.nn.Linear] * 3))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            x = self.norm(h)
            gate = self.gate(x.view(-1, 8)).tanh().sum(-1)
            return h + self.down(self.up(x).relu()) * gate.view(*h.shape[:2], 1)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                h = block(h)
            return h.pow(2).mean()

    rules = {"*.gate.weight": "tp:0", "*.up.weight": "tp:0"}
    with absent("tp=2") as there, small_pieces():
        programs = Programs(Model(), there, mp.ParallelConfig(sequence_parallel=True), rules=rules)
        program = programs.make((), {"h": torch.randn(2, 8, 8)}, training=True)
    assert any(n.target is pieces.gathered and len(n.args[1]) == 2 for n in program.graph.nodes)
    assert program.proof.proved and not program.proof.faults and not program.proof.unproved


def test_a_reader_that_keeps_nothing() -> None:
    """It reads what was gathered; products keep their part alone."""
    graph, y, _ = graph_of()
    with graph.inserting_after(y):
        total = set_facts(graph.call_function(aten.sum.default, (y,)), Facts(Info((), torch.float32, True), region="block"))
    graph.output_node().args = ((*graph.output_node().args[0], total),)
    CutIntoPieces(least_bytes=0)(graph)
    graph.lint()
    (gathered,) = (n for n in graph.nodes if n.target is pieces.gathered)
    assert gathered.kwargs["whole"] and targets(graph)[:2] == ["gathered", "getitem"]
    assert targets(expanded(graph))[0] == "s_to_r"


def test_what_else_is_read_is_gathered_as_before() -> None:
    graph, y, _ = graph_of()
    with graph.inserting_after(y):
        set_facts(graph.call_function(aten.sin.default, (y,)), Facts(Info((1, 8, 4), torch.float32, True), region="block"))
    CutIntoPieces(least_bytes=0)(graph)
    assert targets(graph)[0] == "s_to_r"


@pytest.mark.parametrize("segments", [((3, 1), (5, 1)), ((7, 1),)])
def test_unequal_parts_travel_whole(segments: tuple[tuple[int, int], ...]) -> None:
    """Products keep their part alone; it is gathered, and sums are scattered, in one message."""
    graph, y, z = graph_of()
    for node in (y, z):
        node.args = (*node.args[:-1], segments)
    CutIntoPieces(least_bytes=0)(graph)
    assert targets(graph)[0] == "gathered" and targets(graph)[-1] == "p_to_s"


def test_small_values_are_left_alone() -> None:
    graph, *_ = graph_of()
    CutIntoPieces()(graph)
    assert targets(graph)[0] == "s_to_r"


def test_what_pieces_do_not_pay_for_is_gathered_again_from_some_size_on() -> None:
    for least, expected in ((0, ["gathered", "getitem", "getitem"]), (2**20, ["s_to_r", "linear.default", "linear.default"])):
        graph, *_ = graph_of()
        CutIntoPieces(least_bytes=least, price=Price(link=1e30, latency=0.0))(graph)
        assert targets(graph)[:3] == expected and targets(graph)[-2:] == ["linear.default", "p_to_s"]
        for node in graph.nodes:
            assert node.target is not pieces.gathered or (node.kwargs.get("at_once") and "whole" not in node.kwargs)
        assert targets(expanded(graph))[:3] == ["s_to_r", "linear.default", "linear.default"]
