"""Steps on a GPU: the model's own loss and gradients, by one process and by simulated ranks, and no wait of the host within a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meshpar as mp
from meshpar.errors import BatchError
from tests.gpu.small import UNITS, batch_of, distance, each_rank, expected, farthest, model_of

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_one_process(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    model, batch = model_of(kind, device, dtype).eval(), batch_of(device)
    loss, right = expected(model, batch)
    pm = mp.parallelize(model, mp.make_mesh("tp=1", device.type), example=batch)
    assert abs(float(pm.train_step(**batch)) - loss) < UNITS[dtype] * loss
    if dtype == torch.bfloat16:  # as far from float64 as what it does to the model itself
        _, exact = expected(model_of(kind, device, dtype).eval().double(), batch)
        assert farthest(pm, exact) < 2 * max(distance(right[name], exact[name]) for name in exact)
    else:
        assert farthest(pm, right) < UNITS[dtype]
    assert {t.device.type for t in (*pm.parameters(), *pm.buffers())} == {device.type}


@pytest.mark.parametrize("at", ["cpu", "there"])
@pytest.mark.parametrize(("kind", "mesh"), [("llama", "dp=2,tp=2"), ("mixtral", "ep=2,tp=2"), ("llama", "cp=2,tp=2")])
def test_simulated_ranks(kind: str, mesh: str, at: str, device: torch.device) -> None:
    """Also of a model that is still on the CPU: its parameters, buffers and constants are moved."""
    batch = batch_of(device)
    loss, right = expected(model_of(kind, device, torch.float64), batch)
    model = model_of(kind, CPU if at == "cpu" else device, torch.float64)
    with mp.simulate(4):
        found = mp.make_mesh(mesh, device.type)
        local = mp.local_batch(batch, found)
        pm = mp.parallelize(model, found, example=local)
        losses = each_rank(pm.train_step(**local))
        assert max(abs(float(one) - loss) for one in losses) < UNITS[torch.float64] * loss
        assert farthest(pm, right) < UNITS[torch.float64]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_dropout_is_drawn_again_where_it_is_computed_again(recompute: str, device: torch.device) -> None:
    batch = batch_of(device)
    grads = []
    for mode in ("none", recompute):
        model = model_of("gpt2", device, torch.float32).train()
        config = mp.ParallelConfig(recompute=mode, seed=3)  # type: ignore[arg-type]
        pm = mp.parallelize(model, mp.make_mesh("tp=1", device.type), example=batch, config=config)
        pm.train_step(**batch)
        grads.append({name: mp.full_grad(p) for name, p in pm.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_optimizer_clipping_and_scaler(device: torch.device) -> None:
    batch = batch_of(device)
    model, other = model_of("llama", device, torch.float64), model_of("llama", device, torch.float64)
    pm = mp.parallelize(model, mp.make_mesh("tp=1", device.type), example=batch)
    ours, theirs = torch.optim.AdamW(pm.parameters(), fused=True), torch.optim.AdamW(other.parameters(), fused=True)
    for _ in range(2):
        pm.train_step(**batch)
        expected_loss = other(**batch, use_cache=False).loss
        expected_loss.backward()
        norms = mp.clip_grad_norm_(pm.parameters(), 0.5), torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        torch.testing.assert_close(norms[0].double(), norms[1].double(), rtol=1e-5, atol=0)
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    for name, parameter in pm.named_parameters():
        torch.testing.assert_close(mp.full_tensor(parameter), other.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_on_the_host_is_refused(device: torch.device) -> None:
    if device == CPU:
        pytest.skip("the host is the device")
    batch = batch_of(device)
    pm = mp.parallelize(model_of("llama", device, torch.float32), mp.make_mesh("tp=1", device.type), example=batch)
    with pytest.raises(BatchError, match="computes on cuda"):
        pm.train_step(**batch_of(CPU))


@pytest.mark.parametrize(("kind", "waits"), [("llama", 0), ("gpt2", 0), ("mixtral", 4)])
def test_how_often_the_host_waits(kind: str, waits: int, device: torch.device) -> None:
    """A dense step never; one with experts at most once for each layer, forward and backward."""
    model, batch = model_of(kind, device, torch.bfloat16), batch_of(device)
    pm = mp.parallelize(model, mp.make_mesh("tp=1", device.type), example=batch)
    for _ in range(2):
        pm.train_step(**batch)
    assert waited(lambda: pm.train_step(**batch), device) <= waits


def waited(step: Any, device: torch.device) -> int:
    """How often the host waited for the device."""
    import warnings

    if device == CPU:
        step()
        return 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def test_a_dense_step_is_one_cuda_graph(device: torch.device) -> None:
    """Warmed up on a side stream, captured, replayed: the same gradients. (With dropout every replay would draw the same numbers.)"""
    batch = batch_of(device)
    pm = mp.parallelize(model_of("llama", device, torch.float32), mp.make_mesh("tp=1", device.type), example=batch)
    pm.train_step(**batch)
    right = {name: mp.full_grad(p).clone() for name, p in pm.named_parameters()}  # type: ignore[union-attr]
    if device == CPU:
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            pm.train_step(**batch)
    torch.cuda.current_stream().wait_stream(side)
    pm.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pm.train_step(**batch)
    graph.replay()
    torch.cuda.synchronize()
    for name, parameter in pm.named_parameters():
        torch.testing.assert_close(mp.full_grad(parameter), right[name])
