"""Stages run one after the other are the whole graph: values, gradients, new buffers."""

from __future__ import annotations

import operator
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from meshpar.compile.denominators import split_denominators
from meshpar.compile.split import mark, shared_parameters, split
from meshpar.errors import PlanError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import Change, Facts, facts, gives_several, info_of, infos_of, set_facts
from meshpar.mesh import Axis
from meshpar.ops.collectives import i_to_r_many
from meshpar.passes.attention import SimplifyAttention
from meshpar.passes.coalesce import Coalesce
from meshpar.passes.lower import Lower
from meshpar.passes.randomness import SeedRandom
from meshpar.sharding.types import I, R
from meshpar.simulate import per_rank, simulate
from tests.compile.staged import backward, captured_model, check, compare, run_graph, run_stages, starts_of, state_of
from tests.passes.graphs import info, put
from tests.sharding.models import captured_of, decided

aten = torch.ops.aten


# -- the example of the pass, and small graphs ---------------------------------------------------------------------------------------------


def example() -> fx.Graph:
    graph = fx.Graph()
    ids = put(graph, "placeholder", "ids", (), info(4, 4, grad=False))
    w, v = put(graph, "get_attr", "w", (), info(4, 4)), put(graph, "get_attr", "v", (), info(4, 4))
    mask = put(graph, "call_function", aten.triu.default, (ids,), info(4, 4, grad=False), region="layers.0")
    a = put(graph, "call_function", aten.linear.default, (mask, w), info(4, 4))
    b = put(graph, "call_function", aten.relu.default, (a,), info(4, 4))
    c = put(graph, "call_function", aten.linear.default, (b, v), info(4, 4))
    graph.output((put(graph, "call_function", aten.mul.Tensor, (c, mask), info(4, 4)),))
    return graph


def test_before_and_after() -> None:
    graph = example()
    before = str(graph)
    mark(graph, ["relu"], ())
    first, second = split(graph, 2, parameters={"w", "v"})
    assert str(graph) == before, "the given graph is left alone"
    assert [n.name for n in first.graph.nodes] == ["ids", "w", "triu", "linear", "output"]
    assert (first.receives, first.inputs, first.sends, first.outputs) == ((), ("ids",), ("linear",), ())
    assert [n.name for n in second.graph.nodes] == ["linear", "ids", "v", "triu", "relu", "linear_1", "mul", "output"]
    assert (second.receives, second.inputs, second.sends, second.outputs) == (("linear",), ("ids",), (), (0,))
    known = {n.name: facts(n) for n in graph.nodes}
    for stage in (first, second):
        assert all(facts(n) == known[n.name] for n in stage.graph.nodes if n.op != "output")


def test_marks_are_raised_to_what_is_read() -> None:
    graph = example()
    mark(graph, ["linear"], ())
    for node in graph.nodes:
        if node.name == "relu":
            set_facts(node, replace(facts(node), stage=0))
    assert [[n.name for n in s.graph.nodes if n.op == "call_function"] for s in split(graph, 2, parameters={"w", "v"})] == [
        [],
        ["triu", "linear", "relu", "linear_1", "mul"],
    ]


def test_values_without_a_mark_go_where_less_is_sent() -> None:
    graph = fx.Graph()
    w = put(graph, "get_attr", "w", (), info(4, 4))
    a = put(graph, "call_function", aten.relu.default, (w,), info(4, 4))
    a = put(graph, "call_function", aten.sum.dim_IntList, (a, [0]), info(4), stage=0)
    small = put(graph, "call_function", aten.sum.default, (a,), info())
    big = put(graph, "call_function", aten.expand.default, (a, [4, 4]), info(4, 4))
    b = put(graph, "call_function", aten.mul.Tensor, (big, small), info(4, 4), stage=1)
    c = put(graph, "call_function", aten.mul.Tensor, (big, b), info(4, 4), stage=2)
    graph.output((c,))
    stages = split(graph, 3, parameters={"w"})
    assert [n.name for n in stages[1].graph.nodes if n.op == "call_function"] == ["expand", "mul"], "on the first stage that uses it"
    assert stages[0].sends == ("sum_1", "sum_2") and not any(n.name == "expand" for n in stages[0].graph.nodes)


