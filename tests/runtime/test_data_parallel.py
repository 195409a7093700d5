"""FSDP2 over blocks against one process: loss, every gradient, and the parameters after three optimizer steps, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshpar.config import ParallelConfig, Precision
from meshpar.mesh import data_rank, local_batch
from meshpar.runtime import data_parallel
from meshpar.runtime.gradients import clip_grad_norm_
from meshpar.runtime.parameters import full_grad, full_tensor
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
                torch.testing.assert_close(found[kind][name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{kind} {n}: {m}")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return reference()


@pytest.mark.parametrize("mode", ["zero3", "zero2", "zero1", "replicate"])
@pytest.mark.parametrize("mesh, optimizer", [("dp=2", "fused"), ("dp=2,tp=2", "foreach")])
def test_modes_equal_one_process(gloo: Pool, expected: dict[str, Any], mode: str, mesh: str, optimizer: str) -> None:
    for found in gloo.run(train, mesh, mode, "none", optimizer, world=2 if mesh == "dp=2" else 4):
        check(found, expected)
        assert found["tied"]
        assert found["steps"] == 3 * MICROBATCHES
        assert found["kinds"]["layers.0.fused.weight"] == "DTensor(12, 6)"
