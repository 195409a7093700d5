"""The table of operators: true to torch's own schemas; and every reader of a row believes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import meshpar as mp
from meshpar.capture.check import number_seeds
from meshpar.capture.simplify import simplify
from meshpar.cli.look import explained
from meshpar.compile.denominators import split_denominators
from meshpar.compile.ground import Budget, Ground
from meshpar.compile.narrow import _attention
from meshpar.graph import operators
from meshpar.graph.cost import flops, nbytes
from meshpar.graph.facts import facts, info_of
from meshpar.graph.op import op_name
from meshpar.graph.operators import OPERATORS, OperatorRow, add_rule, draws, operator_of
from meshpar.mesh import Axis
from meshpar.ops import collectives
from meshpar.passes.lower import Lower
from meshpar.passes.reuse import Reuse
from meshpar.plan import AxisPlan, NodePlan
from meshpar.report.memory import activations
from meshpar.runtime.recompute import wrap
from meshpar.sharding.infer import infer
from meshpar.sharding.local import LocalCall
from meshpar.sharding.policy import POLICIES, Request
from meshpar.sharding.price import Price
from meshpar.sharding.reading import Reading
from meshpar.sharding.solve import _Solver, solve
from meshpar.sharding.types import I, Shard
from tests.passes.graphs import info, put
from tests.sharding.models import captured_of

aten = torch.ops.aten
NAME, RAN = "table.project", list[str]()


@torch.library.custom_op("table::project", mutates_args=())
def project(x: Tensor, w: Tensor) -> Tensor:
    RAN.append("project")
    return x @ w


@project.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return grad @ w.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


project.register_autograd(_project_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("table::total", mutates_args=())
def total(x: Tensor) -> Tensor:
    return x.sum()


@total.register_fake
def _(x: Tensor) -> Tensor:
    return x.sum()


total.register_autograd(
    lambda ctx, grad: grad.expand(ctx.size).clone(), setup_context=lambda ctx, inputs, output: setattr(ctx, "size", inputs[0].shape)
)


@torch.library.custom_op("table::fill", mutates_args=())
def fill(size: list[int], p: float) -> Tensor:
    return torch.full(size, p)


@fill.register_fake
def _(size: list[int], p: float) -> Tensor:
    return torch.empty(size)


@torch.library.custom_op("table::picked", mutates_args=())
def picked(x: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return x.gather(1, labels[:, None]).mean()


PROJECT, FILL, PICKED = torch.ops.table.project.default, torch.ops.table.fill.default, torch.ops.table.picked.default
TEXT = "... i, i o -> ... o"


class Net(nn.Module):
    """Two blocks of two products each, by an operator that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ops.table.project(torch.ops.table.project(x, self.up).tanh(), self.down)


def known(**facts: Any) -> None:
    """Say `facts` of the operator, and nothing else."""
    OPERATORS[NAME] = OperatorRow()
    add_rule(NAME, TEXT, linear=[(0,), (1,)], **facts)


def all_facts() -> dict[str, Any]:
    return {"kind": "product", "factors": (0, 1), "flops": lambda call: 2 * call.shapes[1][1] * call.infos[0].nbytes / 4}


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """The table as it was, afterwards."""
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


def graph_of(net: nn.Module | None = None) -> fx.Graph:
    return captured_of(net or Net(), {"x": torch.randn(4, 8, 16)}).graph


def call_of(graph: fx.Graph, target: Any = PROJECT) -> fx.Node:
    return next(node for node in graph.nodes if node.target is target)


# -- the rows are true -------------------------------------------------------------------------------------------------------------------

COPIES_NOTHING_AT_TIMES = {"to", "contiguous", "positive"}
"""Give back their operand where there is nothing to do; a graph of these has a copy."""


@pytest.mark.parametrize("name", [name for name in OPERATORS if "." not in name])
def test_views_are_those_of_torch_s_schema(name: str) -> None:
    packet = getattr(aten, name)
    overloads = [getattr(packet, one) for one in packet.overloads()]
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for o in overloads for r in o._schema.returns)
    assert OPERATORS[name].view == (aliases and name not in COPIES_NOTHING_AT_TIMES) or name == "_unsafe_view"


