"""Blocks at their original paths: names, values, gradients, structure sharing, and everything that cannot be a block."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from meshpar.capture.export import capture
from meshpar.graph.facts import facts, set_facts
from meshpar.runtime.blocks import Tree, block_paths, build, inlined, print_code, shared_blocks
from meshpar.runtime.cut import cut
from tests.runtime.models import Layer, make_batch, make_net

aten = torch.ops.aten


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))


def as_dtensor(p: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    whole = DTensor.from_local(p.detach().clone(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return nn.Parameter(whole, requires_grad=p.requires_grad)


def tree_of(
    net: nn.Module, batch: tuple[torch.Tensor, ...], make: Callable[[nn.Parameter], nn.Parameter] | None = None, **options: Any
) -> Tree:
    captured = capture(net, batch)
    make = make or (lambda p: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    persistent = set(net.state_dict())
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    return build(
        captured.graph,
        {n: make(p) for n, p in net.named_parameters()},
        buffers,
        captured.constants,
        aliases=captured.aliases,
        non_persistent=[n for n in buffers if n not in persistent],
        mutations=captured.mutations,
        **options,
    )


def same_gradients(tree: nn.Module, net: nn.Module) -> None:
    expected = {n: p.grad for n, p in net.named_parameters()}
    found = {n: p.grad for n, p in tree.named_parameters()}
    assert list(found) == list(expected)
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            mine = found[name]
            assert isinstance(mine, torch.Tensor)
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(mine, grad, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_names_values_and_gradients(mesh: DeviceMesh) -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, lambda p: as_dtensor(p, mesh))
    assert block_paths(tree) == ("layers.0", "layers.1", "layers.2")
    assert list(tree.state_dict()) == list(net.state_dict())
    assert [n for n, _ in tree.named_buffers()] == [n for n, _ in net.named_buffers()]
    for _ in range(2):  # the second adds to the first: accumulation
        (loss,) = tree.run("train", *batch)
        expected = net(*batch)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        loss.backward()
        expected.backward()
        same_gradients(tree, net)
    assert tree.get_buffer("steps").item() == net.steps.item() == 2  # type: ignore[operator]
    assert tree.get_parameter("head.weight") is tree.get_parameter("embed.weight")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_optimizers_step_dtensors_like_plain_parameters(mesh: DeviceMesh, set_to_none: bool, options: dict[str, bool]) -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, lambda p: as_dtensor(p, mesh))
    for kind in (torch.optim.AdamW,) if "fused" in options else (torch.optim.AdamW, torch.optim.SGD):  # torch has no fused SGD for DTensors
        ours = kind(tree.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
        theirs = kind(net.parameters(), lr=0.1)
        for _ in range(2):
            for model, optimizer in ((lambda: tree.run("train", *batch)[0], ours), (lambda: net(*batch), theirs)):
                model().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    for (name, p), q in zip(tree.named_parameters(), net.parameters()):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[attr-defined]


def test_blocks_of_one_structure_share_one_function_and_compile_once() -> None:
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(gm)
        return gm.forward

    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, compile={"backend": backend, "fullgraph": True})
    tree.run("train", *batch)[0].backward()
    net(*batch).backward()
    same_gradients(tree, net)
    assert len(compiled) == 1
    assert print_code(tree, "train").count("def forward(") == 2


def test_a_hook_on_a_parameters_gradient_runs(mesh: DeviceMesh) -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, lambda p: as_dtensor(p, mesh))
    seen: list[str] = []
    tree.get_parameter("layers.0.down.weight").register_hook(lambda grad: seen.append("hook") or 2 * grad)
    tree.get_parameter("layers.1.down.weight").register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    tree.run("train", *batch)[0].backward()
    net.layers[0].down.weight.register_hook(lambda grad: 2 * grad)
    net(*batch).backward()
    same_gradients(tree, net)
    assert sorted(seen) == ["after", "hook"]


def test_two_parameters_with_one_gradient_do_not_share_its_memory(mesh: DeviceMesh) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((self.a + self.b) * x).sum()

    x = torch.arange(3.0)
    tree = tree_of(Twice(), (x,), lambda p: as_dtensor(p, mesh))
    tree.run("train", x)[0].backward()
    tree.get_parameter("a").grad.mul_(10)  # type: ignore[union-attr]
    assert tree.get_parameter("b").grad.full_tensor().tolist() == [0.0, 1.0, 2.0]  # type: ignore[union-attr]


def test_a_parameter_frozen_and_thawed_between_steps(mesh: DeviceMesh) -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, lambda p: as_dtensor(p, mesh))
    for wanted in (True, False, True):
        for module in (tree, net):
            module.get_parameter("layers.1.down.weight").requires_grad_(wanted)
            module.zero_grad()
        tree.run("train", *batch)[0].backward()
        net(*batch).backward()
        same_gradients(tree, net)


def test_a_deep_copy_is_a_tree_of_its_own(mesh: DeviceMesh) -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, lambda p: as_dtensor(p, mesh))
    tree.run("train", *batch)
    twin = copy.deepcopy(tree)
    with torch.no_grad():
        for p in tree.parameters():
            p.zero_()
    twin.run("train", *batch)[0].backward()
    net(*batch).backward()
    same_gradients(twin, net)
    assert all(p.grad is None for p in tree.parameters())


def test_several_programs_over_the_same_parameters() -> None:
    net, batch, longer = make_net(), make_batch(), make_batch(1, rows=6)
    tree = tree_of(net, batch)
    other = capture(net, longer)
    tree.add_program("longer", other.graph, constants=other.constants, mutations=other.mutations)
    with torch.no_grad():
        torch.testing.assert_close(tree.run("longer", *longer)[0], net(*longer))
        torch.testing.assert_close(tree.run("train", *batch)[0], net(*batch))


def test_values_are_freed_when_eager_would_free_them() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        y = x.clone()
        alive.append(weakref.ref(y))
        return y

    graph = fx.Graph()
    x = graph.placeholder("x")
    for i in range(6):
        x = graph.call_function(spy, (x,))
        set_facts(x, replace(facts(x), region=f"layers.{i}"))
    graph.output((x,))
    tree = build(graph, {})
    with torch.no_grad():
        tree.run("train", torch.ones(2))
    assert counts == [0, 1, 1, 1, 1, 1]  # only the block's own input


# ---- what cannot be a block ------------------------------------------------------------------------------------------------------------


def linear_graph(steps: list[tuple[str, str, tuple[str, ...]]], outputs: tuple[str, ...]) -> fx.Graph:
    """A graph from lines (name, region, inputs): every node sums its inputs; names with a dot are parameters."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {"x": graph.placeholder("x")}
    for name, region, inputs in steps:
        for fqn in inputs:
            if fqn not in made:
                made[fqn] = graph.get_attr(fqn)
        made[name] = made[inputs[0]]
        for other in inputs[1:] or inputs[:1]:
            made[name] = graph.call_function(aten.add.Tensor, (made[name], made[other]))
            set_facts(made[name], replace(facts(made[name]), region=region or None))
    graph.output(tuple(made[name] for name in outputs))
    return graph


