"""FSDP2 over blocks against one process: loss, every gradient, and the parameters after three optimizer steps, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import meshpar as mp
from meshpar.config import ParallelConfig, Precision
from meshpar.errors import ConfigError
from meshpar.mesh import data_rank, local_batch
from meshpar.report.text import count
from meshpar.runtime import data_parallel
from meshpar.runtime.parameters.gradients import clip_grad_norm_
from meshpar.runtime.parameters.specs import full_grad, full_tensor
from tests.pool import Pool
from tests.runtime.models import data_sum, make_batch, make_net, make_tree, world_mesh

MICROBATCHES = 2


def train(mesh_spec: str, mode: str, recompute: str = "none", optimizer: str = "foreach", bucket: int = 25 << 20) -> dict[str, Any]:
    """Three AdamW steps of two microbatches with clipping: losses, norms, first gradients, last parameters."""
    mesh = world_mesh(mesh_spec)
    share = 8 // data_rank(mesh)[1] // MICROBATCHES
    tree = make_tree(make_net(), mesh, rows=share, recompute=recompute)
    config = ParallelConfig(microbatches=MICROBATCHES, data_parallel=mode, bucket_bytes=bucket)  # type: ignore[arg-type]
    parallel = data_parallel.apply(tree, mesh, config)
    adamw = torch.optim.AdamW(tree.parameters(), lr=0.05, **({"fused": True} if optimizer == "fused" else {"foreach": True}))
    losses, norms, grads = [], [], {}
    for step in range(3):
        batch = local_batch(make_batch(step, rows=8), mesh)
        total = torch.zeros((), dtype=torch.float64)
        for index, micro in enumerate(zip(*(x.chunk(MICROBATCHES) for x in batch))):
            parallel.microbatch(index, MICROBATCHES)
            (loss,) = tree.run("train", *micro)
            loss.backward()
            total += loss.detach()
        losses.append(data_sum(total, mesh).item())
        if step == 0:
            grads = {name: full_grad(p) for name, p in tree.named_parameters()}
        norms.append(clip_grad_norm_(tree.parameters(), 0.5).item())
        adamw.step()
        adamw.zero_grad(set_to_none=step != 1)
    return {
        "losses": losses,
        "norms": norms,
        "grads": grads,
        "parameters": {name: full_tensor(p) for name, p in tree.named_parameters()},
        "kinds": {name: str(type(p.data).__name__) + str(tuple(p.shape)) for name, p in tree.named_parameters()},
        "steps": tree.state_dict()["steps"].item(),
        "tied": tree.get_parameter("embed.weight") is tree.get_parameter("head.weight"),
    }


def reference() -> dict[str, Any]:
    net = make_net()
    adamw = torch.optim.AdamW(net.parameters(), lr=0.05)
    losses, norms, grads = [], [], {}
    for step in range(3):
        total = 0.0
        for micro in zip(*(x.chunk(MICROBATCHES) for x in make_batch(step, rows=8))):
            loss = net(*micro)
            loss.backward()
            total += loss.item()
        losses.append(total)
        if step == 0:
            grads = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5).item())
        adamw.step()
        adamw.zero_grad()
    return {"losses": losses, "norms": norms, "grads": grads, "parameters": {n: p.detach() for n, p in net.named_parameters()}}


def check(found: dict[str, Any], expected: dict[str, Any], *, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=rtol, atol=0)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=rtol, atol=0)
    for kind in ("grads", "parameters"):
        assert list(found[kind]) == list(expected[kind])
        for name, value in expected[kind].items():
            if value is None:
                assert found[kind][name] is None, name
            else:
                torch.testing.assert_close(found[kind][name], value, rtol=rtol, atol=rtol, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return reference()


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "mode, mesh, optimizer",
    [(mode, "dp=2", "fused") for mode in ("zero3", "zero2", "zero1", "replicate")] + [("zero2", "dp=2,tp=2", "foreach")],
)
def test_modes_equal_one_process(gloo: Pool, expected: dict[str, Any], mode: str, mesh: str, optimizer: str) -> None:
    for found in gloo.run(train, mesh, mode, "none", optimizer, world=2 if mesh == "dp=2" else 4):
        check(found, expected)
        assert found["tied"]
        assert found["steps"] == 3 * MICROBATCHES
        assert found["kinds"]["layers.0.fused.weight"] == "DTensor(12, 6)"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["zero3", "zero1"])
def test_hybrid_sharding(gloo: Pool, expected: dict[str, Any], mode: str) -> None:
    for found in gloo.run(train, "dp_replicate=2,dp_shard=2", mode, world=4):
        check(found, expected)


def test_one_unit_per_bucket(gloo: Pool, expected: dict[str, Any]) -> None:
    for bucket in (1, 1200):
        check(gloo.run(train, "dp=2", "replicate", "none", "foreach", bucket)[0], expected)


def test_one_data_rank_and_none(gloo: Pool, expected: dict[str, Any]) -> None:
    check(gloo.run(train, "dp=1", "zero3", world=1)[0], expected)
    for found in gloo.run(train, "tp=2", "zero3", world=2):
        check(found, expected)


def units(bucket: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    mesh = world_mesh("dp=1")
    found = []
    for mode in ("replicate", "zero3"):
        config = ParallelConfig(data_parallel=mode, bucket_bytes=bucket)  # type: ignore[arg-type]
        found.append(data_parallel.apply(make_tree(make_net(), mesh), mesh, config).units)
    return tuple(found)


def test_small_blocks_share_a_bucket_where_nothing_is_gathered(gloo: Pool) -> None:
    each = (("layers.0",), ("layers.1",), ("layers.2",))
    assert gloo.run(units, 1 << 20, world=1) == [((("layers.0", "layers.1", "layers.2"),), each)]
    assert gloo.run(units, 1, world=1) == [(each, each)]


class Gathers(TorchDispatchMode):
    """The bytes of parameters that arrive from other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::_allgather_base_"):
            self.bytes += args[0].nbytes - args[1].nbytes
        return func(*args, **(kwargs or {}))


