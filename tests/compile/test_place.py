"""Stages and typed axes together: what a plan says of the conversions of one axis holds for the graph as its stages want it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar._torch import without_modes
from meshpar.capture.export import capture
from meshpar.compile.decide import Decision, StageRequest, decide
from meshpar.compile.ground import Budget, Ground
from meshpar.compile.narrow import places_by_kind
from meshpar.compile.place import check_buffers, place
from meshpar.compile.split import StageGraph, split, updaters
from meshpar.compile.stages import choose
from meshpar.errors import PlanError
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, gives_several, info_of, infos_of, set_facts
from meshpar.graph.text import calls_of, fingerprint
from meshpar.mesh import mesh_sizes, typed_axes
from meshpar.ops.load import Tally
from meshpar.passes.order import lowered
from meshpar.plan import Plan, StagePlan
from meshpar.sharding.types import R, Shard, plain
from meshpar.simulate import local_tensors, per_rank
from tests.compile.staged import backward, run_stages


class Flat(nn.Module):
    """No blocks. Every layer reads a mean over the samples; the last reads the first value; the table is used at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.a, self.b, self.c, self.d = (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        first = x = self.table(ids)
        mean = x.mean(0, keepdim=True)
        for layer in (self.a, self.b, self.c, self.d):
            x = x + layer(x - mean) * torch.sigmoid(mean.sum(-1, keepdim=True))
        return F.cross_entropy(F.linear(x * first, self.table.weight).flatten(0, 1), labels.flatten())


class Routed(nn.Module):
    """The same with experts in each half."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = Flat()
        self.one, self.two = Experts(), Experts()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        flat = self.flat
        first = x = flat.table(ids)
        mean = x.mean(0, keepdim=True)
        x = self.one(flat.a(x - mean)) + mean
        x = self.two(flat.c(x - mean) + first) + mean
        return F.cross_entropy(F.linear(x, flat.table.weight).flatten(0, 1), labels.flatten())


class Experts(nn.Module):
    """Four experts, of which every token takes one."""

    def __init__(self, score: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.score = score or partial(torch.softmax, dim=-1)
        self.router = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 12) * 0.3), nn.Parameter(torch.randn(4, 12, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, index = self.score(self.router(flat)).topk(1)
        rows, ends, perm = torch.ops.meshpar.dispatch(flat, index, 4)
        rows = torch.ops.meshpar.grouped_mm(torch.tanh(torch.ops.meshpar.grouped_mm(rows, self.up, ends)), self.down, ends)
        return x + torch.ops.meshpar.combine(rows, perm, weights).view_as(x)


def staged(model: nn.Module, batch: dict[str, Tensor], mesh: str, follow: bool) -> tuple[Captured, Plan, tuple[StageGraph, ...]]:
    """The graph of a model as simulated ranks run it, by two stages. `follow`: stages are those of an earlier plan's parameters."""
    there = mp.make_mesh(mesh)
    others = {n: (tuple(p.shape), "float64", True) for n, p in model.named_parameters()}
    ask: dict[str, Any] = {"axes": tuple((a.name, a.size) for a in typed_axes(there)), "others": others, "stages": StageRequest((0, 1))}
    sizes = (("pp", 2), *mesh_sizes(there).items())
    with without_modes():
        graphs = [capture(model, (), batch) for _ in range(3)]
    plan = decide(graphs[0], Decision(sizes, **ask))
    if follow:
        plan = decide(graphs[1], Decision(sizes, **ask, pinned=plan.parameters))
    captured = graphs[2]  # another rank's: it obeys the plan
    place(captured.graph, plan.stages, {n: p.stages for n, p in plan.parameters.items()})
    axes = typed_axes(there)
    data = {a.name: frozenset(captured.parameters) for a in axes if a.name != "tp"}
    cut = {(a.name, n) for a in axes for n, p in plan.parameters.items() if isinstance(p.placements.get(a.name), Shard)}
    summed = {a: frozenset(n for n in names if (a, n) not in cut) for a, names in data.items()}
    graph = lowered(captured.graph, {a.axis: a for a in plan.axes}, axes, frozenset(captured.parameters), summed)
    return captured, plan, split(graph, 2, parameters=captured.parameters)


def part(whole: Tensor, placements: Any, rank: int, names: dict[str, int]) -> Tensor:
    """What one of 2 x 2 simulated ranks holds."""
    for axis, type_ in placements.items():
        if isinstance(type_, Shard):
            ranges = type_.ranges(2, rank // names[axis] % 2)
            whole = torch.cat([whole.narrow(type_.dim, a, b - a) for a, b in ranges], type_.dim)
    return whole.clone()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize(("kind", "mesh"), [(Flat, "dp=2,tp=2"), (Routed, "dp=2,tp=2"), (Routed, "ep=2,tp=2")])
def test_stages_on_two_axes(kind: type[nn.Module], mesh: str, follow: bool, simulated: Any) -> None:
    torch.manual_seed(0)
    model = kind().double()
    batch = {"ids": torch.randint(16, (4, 6)), "labels": torch.randint(16, (4, 6))}
    loss = model(**batch)
    loss.backward()
    with simulated(4):
        captured, plan, stages = staged(model, batch, mesh, follow)
        places = {axis.axis: 2 if axis.axis != "tp" else 1 for axis in plan.axes}
        state = {}
        for name, p in model.named_parameters():
            placed = plan.parameters[name].placements
            state[name] = per_rank(lambda rank, p=p, placed=placed: part(p.detach(), placed, rank, places)).requires_grad_()
        local: dict[str, Any] = {n: per_rank(lambda rank, x=x: x.chunk(2)[rank // 2].clone()) for n, x in batch.items()}
        local |= {name: Tally() for stage in stages if (name := stage.extra.expert_tally) is not None}
        outputs, _, crossings = run_stages(stages, state | dict(captured.constants), local)
        backward(outputs[captured.loss or 0], stages, crossings)
        for rank, found in local_tensors(outputs[captured.loss or 0]).items():
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0, msg=f"loss on rank {rank}")
        for name in captured.parameters:
            p = model.get_parameter(name)
            for rank, found in local_tensors(state[name].grad).items():
                wanted = part(p.grad, plan.parameters[name].placements, rank, places)  # type: ignore[arg-type]
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13, msg=f"{name} on rank {rank}")


def test_every_call_of_a_plan_is_the_one_that_it_was_made_for(simulated: Any) -> None:
    """Both stages ask for the mean: each converts it, and so does the plan's graph."""
    torch.manual_seed(0)
    batch = {"ids": torch.randint(16, (4, 6)), "labels": torch.randint(16, (4, 6))}
    with simulated(4):
        _, plan, stages = staged(Flat().double(), batch, "dp=2,tp=2", False)
    converted = [[n.name for n in s.graph.nodes if (c := facts(n).conversion) is not None and c.axis == "dp"] for s in stages]
    assert all(converted), "each stage has conversions on the data axis"
    known = {name for axis in plan.axes if axis.axis == "tp" for name in axis.nodes}
    assert any(name.startswith("p_to_") for name in known)


@pytest.mark.parametrize(("kind", "mesh"), [(Flat, "dp=2,tp=2"), (Routed, "ep=2,tp=2")])
def test_what_later_axes_cut_is_not_sent_whole(kind: type[nn.Module], mesh: str, simulated: Any) -> None:
    """The ledger counts what a rank has of the mean and of the rows, not what it would have without tp."""
    torch.manual_seed(0)
    batch = {"ids": torch.randint(16, (4, 6)), "labels": torch.randint(16, (4, 6))}
    with simulated(4):
        _, _, stages = staged(kind().double(), batch, mesh, False)
    seen = []
    for node in (n for stage in stages for n in stage.graph.nodes if n.op == "call_function"):
        change, exchange = facts(node).conversion, facts(node).exchange
        if change is not None and change.axis != "tp" and not isinstance(change.after, Shard) and not isinstance(change.before, Shard):
            assert change.whole.shape == info_of(node).shape
            seen.append(change.whole.shape)
        elif exchange is not None and not gives_several(node):
            assert exchange.rows.shape == info_of(node).shape
    assert (1, 6, 4) in seen, "the mean, half of it on each tp rank"


class Centred(nn.Module):
    """Without its running mean, which no parameter keeps in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)) * 0.1)
        return x - self.mean


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.norm = Centred()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x)))
        return self.c(x).pow(2).mean()


def request(buffers: Any, pinned: Any) -> Decision:
    others = {n: (tuple(p.shape), "float32", True) for n, p in Running().named_parameters()}
    return Decision((("pp", 2),), (), stages=StageRequest((0, 1), ["norm"]), others=others, buffers=buffers, pinned=pinned)


def stages_of(captured: Captured, plan: Plan) -> tuple[StageGraph, ...]:
    place(captured.graph, plan.stages, {n: p.stages for n, p in plan.parameters.items()}, plan.buffers)
    return split(captured.graph, 2, parameters=captured.parameters, mutations=captured.mutations)


def test_a_buffer_stays_on_its_stage_for_another_batch() -> None:
    """Its update reads no parameter: it could run as early as its operands are there, on a stage whose copy nobody reads."""
    model = Running()
    first = decide(capture(model, (), {"x": torch.randn(2, 4, 8)}), request({}, {}))
    assert first.buffers == {"norm.mean": (1,)} and Plan.from_json(first.to_json()) == first
    again = capture(model, (), {"x": torch.randn(2, 5, 8)})
    plan = decide(again, request(first.buffers, first.parameters))
    stages = stages_of(again, plan)
    assert updaters(stages) == {"norm.mean": (1,)}
    check_buffers(stages, plan)


def test_a_buffer_that_would_be_updated_elsewhere_is_told() -> None:
    model = Running()
    first = decide(capture(model, (), {"x": torch.randn(2, 4, 8)}), request({}, {}))
    again = capture(model, (), {"x": torch.randn(2, 5, 8)})
    plan = decide(again, request({"norm.mean": (0, 1)}, first.parameters))
    with pytest.raises(PlanError, match=r"buffer norm.mean is updated on stages 1, and kept on 0, 1.") as told:
        check_buffers(stages_of(again, replace(plan, buffers={"norm.mean": (1,)})), plan)
    assert "Call parallelize with such a batch as its example" in str(told.value)


def test_where_experts_lie_is_kept_for_another_batch() -> None:
    """An axis that divides experts and feeds its ranks samples of their own: what was cut there stays so."""
    model = Routed()
    batch = {"ids": torch.randint(16, (4, 6)), "labels": torch.randint(16, (4, 6))}
    others = {n: (tuple(p.shape), "float32", True) for n, p in model.named_parameters()}
    asked = Decision((("ep", 2),), (("ep", 2),), others=others)
    first = decide(capture(model, (), batch), asked).parameters
    assert first["one.up"].placements["ep"] == plain(0, 4) and first["flat.table.weight"].placements["ep"] == R
    again = capture(model, (), {name: x[:, :5] for name, x in batch.items()})
    assert decide(again, replace(asked, pinned=first)).parameters["one.up"].placements == {"ep": plain(0, 4)}
    other = replace(first["one.up"], placements={"ep": plain(1, 8)})
    assert decide(again, replace(asked, pinned={**first, "one.up": other})).parameters["one.up"].placements == other.placements


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "of one stage": lambda model: sum((p.pow(2).sum() for p in model.a.parameters()), torch.zeros(())),
    "of all stages": lambda model: sum((p.pow(2).sum() for p in model.parameters()), torch.zeros(())),
    "far from orthogonal": lambda model: (model.a[0].weight @ model.a[0].weight.t() - torch.eye(8)).pow(2).sum(),
    "of neighbours": lambda model: (model.a[0].weight - model.b[0].weight).pow(2).sum(),
    "of both ends": lambda model: (model.a[0].weight - model.c[0].weight).pow(2).sum(),
    "of all norms": lambda model: torch.stack([p.norm() for p in model.parameters()]).sum(),
    "of two stages": lambda model: (model.a[0].weight.exp().sum() * model.scale).sum(),
    "used twice": lambda model: model.a[0].weight.sum() * model.a[0].weight.square().sum(),
}


class Penalised(Running):
    """With a term of parameters alone, which no stage's samples lead to."""

    def __init__(self, penalty: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.penalty, self.scale = penalty, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * self.penalty(self) * self.scale.mean()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_is_computed_where_its_parameters_are_for_another_batch_too(penalty: Callable[[nn.Module], Tensor], alone: bool) -> None:
    """It is read on the last stage. Where that does not hold them (`alone`), what was made of them is handed on."""
    torch.manual_seed(0)
    model = Penalised(penalty)
    others = {n: (tuple(p.shape), "float32", True) for n, p in model.named_parameters()}
    asked = Decision((("pp", 2),), (), stages=StageRequest((0, 1), ["norm"]), others=others)
    first = decide(capture(model, (), {"x": torch.randn(2, 4, 8)}), asked)
    both = (0, 1) if penalty is PENALTIES["of both ends"] else (0,)  # (a difference of weights of two stages: one holds both)
    assert first.parameters["a.0.weight"].stages == both and first.parameters["b.0.weight"].stages == (0,)
    held = {n: replace(p, stages=((0 if n[0] in "ab" else 1),)) if alone else p for n, p in first.parameters.items()}
    x = torch.randn(3, 5, 8)
    again = capture(model, (), {"x": x})
    if alone and penalty is PENALTIES["of both ends"]:  # no stage holds both, and no plan has it so
        with pytest.raises(PlanError, match=r"a.0.weight, c.0.weight \(.*\) cannot be used after what is computed on stage"):
            decide(again, replace(asked, pinned=held, buffers=first.buffers))
        return
    plan = decide(again, replace(asked, pinned=held, buffers=first.buffers))
    stages = stages_of(again, plan)
    for stage in stages:
        read = {str(node.target) for node in stage.graph.nodes if node.op == "get_attr"} & set(held)
        assert all(stage.index in held[name].stages for name in read)
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    outputs, _, crossings = run_stages(stages, state | buffers | dict(again.constants), {"x": x})
    loss = model(x)
    loss.backward()
    backward(outputs[again.loss or 0], stages, crossings)
    torch.testing.assert_close(outputs[again.loss or 0], loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state[name].grad, p.grad, msg=name)


class Twice(nn.Module):
    """Layers there and back: what their parameters hold says not which of the two a call is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *reversed(self.layers)):
            x = x + torch.tanh(layer(x))
        return x.pow(2).mean()


def test_calls_stay_on_their_stages_where_another_batch_makes_the_same() -> None:
    model = Twice()
    others = {n: (tuple(p.shape), "float32", True) for n, p in model.named_parameters()}
    asked = Decision((("pp", 2),), (), stages=StageRequest((0, 1)), others=others)
    graphs = [capture(model, (), {"x": torch.randn(2, n, 8)}) for n in (4, 7, 7)]
    first = decide(graphs[0], asked)
    assert calls_of(graphs[0]) == calls_of(graphs[1]) and fingerprint(graphs[0]) != fingerprint(graphs[1])
    later = replace(asked, pinned=first.parameters, buffers=first.buffers)
    for graph, request in ((graphs[1], replace(later, earlier=first.stages)), (graphs[2], later)):
        decide(graph, request)
    found = [{n.name: facts(n).stage for n in graph.graph.nodes if n.op == "call_function"} for graph in graphs]
    assert found[0] == found[1] != found[2], "by parameters alone the way back would begin on the first stage that holds them"


class Gated(nn.Module):
    """A gate, and experts that only their parameters keep from running where it does. (Around a softmax there are no cuts anyway.)"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(8, 8), Experts(torch.sigmoid), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x))).square().mean()


def gated() -> Captured:
    with without_modes():
        return capture(Gated(), (torch.randn(2, 4, 8),), {})


def among_rows(captured: Captured) -> list[Any]:
    """The calls that make or read rows of experts."""
    rows = {n for n in captured.graph.nodes if n.op == "call_function" and any(i is not None and i.rows for i in infos_of(n))}
    return [n for n in captured.graph.nodes if n in rows or rows.intersection(n.all_input_nodes)]


def test_rows_of_experts_stay_on_one_stage() -> None:
    """The gate's parameters are on the first stage, those of the experts on the second: rows are made where they are used."""
    captured = gated()
    gates = {name for name in captured.parameters if name.startswith(("first", "experts.router"))}
    held = {name: (0,) if name in gates else (1,) for name in captured.parameters}
    place(captured.graph, (StagePlan("", 0, ""), StagePlan("", 1, "")), held)
    found = among_rows(captured)
    assert found and {facts(n).stage for n in found} == {1}
    assert 0 in {facts(n).stage for n in captured.graph.nodes}


def test_no_stage_begins_among_rows_of_experts() -> None:
    captured = gated()
    ground = Ground(captured, None, lambda node: 1.0, Budget())
    among = {ground.index[n] for n in among_rows(captured)[1:] if n in ground.index}
    assert len(among) > 3
    for kind, places in places_by_kind(ground, 2).items():
        assert not among.intersection(places), kind


def test_a_stage_that_is_told_to_begin_there_is_refused() -> None:
    """At a module inside of the experts."""
    captured = gated()
    up = next(n for n in captured.graph.nodes if n.op == "call_function" and n.name.startswith("tanh"))
    set_facts(up, replace(facts(up), module="experts.act"))
    with pytest.raises(PlanError, match=r"rows of experts cross where 'experts\.act' begins.*before the layer of experts"):
        choose(captured, 2, where=["experts.act"])