def run_both(graph: fx.Graph, parameters: dict[str, nn.Parameter], **options: Any) -> Tree:
    """Run the graph cut and whole; outputs and gradients must agree."""
    tree = build(graph, parameters, **options)
    x = torch.tensor([1.0, 2.0])
    whole = fx.Interpreter(nn.Module(), graph=copy.deepcopy(graph))
    whole.fetch_attr = lambda target: parameters[target]  # type: ignore[method-assign, assignment]
    states = []
    for results in (whole.run(x), tree.run("train", x)):
        for p in parameters.values():
            p.grad = None
        sum((r * (i + 2)).sum() for i, r in enumerate(results)).backward()
        states.append(([r.detach() for r in results], [p.grad for p in parameters.values()]))
    torch.testing.assert_close(*states)
    return tree


def params(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full((2,), float(i + 1))) for i, name in enumerate(names)}


def test_nodes_that_something_outside_stands_between_run_in_the_root() -> None:
    steps = [("a", "l.0", ("x", "l.0.w")), ("b", "", ("a", "r.w")), ("c", "l.0", ("b", "l.0.w")), ("d", "l.1", ("c", "l.1.w"))]
    tree = run_both(linear_graph(steps, ("d",)), params("l.0.w", "r.w", "l.1.w"))
    assert block_paths(tree) == ("l.1",)
    assert "do not lie together" in inlined(tree)["l.0"]


def test_two_blocks_that_need_each_other() -> None:
    steps = [("a", "l.0", ("x", "l.0.w")), ("b", "l.1", ("x", "l.1.w")), ("c", "l.0", ("b", "l.0.w")), ("d", "l.1", ("a", "l.1.w"))]
    tree = run_both(linear_graph(steps, ("c", "d")), params("l.0.w", "l.1.w"))
    assert list(inlined(tree)) == ["l.0"] and block_paths(tree) == ("l.1",)