def test_unknown_starts() -> None:
    with pytest.raises(PlanError, match=r"stages:\n  'relo' is no call of the graph. Did you mean relu\?\n  'relu' begins two stages."):
        mark(example(), ["relo", "relu", "relu"], ())


def test_marks_outside() -> None:
    graph = example()
    mark(graph, ["relu"], ())
    with pytest.raises(PlanError, match="relu is marked for stage 1 of 1"):
        split(graph, 1, parameters={"w", "v"})


# -- models --------------------------------------------------------------------------------------------------------------------------------


MODELS = ("llama", "llama_tied", "gpt2", "gemma2", "t5", "albert", "unet", "uneven", "ring", "gpt_dropout")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_the_whole_computes(name: str) -> None:
    model, batch, captured = captured_model(name)
    for count in (2, 5) if name != "ring" else (2,):
        compare(model, captured, batch, count)


def test_batch_norm_writes_its_statistics_where_it_runs() -> None:
    model, batch, captured = captured_model("batch_norm")
    stages = compare(model, captured, batch, 2, ["relu"])
    assert stages[0].mutations == ("net.1.num_batches_tracked", "net.1.running_mean", "net.1.running_var")
    assert stages[1].mutations == ("net.5.num_batches_tracked", "net.5.running_mean", "net.5.running_var")


def test_a_buffer_read_again_later_is_updated_on_both_stages() -> None:
    model, batch, captured = captured_model("ring")
    first, second = compare(model, captured, batch, 2, [_second_linear(captured)])
    assert first.mutations == ("mean",) and second.mutations == ("mean", "steps")
    assert len(first.sends) == 2, "the activation and the new mean"


def _second_linear(captured: Captured) -> str:
    return [n.name for n in captured.graph.nodes if n.target is aten.linear.default][1]


def test_a_buffer_read_before_the_stage_that_updates_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.two(self.norm(self.one(x)))).pow(3).sum()

    captured = captured_of(Twice().double(), {"x": torch.randn(3, 4, dtype=torch.float64)})
    mark(captured.graph, [_second_linear(captured)], captured.parameters)
    with pytest.raises(PlanError, match="buffer norm.running_(mean|var) is read on stage 0 and gets its new value on stage 1"):
        split(captured.graph, 2, parameters=captured.parameters, mutations=captured.mutations)


def test_constants_of_the_batch_are_made_again_and_tied_weights_are_read_twice() -> None:
    model, batch, captured = captured_model("llama_tied")
    blocks = [
        next(n.name for n in captured.graph.nodes if n.op == "call_function" and facts(n).region == f"model.layers.{i}") for i in (1, 2)
    ]
    stages = compare(model, captured, batch, 3, blocks)
    assert [len(s.sends) for s in stages] == [1, 1, 0], "the hidden state alone crosses"
    assert stages[0].inputs == ("input_ids",) and "labels" in stages[2].inputs
    assert shared_parameters(stages, captured.parameters) == {"model.embed_tokens.weight": (0, 2)}
    assert any("cos" in n.name for n in stages[1].graph.nodes)


def test_unwanted_outputs_are_dropped_with_what_only_they_need() -> None:
    model, batch, captured = captured_model("uneven")
    mark(captured.graph, starts_of(captured.graph, 3), captured.parameters)
    stages = split(captured.graph, 3, parameters=captured.parameters, wanted=[1])
    check(stages, ("ids", "labels"))
    assert [s.outputs for s in stages] == [(), (), (1,)]
    assert not any("labels" in s.inputs for s in stages)
    assert not any(n.target == "head.weight" for s in stages for n in s.graph.nodes)
    state = state_of(model, captured)
    outputs, _, _ = run_stages(stages, state, batch)
    assert torch.equal(outputs[1], run_graph(captured.graph, state, [batch[n] for n in captured.inputs])[1])