class Even(nn.Module):
    """Two blocks between two layers that are in none; every parameter divides over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.last(x).square().mean()


def gathers(mode: str) -> tuple[str, int]:
    """What `explain` says is gathered in a step, and how many bytes arrive in one that is not the first."""
    config = ParallelConfig(data_parallel=mode, microbatches=MICROBATCHES)  # type: ignore[arg-type]
    x = torch.ones(4, 4)
    pm = mp.parallelize(Even(), mp.make_mesh("dp=2"), example=(x,), config=config)
    pm.train_step(x)
    with Gathers() as seen:
        pm.train_step(x)
    return next(line for line in str(pm.explain()).splitlines() if "per step over the data ranks" in line), seen.bytes


@pytest.mark.parametrize("mode", ["zero3", "zero2", "replicate"])
def test_parameters_outside_of_blocks_are_gathered_once_a_microbatch(gloo: Pool, mode: str) -> None:
    blocks, outside = 2 * (36 + 6) * 4, (24 + 6 + 12 + 2) * 4
    expected = {"zero3": MICROBATCHES * (2 * blocks + outside) // 2, "zero2": (blocks + outside) // 2, "replicate": 0}[mode]
    for said, found in gloo.run(gathers, mode, world=2):
        assert found == expected
        assert f": {count(found, 'B')} of parameters gathered" in said


def evaluate(mode: str) -> tuple[float, list[str], list[str]]:
    mesh = world_mesh("dp=2,tp=2")
    tree = make_tree(make_net(), mesh, rows=2)
    data_parallel.apply(tree, mesh, ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]
    before = [str(p.placements) for p in tree.parameters()]  # type: ignore[attr-defined]
    with torch.no_grad():
        (loss,) = tree.run("train", *local_batch(make_batch(), mesh))
    return data_sum(loss, mesh).item(), before, [str(p.placements) for p in tree.parameters()]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_after_an_evaluation_the_shards_are_registered_again(gloo: Pool) -> None:
    loss = make_net()(*make_batch()).item()
    for mode in ("zero3", "zero2", "replicate"):
        for found, before, after in gloo.run(evaluate, mode, world=4):
            assert found == pytest.approx(loss, rel=1e-12)
            assert before == after
            assert (mode == "replicate") != any("Shard(dim=0), Replicate" in p for p in before)


def mixed(mesh_spec: str) -> tuple[set[torch.dtype], set[torch.dtype], float, float]:
    """bf16 compute over float32 parameters: dtypes of parameters and gradients, the loss, and the error of the gradients."""
    mesh = world_mesh(mesh_spec)
    exact = make_net(dtype=torch.float32)
    tree = make_tree(make_net(dtype=torch.bfloat16), mesh, rows=4 // data_rank(mesh)[1], master=exact)
    data_parallel.apply(tree, mesh, ParallelConfig(precision=Precision.named("bf16")))
    batch = make_batch(0, rows=4)
    (loss,) = tree.run("train", *local_batch(batch, mesh))
    loss.backward()
    whole = exact(*batch)
    whole.backward()
    error = max(
        float((full_grad(p) - q.grad).norm() / q.grad.norm())  # type: ignore[operator]
        for (_, p), (_, q) in zip(tree.named_parameters(), exact.named_parameters())
        if p.grad is not None and q.grad is not None
    )
    grads = {p.grad.dtype for p in tree.parameters() if p.grad is not None}
    return {p.dtype for p in tree.parameters()}, grads, abs(data_sum(loss.float(), mesh).item() / whole.item() - 1), error


def test_mixed_precision_keeps_masters_and_sums_in_float32(gloo: Pool) -> None:
    for mesh in ("dp=2", "tp=2"):  # by FSDP2, and without it
        for parameters, grads, loss, error in gloo.run(mixed, mesh):
            assert parameters == grads == {torch.float32}
            assert loss < 0.03 and 1e-6 < error < 0.2


def tied_layers(mode: str, recompute: str) -> dict[str, torch.Tensor | None]:
    """The first and the last layer share a weight, so that they are one unit with another in between."""
    mesh = world_mesh("dp=2")
    net = make_net()
    net.layers[2].down.weight = net.layers[0].down.weight
    tree = make_tree(net, mesh, rows=2, recompute=recompute)
    parallel = data_parallel.apply(tree, mesh, ParallelConfig(data_parallel=mode))  # type: ignore[arg-type]
    assert any({"layers.0", "layers.2"} <= set(unit) for unit in parallel.units)
    for _ in range(2):
        tree.run("train", *local_batch(make_batch(), mesh))[0].backward()
    assert tree.get_parameter("layers.0.down.weight") is tree.get_parameter("layers.2.down.weight")
    return {name: full_grad(p) for name, p in tree.named_parameters()}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mode, recompute", [("zero3", "none"), ("zero3", "full"), ("zero1", "none"), ("replicate", "none")])
def test_blocks_that_share_a_parameter(gloo: Pool, mode: str, recompute: str) -> None:
    net = make_net()
    net.layers[2].down.weight = net.layers[0].down.weight
    for _ in range(2):
        net(*make_batch()).backward()
    for found in gloo.run(tied_layers, mode, recompute, world=2):
        assert list(found) == [name for name, _ in net.named_parameters()]
        for name, p in net.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


class Tempered(nn.Module):
    """Two parameters without dims, one of them in a block with others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        for layer in self.layers:
            layer.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * layer.gain
        return x.square().mean()