def test_a_block_called_twice_in_a_row_is_one_block() -> None:
    steps = [("a", "l.0", ("x", "l.0.w")), ("b", "l.0", ("a", "l.0.w")), ("c", "l.1", ("b", "l.1.w"))]
    tree = run_both(linear_graph(steps, ("c",)), params("l.0.w", "l.1.w"))
    assert block_paths(tree) == ("l.0", "l.1")


def test_a_parameter_the_root_reads_too_keeps_its_block_in_the_root() -> None:
    steps = [("a", "l.0", ("x", "l.0.w")), ("b", "l.1", ("a", "l.1.w")), ("c", "", ("b", "l.0.w"))]
    tree = run_both(linear_graph(steps, ("c",)), params("l.0.w", "l.1.w"))
    assert block_paths(tree) == ("l.1",)
    assert "l.0.w is also used outside" in inlined(tree)["l.0"]


def test_a_foreign_parameter_is_passed_by_the_root() -> None:
    steps = [("a", "l.0", ("x", "r.w")), ("b", "l.1", ("a", "r.w"))]
    tree = run_both(linear_graph(steps, ("b",)), params("r.w"))
    assert block_paths(tree) == ("l.0", "l.1")


def test_blocks_that_share_a_tied_parameter_are_one_unit() -> None:
    steps = [("a", "l.0", ("x", "l.0.w")), ("b", "l.1", ("a", "l.1.w")), ("c", "l.2", ("b", "l.0.w"))]
    tree = run_both(linear_graph(steps, ("c",)), params("l.0.w", "l.1.w"), aliases={"l.2.w": "l.0.w"})
    assert block_paths(tree) == ("l.0", "l.1", "l.2")
    assert shared_blocks(tree) == (("l.0", "l.2"), ("l.1",))


def test_constants_move_to_the_block_that_uses_them_or_to_the_root() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("l.0.w")
    own = graph.call_function(aten.cos.default, (x,))  # computed outside, used by one block
    both = graph.call_function(aten.sin.default, (x,))  # computed inside one block, used by two
    set_facts(both, replace(facts(both), region="l.0"))
    a = graph.call_function(aten.mul.Tensor, (w, own))
    b = graph.call_function(aten.mul.Tensor, (a, both))
    c = graph.call_function(aten.mul.Tensor, (b, both))
    for node, region in ((a, "l.0"), (b, "l.0"), (c, "l.1")):
        set_facts(node, replace(facts(node), region=region))
    graph.output((c,))
    made = cut(graph, ["l.0.w"])
    assert "cos" in str(made.blocks["l.0"].graph) and "sin" not in str(made.blocks["l.0"].graph)
    assert "sin" in str(made.root.graph) and "cos" not in str(made.root.graph)


def test_a_tensor_nobody_knows() -> None:
    with pytest.raises(ValueError, match="the graph reads l.0.v, which is neither a parameter, a buffer nor a constant"):
        build(linear_graph([("a", "l.0", ("x", "l.0.v"))], ("a",)), {})


def test_a_buffer_that_is_read_for_backward_and_updated() -> None:
    """Autograd has saved the buffer when it is overwritten: the root hands out a copy."""

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (self.w * self.mean).sum()
            self.mean.mul_(0.5)
            return y + x.sum()

    net, x = Running(), torch.ones(3)
    tree = tree_of(net, (x,))
    tree.run("train", x)[0].backward()
    assert tree.get_parameter("w").grad.tolist() == [1.0, 1.0, 1.0]  # type: ignore[union-attr]
    assert tree.get_buffer("mean").tolist() == [0.5, 0.5, 0.5]


def test_computing_in_another_dtype_keeps_master_gradients(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    half = copy.deepcopy(net).to(torch.bfloat16)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    captured = capture(half, (x,))
    tree = build(captured.graph, {n: as_dtensor(p, mesh) for n, p in net.named_parameters()}, {}, captured.constants)
    tree.set_compute_dtype(torch.bfloat16)
    (y,) = tree.run("train", x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    half(x).float().sum().backward()
    for p, q in zip(tree.parameters(), half.parameters()):
        assert p.grad is not None and p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad.full_tensor(), q.grad.float())  # type: ignore[union-attr, attr-defined]


def test_the_model_may_have_any_structure() -> None:
    layers = nn.Sequential(Layer(), Layer()).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    tree = tree_of(layers, (x,))
    torch.testing.assert_close(tree.run("train", x)[0], layers(x))
    assert block_paths(tree) == ("0", "1")