@pytest.mark.parametrize("name", [name for name, one in OPERATORS.items() if "." not in name and (one.draws or one.only_if)])
def test_arguments_that_stop_random_numbers_exist(name: str) -> None:
    packet, row = getattr(aten, name), OPERATORS[name]
    schemas = [getattr(packet, one)._schema for one in packet.overloads()]
    assert any(set(row.only_if) <= {a.name for a in schema.arguments} for schema in schemas)


def test_no_operator_belongs_to_two_families() -> None:
    families = [value for name, value in vars(operators).items() if name[:1] == "_" and name[1:].isupper() and isinstance(value, dict)]
    assert len(families) == 10 and sum(map(len, families)) == len(OPERATORS)


def test_an_operator_without_a_row_is_known_by_torch_s_tags() -> None:
    assert operator_of(aten.erf.default).kind == "elementwise" and operator_of(aten.multinomial.default).kind == "random"
    assert operator_of(PROJECT) == OperatorRow() and op_name(PROJECT) == NAME


# -- every reader believes the row -------------------------------------------------------------------------------------------------------


def test_cost() -> None:
    node = call_of(graph_of())
    assert flops(node) == 0 and nbytes(node) == 4 * (4 * 8 * 16 + 16 * 64 + 4 * 8 * 64)
    known(**all_facts())
    assert flops(node) == 2 * 4 * 8 * 16 * 64
    known(kind="lookup")
    assert nbytes(node) == 2 * 4 * (4 * 8 * 64)
    known(view=True)
    assert nbytes(node) == 0


def axis_plan(graph: fx.Graph) -> AxisPlan:
    parameters = frozenset(str(n.target) for n in graph.nodes if n.op == "get_attr")
    return solve(graph, Request("tp", 2, parameters=parameters))


def solver_of(graph: fx.Graph) -> _Solver:
    request, make = Request("tp", 2), POLICIES["weights"]
    reading = Reading(graph, infer(graph), size=2, even=make.even, inputs={}, parameters=request.parameters)
    return _Solver(request, reading, make(request, reading))


def test_the_solver_cuts_by_the_rule_and_knows_the_hidden_size_by_the_kind() -> None:
    graph = graph_of()
    assert all(out == I for plan in axis_plan(graph).nodes.values() for out in plan.outs), "whole without a rule"
    known(**all_facts())
    placed = {name: plan.outs[0] for name, plan in axis_plan(graph).nodes.items()}
    assert [t.dim for name, t in placed.items() if name.startswith("layers_") and isinstance(t, Shard)] == [1, 0, 1, 0]
    solver = solver_of(graph)
    assert solver.reading.hidden
    known(**all_facts() | {"kind": "other"})
    assert not solver_of(graph).reading.hidden


def test_the_solver_prices_arithmetic_and_views() -> None:
    graph = graph_of()

    def work(**facts: Any) -> float:
        known(**facts)
        solver = solver_of(graph)
        return solver._work(solver.inference.calls[call_of(graph)])

    assert work(flops=lambda call: 1e12) > 10 * work(flops=lambda call: 0) > work(view=True) == 0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(16, 8, 3), nn.ConvTranspose1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x.reshape(1, 16, 4, 8))
        heads = x.reshape(4, 2, 4, 16)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return self.up(image[:, :, 0]).sum() + attended.sum() + torch.einsum("bsh,bth->bst", x, x).sum()


@pytest.mark.parametrize(
    "target, more",
    [
        (aten.scaled_dot_product_attention.default, 1),
        (aten.einsum.default, 1),
        (aten.conv2d.default, 10),  # at least so much more: none is to be repeated
        (aten.conv_transpose1d.default, 3),
    ],
    ids=str,
)
def test_the_solver_counts_arithmetic_as_everybody_does(target: Any, more: int) -> None:
    """Only of a convolution it multiplies all sizes of the rule: those of the image before, of the window and of the image after."""
    graph = graph_of(Mixed())
    solver, node = solver_of(graph), call_of(graph, target)
    solver.price = Price(flops=1.0, memory=1e30)
    times = 3 if info_of(node).requires_grad else 1
    work = solver._work(solver.inference.calls[node]) / times
    assert work == pytest.approx(flops(node)) if more == 1 else work >= more * flops(node)


