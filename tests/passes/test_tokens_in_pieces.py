"""Tokens for experts in pieces: which calls become one, what a ledger and a proof read of it, and models against one device."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx

import meshpar as mp
from meshpar.compile.ledger import ledger
from meshpar.graph.facts import Change, Facts, Info, PartOf, facts, info_of, set_facts
from meshpar.ops import again, collectives, load
from meshpar.ops.token_pieces import on_gathered_tokens
from meshpar.passes import order
from meshpar.passes.tokens_in_pieces import CutTokensIntoPieces
from meshpar.proof.alone import static_report
from meshpar.proof.static.expanded import expanded
from meshpar.sharding.price import Price
from meshpar.sharding.types import I, P, R, Shard
from tests.models import text, tiny
from tests.pool import Pool

aten, experts = torch.ops.aten, torch.ops.meshpar
SAMPLES, LENGTH, WIDTH, EXPERTS, SIZE = 2, 4, 16, 2, 2
TOKENS, LAYOUT = SAMPLES * LENGTH, (0, SAMPLES, ((LENGTH, 1),))


def verified(name: str, mesh: str, **config: Any) -> tuple[float, int, list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The largest difference from one device, the calls in pieces, and what is sent with them and without."""
    warnings.filterwarnings("error", message="the static check")
    real, grid, sent, calls = order.CutTokensIntoPieces, mp.make_mesh(mesh), [], []
    asked = mp.ParallelConfig(sequence_parallel=True, **config)
    try:
        for least in (2**60, 0):
            order.CutTokensIntoPieces = partial(CutTokensIntoPieces, least_bytes=least)  # type: ignore[misc, assignment]
            pm = mp.parallelize(tiny(name), grid, example=text(), config=asked)
            sent.append(sorted((c.kind, c.axis, c.phase, c.nbytes, c.count) for c in pm.comms()))
            calls.append(pm.print_readable().count("on_gathered_tokens("))
        found = mp.verify(tiny(name), grid, text(), config=asked)
    finally:
        order.CutTokensIntoPieces = real  # type: ignore[misc]
    assert calls[0] == 0
    return max(d.largest for d in found.differences), calls[1], sent[1], sent[0]


@pytest.mark.parametrize("name", ["mixtral"])
def test_models(gloo: Pool, name: str) -> None:
    for worst, calls, cut, whole in gloo.run(verified, name, "tp=2", world=2, timeout=240.0):
        assert worst < 1e-9
        assert calls == 2
        chosen = [entry for entry in cut if entry not in whole]
        assert sorted([*whole, *chosen]) == cut, "beside as many bytes in the same phases, what experts are chosen by"
        assert [(kind, phase) for kind, _, phase, *_ in chosen] == [("all_gather", "forward")] * 2 + [("reduce_scatter", "backward")] * 2
        assert {nbytes for *_, nbytes, _ in chosen} == {48 * 4 * 4 / 2}, "half of 4 numbers for each of 48 tokens"


def test_it_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "CutTokensIntoPieces", partial(CutTokensIntoPieces, least_bytes=0))
    report = static_report(tiny("mixtral"), "dp=2,tp=2", text(), config=mp.ParallelConfig(sequence_parallel=True))
    assert not report.unproved and not report.faults and report.proved > 100


def of_other_forms() -> list[tuple[float, int]]:
    """A router that is cut, whose numbers are gathered; and one sample, whose tokens are one stretch."""
    warnings.filterwarnings("error", message="the static check")
    real, grid, found = order.CutTokensIntoPieces, mp.make_mesh("tp=2"), []
    config = mp.ParallelConfig(sequence_parallel=True)
    order.CutTokensIntoPieces = partial(CutTokensIntoPieces, least_bytes=0)  # type: ignore[misc, assignment]
    try:
        for samples, length, rules in ((4, 12, {"*.gate.weight": "tp:0"}), (1, 64, {})):
            batch = {name: x[-samples:] for name, x in text(4, length).items()}
            pm = mp.parallelize(tiny("mixtral"), grid, example=batch, config=config, rules=rules)
            calls = pm.print_readable().count("on_gathered_tokens(")
            report = mp.verify(tiny("mixtral"), grid, batch, config=config, rules=rules)
            found.append((max(d.largest for d in report.differences), calls))
    finally:
        order.CutTokensIntoPieces = real  # type: ignore[misc]
    return found


def test_other_forms(gloo: Pool) -> None:
    for found in gloo.run(of_other_forms, world=2, timeout=240.0):
        assert [calls for _, calls in found] == [2, 2]
        assert max(worst for worst, _ in found) < 1e-9