def test_denominators_reach_the_stage_that_divides() -> None:
    _, _, captured = captured_model("llama")
    mark(captured.graph, starts_of(captured.graph, 2), captured.parameters)
    one = split_denominators(captured, 2).captured
    stages = split(one.graph, 2, parameters=one.parameters, wanted=[one.loss or 0])
    check(stages, one.inputs)
    assert "denominator_0" in stages[1].inputs and "denominator_0" not in stages[0].inputs


# -- any graph -----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_graph_with_any_marks(data: st.DataObject) -> None:
    """Random operators on random values with random marks (or none), tuples, buffers, unused outputs."""
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    for i in range(5):
        kind = ("x", "p", "p", "b", "x")[i]
        name = f"{kind}{i}"
        put(graph, "placeholder" if kind == "x" else "get_attr", name, (), info(4, 4, grad=kind == "p"))
        tensors[name] = torch.randn(4, 4, dtype=torch.float64, generator=generator).requires_grad_(kind == "p")
    count = data.draw(st.integers(1, 4))
    marks = st.one_of(st.none(), st.integers(0, count - 1))
    for _ in range(data.draw(st.integers(1, 14))):
        values = [n for n in graph.nodes if not gives_several(n)]
        target = data.draw(st.sampled_from((aten.mul.Tensor, aten.sub.Tensor, aten.sin.default, aten.t.default, aten.split.Tensor)))
        args: tuple[Any, ...] = tuple(data.draw(st.sampled_from(values)) for _ in range(2 if "Tensor" in str(target) else 1))
        flows = any(info_of(a).requires_grad for a in args)
        if target is aten.split.Tensor:
            node = put(graph, "call_function", target, (args[0], 4), info(4, 4, grad=flows))
            set_facts(node, replace(facts(node), info=(info(4, 4, grad=info_of(args[0]).requires_grad),)))
            put(graph, "call_function", operator.getitem, (node, 0), infos_of(node)[0], **_marked(data.draw(marks)))
        else:
            node = put(graph, "call_function", target, args, info(4, 4, grad=flows))
        set_facts(node, replace(facts(node), **_marked(data.draw(marks))))
    values = [n for n in graph.nodes if not gives_several(n)]
    outputs = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    graph.output(tuple(outputs))
    wanted = data.draw(st.sets(st.integers(0, len(outputs) - 1), min_size=1))
    stages = split(graph, count, parameters={"p1", "p2"}, wanted=wanted)
    check(stages, ("x0", "x4"))
    assert [s.outputs for s in stages] == [()] * (count - 1) + [tuple(sorted(wanted))]

    whole, parts = ({n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in tensors.items()} for _ in range(2))
    found = run_graph(graph, whole, [whole["x0"], whole["x4"]])
    total = sum(found[i].sin().sum() for i in sorted(wanted))
    got, _, crossings = run_stages(stages, parts, parts)
    assert all(torch.equal(got[i], found[i]) for i in wanted)
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
        backward(sum((got[i].sin().sum() for i in sorted(wanted)), torch.zeros(())), stages, crossings)
        for name in ("p1", "p2"):
            one, two = (x.grad if x.grad is not None else torch.zeros(4, 4, dtype=x.dtype) for x in (whole[name], parts[name]))
            torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-14)


def _marked(stage: int | None) -> dict[str, int]:
    return {} if stage is None else {"stage": stage}


# -- lowered graphs ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("name", "count"), [("llama_tied", 2), ("gpt_dropout", 4), ("t5", 3)])
def test_lowered_graphs(name: str, count: int) -> None:
    """tp=2, all ranks in this process: joined conversions, seeded dropout, collectives."""
    model, batch, captured = captured_model(name)
    mark(captured.graph, starts_of(captured.graph, count), captured.parameters)
    plan = decided(captured)
    with simulate(2):
        axis = Axis("tp", 2, -1, torch.distributed.group.WORLD.group_name)  # type: ignore[union-attr]
        graph = SimplifyAttention()(Lower(plan.axes[0], axis)(captured.graph))
        graph = SeedRandom((axis,))(Coalesce(frozenset(captured.parameters))(graph))
        stages = split(graph, count, parameters=captured.parameters, wanted=[captured.loss or 0])
        inputs: dict[str, Any] = {**batch, "random_key": 17}
        check(stages, [str(n.target) for n in graph.nodes if n.op == "placeholder"])
        loss_at = captured.loss or 0
        whole, parts = _local(model, captured, plan), _local(model, captured, plan)
        found = run_graph(graph, whole, [inputs[str(n.target)] for n in graph.nodes if n.op == "placeholder"])
        found[loss_at].backward()
        outputs, _, crossings = run_stages(stages, parts, inputs)
        backward(outputs[loss_at], stages, crossings)
        torch.testing.assert_close(outputs[loss_at], found[loss_at], rtol=0, atol=0)
        for fqn in captured.parameters:
            torch.testing.assert_close(parts[fqn].grad, whole[fqn].grad, rtol=1e-12, atol=1e-14, msg=fqn)


