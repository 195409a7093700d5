"""Recompute: the same loss and gradients with fewer bytes saved, alone and under data parallelism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks

from meshpar.capture.export import capture
from meshpar.graph.facts import facts, set_facts
from meshpar.runtime.blocks import Tree, build
from meshpar.runtime.recompute import wrap
from tests.pool import Pool
from tests.runtime.models import make_batch, make_net, make_tree, world_mesh
from tests.runtime.test_data_parallel import check, reference, train

aten = torch.ops.aten


class Mlp(nn.Module):
    """Wide pointwise work between two products: what recompute is for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(torch.nn.functional.gelu(self.up(x)).square() + 1))


def tree_of(net: nn.Module, batch: tuple[torch.Tensor, ...], mode: str, **options: Any) -> Tree:
    captured = capture(net, batch)
    parameters = {n: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    return build(
        captured.graph,
        parameters,
        buffers,
        captured.constants,
        aliases=captured.aliases,
        mutations=captured.mutations,
        recompute=mode,  # type: ignore[arg-type]
        **options,
    )


@pytest.mark.parametrize("mode", ["selective"])
def test_gradients_are_unchanged_and_memory_is_less(mode: str) -> None:
    net = nn.Sequential(*(Mlp() for _ in range(4))).double()
    x = torch.randn(32, 16, dtype=torch.float64)
    plain, less = tree_of(net, (x,), "none"), tree_of(net, (x,), mode)
    grads = []
    for tree in (plain, less):
        tree.run("train", x)[0].square().sum().backward()
        grads.append([p.grad for p in tree.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    wide = 4 * 32 * 64 * 8
    narrow = wide // 4
    before = live_bytes(plain, x)
    after = live_bytes(less, x)
    assert before >= 4 * wide
    assert after <= (2 * wide + 2 * narrow if mode == "selective" else 2 * narrow)


def live_bytes(tree: Tree, x: torch.Tensor) -> int:
    """Bytes a forward leaves behind for backward, from what the process has allocated for tensors that are still reachable."""
    import gc

    def total() -> int:
        gc.collect()
        found = {}
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor) and type(item) is torch.Tensor:
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return sum(found.values())

    kept: list[torch.Tensor] = []
    before = total()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # makes Python see what autograd saves
        output = tree.run("train", x)[0]
    after = total()
    del output
    return after - before


def test_collectives_and_products_are_not_run_again() -> None:
    runs: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            runs.append(func.name().split(".")[0])
            return func(*args, **(kwargs or {}))

    net, x = Mlp().double(), torch.randn(4, 16, dtype=torch.float64)
    counts = {}
    for mode in ("none", "selective", "full"):
        tree = tree_of(nn.Sequential(net, Mlp().double()), (x,), mode)
        runs.clear()
        with Count():
            tree.run("train", x)[0].sum().backward()
        counts[mode] = (runs.count("aten::addmm"), runs.count("aten::gelu"))
    assert counts == {"none": (4, 2), "selective": (4, 4), "full": (counts["full"][0], 4)}
    assert counts["full"][0] > 4


def test_random_numbers_are_the_same_the_second_time() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.native_dropout.default, (x, 0.5, True))
    z = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.sin.default, (x,)), graph.call_function(lambda t: t[0], (y,))))
    for node in graph.nodes:
        if node.op == "call_function":
            set_facts(node, replace(facts(node), region="l.0"))
    graph.output((z,))
    results = []
    for mode in ("none", "full"):
        tree = build(graph, {}, recompute=mode)  # type: ignore[arg-type]
        value = torch.arange(8.0, requires_grad=True)
        torch.manual_seed(0)
        tree.run("train", value)[0].sum().backward()
        results.append(value.grad)
    torch.testing.assert_close(*results)


def test_nothing_is_wrapped_without_gradients() -> None:
    net, batch = make_net(), make_batch()
    tree = tree_of(net, batch, "full")
    with torch.no_grad():
        loss = tree.run("train", *batch)[0]
        assert not loss.requires_grad
        torch.testing.assert_close(loss, net(*batch))


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="recompute is one of none, selective, full, not 'some'"):
        wrap(lambda: None, "some", fx.Graph())  # type: ignore[arg-type]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mesh, mode, recompute", [("dp=2,tp=2", "zero3", "selective"), ("dp=2", "zero2", "full")])
def test_recompute_under_data_and_tensor_parallelism(gloo: Pool, mesh: str, mode: str, recompute: str) -> None:
    for found in gloo.run(train, mesh, mode, recompute, world=4 if "tp" in mesh else 2):
        check(found, reference())


def test_recompute_on_simulated_ranks(simulated: Any) -> None:
    from meshpar.runtime.parameters.specs import full_grad

    net, batch = make_net(), make_batch()
    net(*batch).backward()
    for mode in ("none", "selective", "full"):
        with simulated(2):
            tree = make_tree(make_net(), world_mesh("tp=2"), recompute=mode)
            tree.run("train", *batch)[0].backward()
            found = {name: full_grad(p) for name, p in tree.named_parameters()}
        for name, p in net.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=f"{mode} {name}": f"{n}: {m}")