def info(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Info:
    return Info(shape, dtype, grad)


def graph_of(change: Callable[[fx.Graph, dict[str, fx.Node]], None] | None = None, *, tallied: bool = False) -> fx.Graph:
    """Tokens are gathered, experts are chosen and compute, and their results are summed."""
    graph, where, named = fx.Graph(), {"group": "0", "size": SIZE, "rank": 0}, dict[str, fx.Node]()

    def made(name: str, node: fx.Node, about: Any, typed: Any = None, **known: Any) -> fx.Node:
        part = None if typed is None else PartOf(name, (("tp", SIZE, (typed,)),))
        named[name] = set_facts(node, Facts(about, region="block", part_of=part, **known))
        return node

    def call(name: str, target: Any, args: tuple[Any, ...], about: Any, typed: Any = None, kwargs: Any = None, **known: Any) -> fx.Node:
        return made(name, graph.call_function(target, args, kwargs or {}), about, typed, **known)

    whole, number = info(TOKENS, WIDTH), partial(info, dtype=torch.int64, grad=False)
    results, cut, samples = info(SAMPLES, LENGTH, WIDTH), Shard(*LAYOUT), Shard(1, 1, ((LENGTH, 1),))
    x = made("x", graph.placeholder("x"), info(TOKENS // SIZE, WIDTH))
    router = made("router", graph.get_attr("router"), info(EXPERTS, WIDTH))
    u, v = (made(name, graph.get_attr(name), info(EXPERTS, WIDTH, WIDTH)) for name in "uv")
    slot = [call("slot", load.slot, (None, "experts", ()), None)] if tallied else []
    tokens = call("tokens", collectives.s_to_r, (x, *LAYOUT), whole, R, where, conversion=Change("tp", SIZE, cut, R, whole))
    logits = call("logits", aten.linear.default, (tokens, router), info(TOKENS, EXPERTS), R)
    both = info(TOKENS, 1), number(TOKENS, 1)
    top = call("top", aten.topk.default, (logits, 1), both)
    weights, index = (call(name, operator.getitem, (top, k), both[k]) for k, name in enumerate(("weights", "index")))
    sorted_ = whole, Info((EXPERTS,), torch.int32, False), number(TOKENS)
    target = load.dispatch if tallied else experts.dispatch.default
    dispatched = call("dispatched", target, (tokens, index, EXPERTS, *slot), sorted_)
    rows, ends, perm = (call(f"item{k}", operator.getitem, (dispatched, k), sorted_[k]) for k in range(3))
    up = call("up", experts.grouped_mm.default, (rows, u, ends), whole)
    h = call("h", aten.silu.default, (up,), whole)
    down = call("down", experts.grouped_mm.default, (h, v, ends), whole)
    combined = call("combined", experts.combine.default, (down, perm, weights), whole, P)
    shaped = call("shaped", aten.reshape.default, (combined, [SAMPLES, LENGTH, WIDTH]), results, P)
    local = info(SAMPLES, LENGTH // SIZE, WIDTH)
    args = (shaped, *(1, 1, ((LENGTH, 1),)))
    y = call("y", collectives.p_to_s, args, local, samples, where, conversion=Change("tp", SIZE, P, samples, results))
    graph.output((y,))
    if change is not None:
        change(graph, named)
    return graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def cut(graph: fx.Graph, least_bytes: int = 0) -> fx.Graph:
    return CutTokensIntoPieces(least_bytes)(graph)


@pytest.mark.parametrize("tallied", [False, True])
def test_before_and_after(tallied: bool) -> None:
    graph = cut(graph_of(tallied=tallied))
    slot = [load.slot] if tallied else []
    assert targets(graph) == [
        *(*slot, aten.linear.default, collectives.s_to_r, aten.topk.default, operator.getitem, operator.getitem),
        *(on_gathered_tokens, aten.reshape.default),
    ]
    (call,) = (node for node in graph.nodes if node.target is on_gathered_tokens)
    assert [step[0] for step in call.args[0]] == ["meshpar.grouped_mm.default", "aten.silu.default", "meshpar.grouped_mm.default"]
    assert [n and n.name for n in call.args[1:]] == ["x", "getitem_1", "getitem", "slot" if tallied else None, "u", "v"]
    assert {name: call.kwargs[name] for name in ("num_experts", "dropping", "repeat", "segments")} == {
        **{"num_experts": EXPERTS, "dropping": False},
        **{"repeat": SAMPLES, "segments": ((LENGTH, 1),)},
    }
    (gathered,) = (node for node in graph.nodes if node.target is collectives.s_to_r)
    assert info_of(gathered).shape == (TOKENS, EXPERTS) and info_of(gathered.args[0]).shape == (TOKENS // SIZE, EXPERTS)
    assert facts(gathered.args[0]).part_of.typed == (("tp", SIZE, (Shard(*LAYOUT),)),)


def _with_columns(gathers: Any) -> Callable[[fx.Graph, dict[str, fx.Node]], None]:
    """The router is cut, and its numbers are gathered."""

    def change(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        logits, columns, after = named["logits"], Shard(1, 1, ((EXPERTS, 1),)), R if gathers is collectives.s_to_r else I
        part = PartOf("logits", (("tp", SIZE, (columns,)),))
        set_facts(named["router"], Facts(info(EXPERTS // SIZE, WIDTH), region="block"))
        set_facts(logits, Facts(info(TOKENS, EXPERTS // SIZE), region="block", part_of=part))
        whole = info(TOKENS, EXPERTS)
        with graph.inserting_after(logits):
            new = graph.call_function(gathers, (logits, 1, 1, ((EXPERTS, 1),)), named["tokens"].kwargs)
        known = Facts(whole, region="block", part_of=PartOf("logits", (("tp", SIZE, (after,)),)))
        set_facts(new, replace(known, conversion=Change("tp", SIZE, columns, after, whole)))
        logits.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return change


@pytest.mark.parametrize("gathers", [collectives.s_to_r, collectives.s_to_i])
def test_a_router_that_is_cut_is_gathered(gathers: Any) -> None:
    graph = cut(graph_of(_with_columns(gathers)))
    calls = targets(graph)
    assert calls[:3] == [collectives.s_to_r, aten.linear.default, gathers] and on_gathered_tokens in calls
    weight, product, whole = (node for node in graph.nodes if node.op == "call_function" and node.target in calls[:3])
    assert weight.args[:2] == (product.args[1].args[0], 0) and info_of(weight).shape == (EXPERTS, WIDTH)
    assert whole.args[1:] == LAYOUT and info_of(whole).shape == (TOKENS, EXPERTS)
    assert facts(whole).conversion.before == Shard(*LAYOUT) and facts(product).part_of.typed == (("tp", SIZE, (Shard(*LAYOUT),)),)


def _viewed(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    """Tokens are gathered with a dim for samples, and viewed as rows."""
    tokens, x = named["tokens"], named["x"]
    set_facts(x, Facts(info(SAMPLES, LENGTH // SIZE, WIDTH), region="block"))
    whole, by_sample = info(SAMPLES, LENGTH, WIDTH), Shard(1, 1, ((LENGTH, 1),))
    part = PartOf("x", (("tp", SIZE, (R,)),))
    set_facts(tokens, Facts(whole, region="block", part_of=part, conversion=Change("tp", SIZE, by_sample, R, whole)))
    tokens.args = (x, 1, 1, ((LENGTH, 1),))
    with graph.inserting_after(tokens):
        rows = graph.call_function(aten.reshape.default, (tokens, [-1, WIDTH]))
    set_facts(rows, Facts(info(TOKENS, WIDTH), region="block", part_of=PartOf("tokens", (("tp", SIZE, (R,)),))))
    tokens.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)


def test_tokens_that_are_viewed_as_rows() -> None:
    graph = cut(graph_of(_viewed))
    (call,) = (node for node in graph.nodes if node.target is on_gathered_tokens)
    own: Any = call.args[1]
    assert own.target is aten.reshape.default and own.args == (own.args[0], [TOKENS // SIZE, WIDTH]) and own.args[0].name == "x"
    assert call.kwargs["repeat"] == SAMPLES and facts(own).part_of.typed == (("tp", SIZE, (Shard(*LAYOUT),)),)
    again_ = [node for node in expanded(graph).nodes if node.target is collectives.s_to_r]
    assert [info_of(node).shape for node in again_] == [(TOKENS, EXPERTS), (TOKENS, WIDTH)]


@pytest.mark.parametrize("tallied", [False, True])
def test_a_proof_reads_what_it_was(tallied: bool) -> None:
    def told(graph: fx.Graph) -> list[Any]:
        calls = [node for node in graph.nodes if node.op == "call_function" and node.target is not load.slot]
        return [(node.target, facts(node).info, facts(node).part_of, facts(node).conversion) for node in calls]

    before = told(graph_of(tallied=tallied))
    found = told(expanded(cut(graph_of(tallied=tallied))))
    moved = [entry for entry in found if entry not in before]
    assert [target for target, *_ in moved] == [aten.linear.default, collectives.s_to_r], "of a rank's own tokens, gathered"
    assert [entry for entry in before if entry not in found] == [before[1]]


def test_cheap_operators_among_them_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshpar.passes import tokens_in_pieces

    def gated(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        with graph.inserting_before(named["down"]):
            new = set_facts(graph.call_function(aten.mul.Tensor, (named["h"], named["up"])), facts(named["h"]))
        named["down"].replace_input_with(named["h"], new)

    monkeypatch.setattr(tokens_in_pieces, "ComputeAgain", partial(tokens_in_pieces.ComputeAgain, least_bytes=1))
    graph = cut(graph_of(gated))
    (call,) = (node for node in graph.nodes if node.target is on_gathered_tokens)
    assert [step[0] for step in call.args[0]][1] == "meshpar.ops.again.computed"
    assert aten.mul.Tensor in targets(expanded(graph)) and again.computed not in targets(expanded(graph))


def test_the_ledger_and_what_is_waited_for() -> None:
    slow, fast = (Price(flops=flops, latency=0.0) for flops in (1e3, 1e30))

    def sent(graph: fx.Graph, price: Price) -> list[Any]:
        return [c for c in ledger(graph, price) if c.nbytes == TOKENS * WIDTH * 4 / 2]

    for price in (slow, fast):
        both = [[(c.kind, c.phase, c.nbytes, c.seconds) for c in sent(graph, price)] for graph in (graph_of(), cut(graph_of()))]
        assert sorted(both[0]) == sorted(both[1]) and len(both[0]) == 4
    assert all(c.exposed == 0 for c in sent(cut(graph_of()), slow))
    assert all(c.exposed == c.seconds for c in [*sent(cut(graph_of()), fast), *sent(graph_of(), slow)])


def _read_outside(name: str, target: Any = aten.neg.default) -> Callable[[fx.Graph, dict[str, fx.Node]], None]:
    def change(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
        with graph.inserting_before(named["y"]):
            new = set_facts(graph.call_function(target, (named[name],)), facts(named[name]))
        graph.output_node().args = ((named["y"], new),)

    return change


def _elsewhere(name: str) -> Callable[[fx.Graph, dict[str, fx.Node]], None]:
    def change(_: fx.Graph, named: dict[str, fx.Node]) -> None:
        known = facts(named[name])
        set_facts(named[name], Facts(known.info, region="elsewhere", conversion=known.conversion, part_of=known.part_of))

    return change


def _other(name: str, *args: Any, **kwargs: Any) -> Callable[[fx.Graph, dict[str, fx.Node]], None]:
    """A conversion of another layout, or on another axis."""

    def change(_: fx.Graph, named: dict[str, fx.Node]) -> None:
        node = named[name]
        node.args, node.kwargs = (node.args[0], *(args or node.args[1:])), {**node.kwargs, **kwargs}

    return change


def _of_a_value(_: fx.Graph, named: dict[str, fx.Node]) -> None:
    """What experts are chosen by is no product with a parameter."""
    named["logits"].args = (named["tokens"], named["x"])


def _wide(_: fx.Graph, named: dict[str, fx.Node]) -> None:
    set_facts(named["logits"], Facts(info(TOKENS, WIDTH), region="block", part_of=facts(named["logits"]).part_of))


def _of_another_type(_: fx.Graph, named: dict[str, fx.Node]) -> None:
    set_facts(named["logits"], Facts(info(TOKENS, EXPERTS), region="block", part_of=PartOf("logits", (("tp", SIZE, (P,)),))))


def _between_rows(graph: fx.Graph, named: dict[str, fx.Node]) -> None:
    with graph.inserting_before(named["down"]):
        new = set_facts(graph.call_function(aten.cumsum.default, (named["h"], 0)), facts(named["h"]))
    named["down"].replace_input_with(named["h"], new)


@pytest.mark.parametrize(
    "change",
    [
        *(_read_outside(name) for name in ("tokens", "item0", "item1", "item2", "h", "combined", "shaped")),
        *(_elsewhere(name) for name in ("tokens", "logits", "dispatched", "up", "combined", "y")),
        *(_other("y", *layout) for layout in ((0, 1, ((SAMPLES, 1),)), (1, 1, ((LENGTH // 2, 2),)), (2, 1, ((WIDTH, 1),)))),
        _other("y", group="1"),
        _other("tokens", 1, 1, ((WIDTH, 1),)),
        _other("tokens", 0, SAMPLES, ((3, 1), (1, 1))),
        _other("tokens", 0, SAMPLES, ((-LENGTH, 1),)),
        *(_of_a_value, _wide, _of_another_type, _between_rows),
    ],
)
def test_what_is_left_alone(change: Callable[[fx.Graph, dict[str, fx.Node]], None]) -> None:
    assert targets(cut(graph_of(change))) == targets(graph_of(change))


def test_few_tokens_are_left_alone() -> None:
    nbytes = TOKENS * WIDTH * 4
    assert on_gathered_tokens in targets(cut(graph_of(), nbytes))
    assert targets(cut(graph_of(), nbytes + 1)) == targets(graph_of())