def test_memory() -> None:
    """x -> h = x @ up -> tanh(h) -> y = ... @ down -> x + y, twice, then the square: x is an input."""
    graph = graph_of()

    def kept(mode: str = "none", **facts: Any) -> int:
        known(**facts)
        return activations(graph, mode)

    wide, narrow = 4 * (4 * 8 * 64), 4 * (4 * 8 * 16)
    assert kept() == 2 * wide + 2 * narrow, "operands: two tanh (results of their own), x + y of each block"
    assert kept(saves="nothing") == 2 * wide + narrow, "tanh its results, the square its operand"
    assert kept(saves="results") == 4 * wide + 3 * narrow
    assert kept("selective", kind="product") == kept("selective", kind="other") + 2 * wide + 2 * narrow
    assert kept(view=True) == 2 * wide + narrow


def test_memory_and_recompute_agree_on_what_selective_keeps() -> None:
    """One row for both: convolutions and the products of experts were kept by one and computed again by the other."""
    for target in (aten.convolution.default, torch.ops.meshpar.grouped_mm.default, aten.mm.default, aten.bmm.default):
        assert operator_of(target).kind in ("product", "convolution")


@pytest.mark.parametrize(("kind", "again"), [("product", 0), ("elementwise", 1)])
def test_recompute_keeps_products(kind: str, again: int) -> None:
    known(kind=kind)
    x, w = torch.randn(4, 16, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    out = wrap(lambda a, b: torch.ops.table.project(a, b).tanh().exp(), "selective", fx.Graph())(x, w)
    RAN.clear()
    out.sum().backward()
    assert len(RAN) == again


def test_recompute_keeps_the_products_of_experts_and_convolutions() -> None:
    x, w, ends = torch.randn(4, 16, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True), torch.tensor([2, 4])
    image, kernel = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    calls: list[tuple[Any, tuple[Tensor, ...], str]] = [
        (lambda a, b, c: torch.ops.meshpar.grouped_mm(a, b, c).tanh().exp(), (x, w, ends), "meshpar::grouped_mm"),
        (lambda a, b: torch.conv2d(a, b).tanh().exp(), (image, kernel), "aten::convolution"),
    ]
    for code, args, name in calls:
        plain, kept, again = (_in_backward(wrap(code, mode, fx.Graph()), args) for mode in ("none", "selective", "full"))  # type: ignore[arg-type]
        assert plain.count(name) == kept.count(name) == again.count(name) - 1
        assert plain.count("aten::tanh") == kept.count("aten::tanh") - 1, "what is cheap is computed again"


def _in_backward(code: Any, args: tuple[Tensor, ...]) -> list[str]:
    """The operators that run in backward."""
    out = code(*args)
    with Counted() as counted:
        out.sum().backward()
    return counted.seen


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_reuse() -> None:
    def marked(target: Any) -> bool:
        graph = fx.Graph()
        x, w = put(graph, "placeholder", "x", (), info(4, 4)), put(graph, "get_attr", "w", (), info(4, 4))
        summed = put(graph, "call_function", collectives.p_to_i, (put(graph, "call_function", target, (x, w), info(4, 4)),), info(4, 4))
        graph.output((summed,))
        Reuse()(graph)
        return bool(summed.kwargs.get("reuse"))

    assert not marked(PROJECT)
    known(**all_facts())
    assert marked(PROJECT) and marked(aten.mm.default) and not marked(aten.mul.Tensor)


def test_explain() -> None:
    def reason(**facts: Any) -> str:
        known(**facts)
        text = explained(Net(), {"x": torch.randn(4, 8, 16)}, "tp=2").explain()
        return next(line for line in text.splitlines() if "layers.*.up" in line)

    assert "its share of the outputs" in reason(**all_facts(), matrix=("inputs", "outputs"))
    assert "like the values it is used with" in reason(**all_facts(), matrix=())


@pytest.mark.parametrize("weighs", [True, False])
def test_stages_are_not_cut_inside_what_weighs(weighs: bool) -> None:
    known(**all_facts(), weighs=weighs)
    captured = captured_of(Net(), {"x": torch.randn(4, 8, 16)})
    assert bool(_attention(Ground(captured, None, lambda node: 1.0, Budget()))) == weighs


class Counting(nn.Module):
    """A sum over samples by an operator of one's own, divided by a count that depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.table.total((x @ self.w).flatten()) / (x > 0).sum()


@pytest.mark.parametrize("kind", ["loss", "label loss"])
def test_only_torch_s_own_losses_are_written_out(kind: str) -> None:
    """Of other people's, nobody knows what their arguments mean."""
    add_rule("table.picked", "n c, n -> ", kind=kind)  # type: ignore[arg-type]
    graph = fx.Graph()
    x, labels = put(graph, "placeholder", "x", (), info(4, 3)), put(graph, "placeholder", "labels", (), info(4, dtype=torch.int64))
    graph.output((put(graph, "call_function", PICKED, (x, labels, "mean"), info()),))
    simplify(graph)
    assert call_of(graph, PICKED).args == (x, labels, "mean")


@pytest.mark.parametrize("additive", [True, False])
def test_denominators(additive: bool) -> None:
    add_rule("table.total", "i -> ", linear=[(0,)], additive=additive)
    found = split_denominators(captured_of(Counting(), {"x": torch.randn(4, 16)}), 2)
    assert (found.counts is not None) == additive and bool(found.averaged) != additive


@pytest.mark.parametrize(("known", "seeds"), [({}, 0), ({"draws": True}, 1), ({"draws": True, "only_if": ("p",)}, 0)])
def test_capture_numbers_what_draws(known: dict[str, Any], seeds: int) -> None:
    add_rule("table.fill", "-> n", **known)
    graph = fx.Graph()
    node = put(graph, "call_function", FILL, ([4], 0.0), info(4))
    number_seeds(graph)
    assert sum(facts(n).seed is not None for n in graph.nodes) == seeds == draws(node)


def test_lowering() -> None:
    def local(call: LocalCall) -> None:
        call.set("size", list(call.out_shape()))

    def lowered() -> Any:
        graph = fx.Graph()
        node = put(graph, "call_function", FILL, ([4], 0.0), info(4))
        graph.output((node,))
        cut = Shard(0, 1, ((4, 1),))
        return call_of(Lower(AxisPlan("tp", 2, {node.name: NodePlan((), (cut,), "n")}, (cut,)), Axis("tp", 2, 0, "tp"))(graph), FILL).args[
            0
        ]

    add_rule("table.fill", "-> n")
    assert lowered() == [4]
    add_rule("table.fill", "-> n", local=local)
    assert lowered() == [2]


def test_a_described_operator_is_exact() -> None:
    """All readers together: cut, overwritten in place, kept by recompute, and the numbers are those of one device."""
    known(**all_facts())
    for sequence in (True, False):
        config = mp.ParallelConfig(recompute="selective", sequence_parallel=sequence)
        report = mp.verify(Net(), "dp=2,tp=2", {"x": torch.randn(4, 8, 16)}, config=config)
        assert report.ok, report


# -- add_rule ----------------------------------------------------------------------------------------------------------------------------


def test_what_is_not_said_again_stays() -> None:
    before = OPERATORS["softmax"]
    add_rule("softmax", "a b -> a b")
    assert replace(OPERATORS["softmax"], rule=before.rule, claim=None) == before
    add_rule("softmax", "a b -> a b", saves="operands")
    assert OPERATORS["softmax"].saves == "operands" and OPERATORS["softmax"].weighs


def test_words_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add_rule\('table.project'\): 'matrix' is none of product, attention"):
        add_rule(NAME, TEXT, kind="matrix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'inputs' is none of operands, others"):
        add_rule(NAME, TEXT, saves="inputs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no '->'"):
        add_rule(NAME, "a b")
    assert NAME not in OPERATORS


def test_a_rule_that_fits_no_call_is_not_called_missing() -> None:
    add_rule(NAME, "a -> a")
    with mp.simulate(2):
        said = str(mp.parallelize(Net(), mp.make_mesh("tp=2"), example={"x": torch.randn(4, 8, 16)}).explain())
    assert "table.project has no sharding rule that fits: 4 calls run whole" in said


@pytest.mark.parametrize(
    ("name", "known_as"), [("table::project", "table.project"), ("aten::softmax", "softmax"), ("aten.softmax", "softmax")]
)
def test_a_name_that_no_call_has_is_refused(name: str, known_as: str) -> None:
    with pytest.raises(ValueError, match=f"the operator is known here as '{known_as}'. Type add_rule"):
        add_rule(name, "a b -> a b")
    assert name not in OPERATORS