def _local(model: nn.Module, captured: Captured, plan: Any) -> dict[str, Tensor]:
    state = state_of(model, captured)
    for fqn in captured.parameters:
        type_ = plan.parameters[fqn].placements["tp"]
        whole = state[fqn].detach()

        def part(rank: int, whole: Tensor = whole, type_: Any = type_) -> Tensor:
            ranges = type_.ranges(2, rank) if hasattr(type_, "ranges") else None
            if ranges is None:
                return whole.clone()
            return torch.cat([whole.narrow(type_.dim, a, b - a) for a, b in ranges], type_.dim).clone()

        state[fqn] = per_rank(part).requires_grad_()
    return state


def test_joined_conversions_are_cut_apart() -> None:
    """Parameters outside blocks are converted as one; each stage converts its own."""
    graph = fx.Graph()
    weights = [put(graph, "get_attr", f"w{i}", (), info(4)) for i in range(3)]
    many = put(graph, "call_function", i_to_r_many, tuple(weights), info(4))
    many.kwargs = {"group": "g", "size": 2, "rank": 0}
    changes = tuple(Change("tp", 2, I, R, info_of(w)) for w in weights)
    set_facts(many, replace(facts(many), info=tuple(info_of(w) for w in weights), joined=changes))
    items = []
    for i in range(3):
        items.append(graph.call_function(operator.getitem, (many, i)))
        set_facts(items[-1], Facts(info(4)))
    a = put(graph, "call_function", aten.relu.default, (items[1],), info(4), stage=0)
    a = put(graph, "call_function", aten.sum.default, (a,), info(), stage=0)
    b = put(graph, "call_function", aten.mul.Tensor, (items[2], a), info(4), stage=1)
    graph.output((put(graph, "call_function", aten.add.Tensor, (b, items[0]), info(4), stage=1),))
    first, second = split(graph, 2, parameters={"w0", "w1", "w2"})
    check((first, second), ())
    assert [n.target for n in first.graph.nodes if n.op == "get_attr"] == ["w1"]
    assert [n.target for n in second.graph.nodes if n.op == "get_attr"] == ["w0", "w2"]
    joined = next(n for n in second.graph.nodes if facts(n).joined)
    assert facts(joined).joined == (changes[0], changes[2]) and joined.kwargs == many.kwargs
    assert [(n.name, n.args) for n in second.graph.nodes if n.name.startswith("getitem")] == [
        ("getitem", (joined, 0)),
        ("getitem_2", (joined, 1)),
    ]


# -- cost ----------------------------------------------------------------------------------------------------------------------------------


def test_linear_time() -> None:
    """96 layers of 45 calls with a skip to the very end, 16 stages."""
    graph = fx.Graph()
    x = put(graph, "placeholder", "x", (), info(4))
    skips = []
    for i in range(96):
        w = put(graph, "get_attr", f"w{i}", (), info(4))
        for _ in range(44):
            x = put(graph, "call_function", aten.mul.Tensor, (x, w), info(4))
        skips.append(x)
    x = put(graph, "call_function", aten.stack.default, (skips,), info(96, 4))
    graph.output((x,))
    mark(graph, starts_of(graph, 16), ())
    start = time.process_time()
    stages = split(graph, 16, parameters={f"w{i}" for i in range(96)})
    assert time.process_time() - start < 2
    assert len(stages[-1].receives) >= 90