def tempered(spec: str, mode: str, path: str, load: bool) -> float:
    """Three clipped AdamW steps, or two and the third after loading; the largest difference from one device."""
    torch.manual_seed(0)
    model, x = Tempered().double(), torch.randn(4, 4, dtype=torch.float64)
    mesh = world_mesh(spec)
    (local,) = mp.local_batch((x,), mesh)
    config = ParallelConfig(data_parallel=mode, microbatches=2)  # type: ignore[arg-type]
    pm = mp.parallelize(copy.deepcopy(model), mesh, example=(local,), config=config)
    optimizers = [torch.optim.AdamW([{"params": one.parameters()}], lr=0.1) for one in (pm, model)]
    for step in range(3):
        model(x).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if load and step == 2:
            mp.checkpoint.load(path, pm, optimizers[0])
        if not load or step == 2:
            pm.train_step(local)
            assert abs(float(mp.clip_grad_norm_(pm.parameters(), 0.1)) - float(norm)) < 1e-12
            optimizers[0].step()
            optimizers[0].zero_grad()
        optimizers[1].step()
        optimizers[1].zero_grad()
        if not load and step == 1:
            mp.checkpoint.save(path, pm, optimizers[0])
    expected = dict(model.named_parameters())
    return max(float((mp.full_tensor(p) - expected[n].detach()).abs().max()) for n, p in pm.named_parameters())


def test_parameters_without_dims(gloo: Pool, tmp_path: Path) -> None:
    for mode in ("zero3", "zero1", "replicate"):
        assert max(gloo.run(tempered, "dp=2", mode, str(tmp_path / mode), False)) < 1e-12
    for spec in ("pp=2", "tp=2", "dp=2"):
        assert max(gloo.run(tempered, spec, "zero2", str(tmp_path / "zero3"), True)) < 1e-12


def test_releases_that_share_out_over_one_axis_alone_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.12: the parts that it gives ranks of two axes are not those that its DTensors say."""
    monkeypatch.setattr(data_parallel, "shares_out_over_several", lambda: False)
    with mp.simulate(4):
        mesh = mp.make_mesh("dp=2,cp=2")
        with pytest.raises(ConfigError, match=r"not over dp and cp: use data_parallel=\"replicate\", one of these axes"):
            data_parallel.apply(make_tree(make_net(), mesh), mesh, ParallelConfig())


def stopped() -> str:
    """What a step says after one that raised, where FSDP2 cannot forget that."""
    mesh = world_mesh("dp=2")
    parallel = data_parallel.apply(make_tree(make_net(), mesh), mesh, ParallelConfig())
    parallel.microbatch(0, 1)
    before, data_parallel.forget_step = data_parallel.forget_step, lambda root: False
    try:
        parallel.reset()
    finally:
        data_parallel.forget_step = before
    try:
        parallel.microbatch(0, 1)
    except ConfigError as error:
        return str(error)
    return ""


def test_releases_that_cannot_forget_a_step_refuse_the_next(gloo: Pool) -> None:
    assert all("parallelize again" in said for said in gloo.run(stopped, world=2))
